"""Let a model answer held-out prompts, and compare the answers with the references."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lit_lora import log
from lit_lora.data.sample import Conversation
from lit_lora.errors import UsageError
from lit_lora.evaluate.answers import Answer, Scores, score_answers
from lit_lora.evaluate.shots import with_shots
from lit_lora.generate import Sampling, answer_all
from lit_lora.model import LanguageModel
from lit_lora.tokenizer import Tokenizer, encode_prompt

__all__ = ["evaluate_generation", "reference"]


def evaluate_generation(
    model: LanguageModel,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
    *,
    shots: Sequence[Conversation] = (),
    max_new_tokens: int | None = None,
    batch_size: int = 50,
    what: str = "answers",
) -> Scores:
    """Answer the last turn of every conversation, greedily, and compare with its last assistant message.

    Args:
        model: The model.
        tokenizer: Its tokenizer, with the chat template and stop tokens.
        conversations: Each ends with the assistant message that is the reference.
        shots: Conversations put before each one as earlier turns.
        max_new_tokens: Maximum length of an answer; when omitted, a quarter more than the longest reference.
        batch_size: Maximum number of prompts per batch.
        what: Title of the progress bar.

    Raises:
        UsageError: A conversation has no reference, or a prompt leaves no room for an answer.
    """
    references = [reference(conversation) for conversation in conversations]
    if not all(references):
        raise UsageError("exact match needs conversations that end with the assistant's answer")
    longest_reference = max((len(tokenizer.encode(text)) for text in references), default=1)
    sampling = Sampling(max_new_tokens=max_new_tokens or longest_reference + longest_reference // 4 + 8)

    questions = [Conversation(conversation.messages[:-1], conversation.tools) for conversation in conversations]
    prompts = []
    for question in questions:
        prompted = with_shots(question, shots)
        prompts.append(encode_prompt(tokenizer, prompted.messages, tools=prompted.tools))
    longest_prompt = max(map(len, prompts), default=0)
    if longest_prompt + longest_reference > model.context:
        raise UsageError(
            f"the longest prompt has {longest_prompt} tokens and the longest answer {longest_reference}; "
            f"the model's context is {model.context}",
            hint="use fewer --shots" if shots else "leave out the longest rows",
        )

    start = time.perf_counter()
    with log.progress(total=len(prompts), what=what, unit="row") as bar:
        generated = answer_all(model, tokenizer, prompts, sampling, batch_size=batch_size, on_answer=bar.update)
    seconds = time.perf_counter() - start
    answers = [
        Answer(question.messages, text, answer.text, answer.ended == "stop")
        for question, text, answer in zip(questions, references, generated, strict=True)
    ]
    return score_answers(answers, seconds)


def reference(conversation: Conversation) -> str:
    """The text to compare an answer with: the last message if it is the assistant's, else an empty string."""
    last = conversation.messages[-1]
    return str(last.get("content") or "") if last["role"] == "assistant" else ""

"""Let a model answer held-out prompts, and compare."""

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
    """Answer every conversation's last turn, greedily, and compare with the assistant message that stands there.

    Args:
        model: The model.
        tokenizer: Its tokenizer: template and stop rules.
        conversations: Each ends with the assistant message that is the reference.
        shots: Conversations that stand before each one as earlier turns.
        max_new_tokens: Where an answer is cut off; when omitted, a quarter more than the longest reference takes.
        batch_size: Prompts at once.
        what: Title of the progress bar.

    Raises:
        UsageError: There is nothing to compare with, or the shots leave no room for an answer.
    """
    references = [reference(conversation) for conversation in conversations]
    if not all(references):
        raise UsageError("exact match needs conversations that end with the assistant's answer")
    longest = max((len(tokenizer.encode(text)) for text in references), default=1)
    sampling = Sampling(max_new_tokens=max_new_tokens or longest + longest // 4 + 8)
    questions = [Conversation(conversation.messages[:-1], conversation.tools) for conversation in conversations]
    asked = [with_shots(question, shots) for question in questions]
    prompts = [encode_prompt(tokenizer, each.messages, tools=each.tools) for each in asked]
    context, most = model.context, max(map(len, prompts), default=0)
    if most + longest > context:
        raise UsageError(
            f"the longest prompt has {most} tokens and its answer up to {longest}; the model reads at most {context}",
            hint="take fewer --shots" if shots else "leave the longest rows out",
        )
    start = time.perf_counter()
    with log.progress(total=len(prompts), what=what, unit="row") as bar:
        given = answer_all(model, tokenizer, prompts, sampling, batch_size=batch_size, on_answer=bar.update)
    seconds = time.perf_counter() - start
    answers = [
        Answer(question.messages, text, answer.text, answer.ended == "stop")
        for question, text, answer in zip(questions, references, given, strict=True)
    ]
    return score_answers(answers, seconds)


def reference(conversation: Conversation) -> str:
    """The text that an answer is compared with: the last message if it is the assistant's, else nothing."""
    last = conversation.messages[-1]
    return str(last.get("content") or "") if last["role"] == "assistant" else ""

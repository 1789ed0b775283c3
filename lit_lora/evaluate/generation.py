"""Let a model answer held-out prompts, and compare."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lit_lora import log
from lit_lora.errors import UsageError
from lit_lora.evaluate.answers import Answer, Scores, score_answers
from lit_lora.evaluate.shots import with_shots
from lit_lora.generate import Sampling, answer_all
from lit_lora.model import CausalLM
from lit_lora.tokenizer import Message, Tokenizer, encode_prompt

__all__ = ["evaluate_generation"]


def evaluate_generation(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    *,
    shots: Sequence[Sequence[Message]] = (),
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
    if not conversations or any(messages[-1]["role"] != "assistant" for messages in conversations):
        raise UsageError("exact match needs conversations that end with the assistant's answer")
    references = [str(messages[-1]["content"]) for messages in conversations]
    longest = max(len(tokenizer.encode(reference)) for reference in references)
    sampling = Sampling(max_new_tokens=max_new_tokens or longest + longest // 4 + 8)
    prompts = [encode_prompt(tokenizer, with_shots(messages[:-1], shots)) for messages in conversations]
    context = model.config.max_position_embeddings
    if max(map(len, prompts)) + longest > context:
        raise UsageError(
            f"the longest prompt has {max(map(len, prompts))} tokens and its answer up to {longest}; "
            f"the model reads at most {context}",
            hint="take fewer --shots" if shots else "leave the longest rows out",
        )
    start = time.perf_counter()
    with log.progress(total=len(prompts), what=what, unit="row") as bar:
        given = answer_all(model, tokenizer, prompts, sampling, batch_size=batch_size, on_answer=bar.update)
    seconds = time.perf_counter() - start
    answers = [
        Answer(list(messages[:-1]), reference, answer.text, answer.ended == "stop")
        for messages, reference, answer in zip(conversations, references, given, strict=True)
    ]
    return score_answers(answers, seconds)

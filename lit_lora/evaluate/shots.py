"""Examples in the prompt (few-shot): what a model can do without finetuning, the baseline that finetuning must beat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from lit_lora.data.encode import learned_answers
from lit_lora.data.sample import Conversation
from lit_lora.errors import UsageError
from lit_lora.tokenizer import EncodedChat, Tokenizer, encode_rendered, render_chat

__all__ = ["draw_shots", "encode_after_shots", "with_shots"]

T = TypeVar("T")


def draw_shots(examples: Sequence[T], count: int, *, seed: int) -> list[T]:
    """``count`` different examples, drawn at random by ``seed``.

    Raises:
        UsageError: There are fewer examples.
    """
    if count > len(examples):
        raise UsageError(
            f"--shots {count}: there are only {len(examples)} examples", hint="use a larger file for --examples"
        )
    return random.Random(seed).sample(list(examples), count)


def with_shots(conversation: Conversation, shots: Sequence[Conversation]) -> Conversation:
    """The conversation with the shots as earlier turns, after its system message; those of the shots are left out.

    No answer of the shots is a target.
    """
    if not shots:
        return conversation
    messages = conversation.messages
    system = [message for message in messages[:1] if message["role"] == "system"]
    earlier = [message for shot in shots for message in shot.messages if message["role"] != "system"]
    context_only = set(range(len(system), len(system) + len(earlier)))
    context_only |= {index + len(earlier) for index in conversation.context_only}
    return Conversation([*system, *earlier, *messages[len(system) :]], conversation.tools, frozenset(context_only))


def encode_after_shots(
    tokenizer: Tokenizer, conversation: Conversation, shots: Sequence[Conversation] = (), learn: str = "answers"
) -> EncodedChat:
    """The conversation after its shots; targets are the tokens of the conversation itself that training learns.

    Args:
        tokenizer: The tokenizer.
        conversation: What is measured.
        shots: What comes before it.
        learn: As in the config section ``data``; for ``all``, with shots only the answers count.

    Raises:
        InputError: The template refuses the conversation.
    """
    asked = with_shots(conversation, shots)
    rendered = render_chat(tokenizer, asked.messages, tools=asked.tools, learned=learned_answers(asked, learn))
    [encoded] = encode_rendered(tokenizer, [rendered])
    if learn == "all" and not shots:
        return EncodedChat(encoded.ids, [True] * len(encoded.ids))
    return encoded

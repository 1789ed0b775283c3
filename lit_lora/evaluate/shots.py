"""Examples in the prompt (few-shot): what a model can do without finetuning, the baseline that finetuning must beat."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from lit_lora.data.sample import Conversation
from lit_lora.errors import UsageError
from lit_lora.tokenizer import EncodedChat, Tokenizer, encode_chat

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
    """The conversation with the shots as earlier turns, after its system message; those of the shots are left out."""
    if not shots:
        return conversation
    messages = conversation.messages
    system = [message for message in messages[:1] if message["role"] == "system"]
    earlier = [message for shot in shots for message in shot.messages if message["role"] != "system"]
    return Conversation([*system, *earlier, *messages[len(system) :]], conversation.tools)


def encode_after_shots(
    tokenizer: Tokenizer, conversation: Conversation, shots: Sequence[Conversation] = ()
) -> EncodedChat:
    """The conversation after its shots; only the target tokens of the conversation itself count.

    Raises:
        InputError: The template refuses the conversation.
    """
    alone = encode_chat(tokenizer, conversation.messages, tools=conversation.tools)
    if not shots:
        return alone
    encoded = encode_chat(tokenizer, with_shots(conversation, shots).messages, tools=conversation.tools)

    # The shots' answers are targets too, but come first: of all targets, the last ones are the conversation's.
    targets = [place for place, is_target in enumerate(encoded.loss_mask) if is_target]
    loss_mask = [False] * len(encoded.loss_mask)
    for place in targets[len(targets) - sum(alone.loss_mask) :]:
        loss_mask[place] = True
    return EncodedChat(encoded.ids, loss_mask)

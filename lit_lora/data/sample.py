"""A sample: what a row of any format becomes, a conversation or a plain text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lit_lora.data.findings import Notice
from lit_lora.tokenizer import Message

__all__ = ["Conversation", "Format", "Sample", "as_text", "exchange"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the functions that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    context_only: frozenset[int] = frozenset()
    """Indices of assistant messages that the user does not want learned."""

    @property
    def has_answer(self) -> bool:
        """Whether any assistant message has text or calls a function."""
        return any(
            (message.get("content") or "").strip() or message.get("tool_calls")
            for message in self.messages
            if message["role"] == "assistant"
        )


Sample: TypeAlias = Conversation | str
"""A conversation, or a plain text."""


@dataclass(frozen=True)
class Format:
    """A dataset format: its columns, and how a row becomes a sample.

    ``read`` takes a row under the format's own column names, and a function that counts a warning about it, such as
    ``has an empty answer, which is not learned``. It raises ``ValueError`` for a value of the wrong type; the caller
    adds file and line to the message.
    """

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Notice], Sample]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> other names under which it is recognized, the likeliest first."""
    nested: bool = False
    """Whether the required column contains a list of messages instead of text."""


def as_text(value: Any) -> str:
    """A cell as text: null is empty; a list, an object or a number is written as JSON.

    NaN, which tables use for a missing value, is empty too.

    Raises:
        ValueError: The text contains half of a surrogate pair, which no tokenizer accepts.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair (an emoji cut in two?) at character {error.start}") from None
    return text


def exchange(row: Mapping[str, Any], prompt: str, answer: str) -> Conversation:
    """A prompt and its answer, after the row's ``system`` message if it has one."""
    system = as_text(row.get("system"))
    messages: list[Message] = []
    if system:
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": prompt})
    messages.append({"role": "assistant", "content": answer})
    return Conversation(messages)

"""What a row of any format becomes: a conversation, or a plain text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lit_lora.tokenizer import Message

__all__ = ["Conversation", "Format", "Sample", "as_text", "exchange"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in their order, and the functions that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    @property
    def has_answer(self) -> bool:
        """Whether an assistant message says something."""
        return any(
            (message.get("content") or "").strip() or message.get("tool_calls")
            for message in self.messages
            if message["role"] == "assistant"
        )


Sample: TypeAlias = Conversation | str
"""A conversation, or a plain text."""


@dataclass(frozen=True)
class Format:
    """A dataset format: its columns, and how a row with them becomes a sample.

    ``read`` gets a row under the format's own column names and raises ``ValueError`` when a value has a wrong shape;
    the caller knows the file and the row and adds them.
    """

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Sample]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> other names under which it is recognised, the likeliest first."""
    nested: bool = False
    """The required column holds a list of messages rather than text."""


def as_text(value: Any) -> str:
    """A cell as text: null is empty, a list or an object is JSON, a number is as JSON writes it.

    NaN, which tables write for a missing value, is empty too.

    Raises:
        ValueError: The text holds half of a surrogate pair, which no tokenizer accepts.
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
    """One question and its answer, after the row's ``system`` message when it has one."""
    system = as_text(row.get("system"))
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return Conversation([*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])

"""A sample: what a row of any format becomes, a conversation or a plain text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeAlias

from lit_lora.data.findings import Notice
from lit_lora.tokenizer import Message

__all__ = ["Conversation", "Format", "RowContext", "Sample", "as_json_value", "as_text"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the functions that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    context_only: frozenset[int] = frozenset()
    """Indices of assistant messages that the user does not want learned."""

    @property
    def has_answer(self) -> bool:
        """Whether there is an assistant message to learn that has text or calls a function."""
        return any(
            (message.get("content") or "").strip() or message.get("tool_calls")
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index not in self.context_only
        )


Sample: TypeAlias = Conversation | str
"""A conversation, or a plain text."""


@dataclass(frozen=True)
class RowContext:
    """What a format needs to know beside the values of a row."""

    notice: Notice
    """Counts a warning about the row, such as ``with an empty answer, which is not learned``."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The format's column -> what the file calls it."""
    roles: Mapping[str, str] = field(default_factory=dict)
    """The file's own names of roles -> roles that are known."""


@dataclass(frozen=True)
class Format:
    """A dataset format: its columns, and how a row becomes a sample.

    ``read`` takes a row under the format's own column names. It raises ``ValueError`` for a value of the wrong type;
    the caller adds file and line to the message.
    """

    required: tuple[str, ...]
    read: Callable[[Mapping[str, Any], RowContext], Sample]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column -> other names under which it is recognized, the likeliest first."""
    nested: bool = False
    """Whether the required column contains a list of messages instead of text."""


def as_text(value: Any) -> str:
    """A cell as text, as a person would write it: null is empty, a list or an object is JSON.

    NaN, which tables use for a missing value, is empty too. A float32 has its own digits, a decimal all of its places.

    Raises:
        ValueError: The text contains half of a surrogate pair, which no tokenizer accepts, or bytes are not UTF-8.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    value = as_json_value(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair (an emoji cut in two?) at character {error.start}") from None
    return text


def as_json_value(value: Any) -> Any:
    """A value with every part of it that JSON has no form for as text, as a person would write it.

    Raises:
        ValueError: Bytes are not UTF-8 text.
    """
    if isinstance(value, Mapping):
        return {str(key): as_json_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json_value(part) for part in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("bytes that are not UTF-8 text, expected text") from None
    if isinstance(value, datetime):
        return value.isoformat(sep=" ").removesuffix(" 00:00:00")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)  # dates, times, decimals, durations, UUIDs

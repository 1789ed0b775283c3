"""A sample: what a row of any format becomes, a conversation or a plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lit_lora.data.findings import Notice
from lit_lora.tokenizer import Message

__all__ = ["Conversation", "Format", "RowContext", "Sample"]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order, and the functions that the assistant may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    context_only: frozenset[int] = frozenset()
    """Indices of assistant messages that the user does not want learned."""

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant messages to learn; empty ones would teach the model to say nothing."""
        indices = []
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant" or index in self.context_only:
                continue
            if (message.get("content") or "").strip() or message.get("tool_calls"):
                indices.append(index)
        return indices

    @property
    def has_answer(self) -> bool:
        """Whether there is an assistant message to learn."""
        return bool(self.answers)


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
    message_keys: Mapping[Literal["role", "content"], str] = field(default_factory=dict)
    """``role`` and ``content`` -> what the file's messages call them."""
    detected: bool = False
    """Whether the format was found by the columns, and the user has said nothing of them."""


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
    texts: tuple[str, ...] = ()
    """Columns that are parts of the prompt; if the user maps one, no other is added unasked."""

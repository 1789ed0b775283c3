"""Conversations: OpenAI's ``messages`` (role, content) and ShareGPT's ``conversations`` (from, value)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from lit_lora.config import did_you_mean
from lit_lora.data.findings import Notice
from lit_lora.data.sample import Conversation, Format, Sample, as_text
from lit_lora.tokenizer import Message

__all__ = ["MESSAGES", "SHAREGPT"]

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
# Fields that are passed to the chat template as they are.
_EXTRA_FIELDS = ("name", "tool_calls", "tool_call_id", "reasoning_content")


def _read(row: Mapping[str, Any], notice: Notice, column: str) -> Sample:
    items = _list(row[column], column, "messages")
    if not items:
        raise ValueError(f"{column}: expected at least one message, got none")
    messages = [_message(item, f"{column}[{index}]") for index, item in enumerate(items)]
    system = as_text(row.get("system"))
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = row.get("tools")
    return Conversation(messages, _list(tools, "tools", "function schemas") if tools else None)


def _list(value: Any, column: str, of: str) -> list[Any]:
    """A list, or one written as JSON text, as a cell of a CSV file has it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{column}: expected a list of {of}, got text that is not JSON") from None
    if not isinstance(value, list):
        raise ValueError(f"{column}: expected a list of {of}, got {json.dumps(value, default=str)[:60]}")
    return value


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or not ({"role", "from"} & item.keys()):
        shown = json.dumps(item, default=str)[:60]
        raise ValueError(f"{where}: expected an object with role and content (or from and value), got {shown}")
    name = str(item.get("role") or item.get("from"))
    role = _ROLES.get(name.lower())
    if role is None:
        raise ValueError(f"{where}: unknown role {name!r}{did_you_mean(name, _ROLES)}, known: {', '.join(_ROLES)}")
    content = item.get("content", item.get("value"))
    message: dict[str, Any] = {"role": role, "content": _content(content, where)}
    for field in _EXTRA_FIELDS:
        if item.get(field):
            message[field] = item[field]
    return message  # type: ignore[return-value]


def _content(content: Any, where: str) -> str:
    """The text of a message, which OpenAI also writes as a list of parts: ``[{"type": "text", "text": "Hi"}]``."""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) and "type" in part for part in content):
        return as_text(content)
    other_types = {part["type"] for part in content} - {"text"}
    if other_types:
        raise ValueError(f"{where}: content of type {', '.join(sorted(other_types))} is not supported, only text")
    return "".join(as_text(part.get("text")) for part in content)


MESSAGES = Format(
    required=("messages",),
    optional=("system", "tools"),
    aliases={"messages": ("conversation",)},
    nested=True,
    read=partial(_read, column="messages"),
)
SHAREGPT = Format(
    required=("conversations",),
    optional=("system", "tools"),
    nested=True,
    read=partial(_read, column="conversations"),
)

"""Conversations: OpenAI's ``messages`` (role, content) and ShareGPT's ``conversations`` (from, value)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from lit_lora.config import did_you_mean
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
_CARRIED = ("name", "tool_calls", "tool_call_id", "reasoning_content")


def _read(row: Mapping[str, Any], column: str) -> Sample:
    given = _list(row[column], column, "messages")
    if not given:
        raise ValueError(f"{column}: expected at least one message, got none")
    messages = [_message(item, f"{column}[{index}]") for index, item in enumerate(given)]
    system = as_text(row.get("system"))
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    tools = row.get("tools")
    return Conversation(messages, _list(tools, "tools", "function schemas") if tools else None)


def _list(given: Any, column: str, of: str) -> list[Any]:
    """A list, also one that stands in a cell as JSON text."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            raise ValueError(f"{column}: expected a list of {of}, got text that is not JSON") from None
    if not isinstance(given, list):
        raise ValueError(f"{column}: expected a list of {of}, got {json.dumps(given, default=str)[:60]}")
    return given


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, Mapping) or not ({"role", "from"} & item.keys()):
        shown = json.dumps(item, default=str)[:60]
        raise ValueError(f"{where}: expected an object with role and content (or from and value), got {shown}")
    given = str(item.get("role") or item.get("from"))
    role = _ROLES.get(given.lower())
    if role is None:
        raise ValueError(f"{where}: unknown role {given!r}{did_you_mean(given, _ROLES)}, known: {', '.join(_ROLES)}")
    message: dict[str, Any] = {"role": role, "content": _content(item.get("content", item.get("value")), where)}
    message.update({key: item[key] for key in _CARRIED if item.get(key)})
    return message  # type: ignore[return-value]


def _content(content: Any, where: str) -> str:
    """Text, or the text of OpenAI's list of content parts."""
    if isinstance(content, list) and all(isinstance(part, Mapping) and "type" in part for part in content):
        kinds = {part["type"] for part in content} - {"text"}
        if kinds:
            raise ValueError(f"{where}: content of type {', '.join(sorted(kinds))} is not supported, only text")
        return "".join(as_text(part.get("text")) for part in content)
    return as_text(content)


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

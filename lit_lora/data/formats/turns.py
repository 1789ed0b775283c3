"""One message of a conversation, as the tools of the field write it: its role, its text, whether it is learned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_lora.config import did_you_mean
from lit_lora.data.cells import as_text, is_empty
from lit_lora.data.findings import Notice
from lit_lora.data.guesses import MEDIA_COLUMNS, fold, mapping_hint
from lit_lora.errors import InputError
from lit_lora.tokenizer import REASONING_KEYS, Message

__all__ = [
    "ROLES",
    "Turn",
    "content_text",
    "is_learned",
    "is_message",
    "known_role",
    "parse_json",
    "read_turn",
    "role_name",
    "shown",
    "tool_list",
]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
}
"""Name in a file, in lower case -> role of the chat template."""

_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "parts", "text")
# A "text" beside a "from" may be that of a row.
_MESSAGE_KEYS = ("content", "value", "parts", "tool_calls")
_LEARN_KEYS = (
    "weight",
    "train",
    "loss",
    "loss_weight",
    "loss_scale",
    "train_on_turn",
    "trainable",
    "training",
    "output_with_loss",
)
# Of which true says that the message is not learned.
_MASK_KEYS = ("masked",)
# Mark parts of a message as learned or not.
_DETAIL_KEYS = ("train_detail", "training_detail")
# Passed to the chat template as they are.
_TEMPLATE_KEYS = ("name", "tool_call_id")
# Describe a message without being part of it.
_METADATA = {"id", "message_id", "index", "turn", "timestamp", "created_at", "date", "time", "lang", "language"}
_KNOWN = {*_ROLE_KEYS, *_CONTENT_KEYS, *REASONING_KEYS, *_LEARN_KEYS, *_MASK_KEYS, *_TEMPLATE_KEYS, *_METADATA} | {
    "tool_calls",
    "function_call",
}
_CALL_ROLES = ("function_call", "tool_call")
_TEXT_PARTS = ("text", "input_text", "output_text")
_PART_TEXT_KEYS = ("text", "value", "content")
# Folded names of what holds no text in a message or in a part of its content.
_MEDIA_KEYS = MEDIA_COLUMNS | {
    "imageurl", "videourl", "audiourl", "inputimage", "inputaudio", "file", "inlinedata", "filedata",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One message, and whether its text may be learned."""

    message: Message
    learned: bool


def is_message(value: Any) -> bool:
    """Whether a value is a message rather than a row or another object."""
    if not isinstance(value, Mapping):
        return False
    return any(key in value for key in _ROLE_KEYS) and any(key in value for key in _MESSAGE_KEYS)


def read_turn(item: Any, where: str, notice: Notice, roles: Mapping[str, str] | None = None) -> Turn:
    """A message of any known shape.

    Args:
        item: What the file has.
        where: Where in the row it is, such as ``messages[0]``.
        notice: Counts a warning about the row.
        roles: The user's own names of roles -> roles that are known.

    Raises:
        ValueError: It has no role or no content, or one that cannot be read.
    """
    if not isinstance(item, Mapping):
        raise ValueError(f"{where}: expected an object with role and content, got {shown(item)}")
    # What is null is absent: tables write every column in every row.
    item = {key: value for key, value in item.items() if value is not None and value == value}  # NaN is not itself
    role = _role(item, where, roles or {})
    if "role" in item and "from" in item and known_role(str(item["from"]).strip(), roles or {}) != role:
        notice("with a key of a message that is not used, 'from'")
    _refuse_what_no_turn_has(item, where)
    message: dict[str, Any] = {"role": role}

    calls = _calls(item, where)
    if calls and role != "assistant":
        raise ValueError(f"{where}: calls of functions in a message of role {role}, expected them in the assistant's")
    holds_data = role == "tool" or (role_name(item) or "").lower() in _CALL_ROLES
    if holds_data:
        item = {key: _data_as_text(value) if key in _CONTENT_KEYS else value for key, value in item.items()}
    message["content"] = _text_of(item, where, notice, optional=bool(calls))
    if role == "user" and not message["content"].strip():
        notice("with an empty message of the user")
    if calls:
        message["tool_calls"] = calls
    for key in _TEMPLATE_KEYS:
        if item.get(key):
            message[key] = as_text(item[key])
    reasoning = _first({key: value for key, value in item.items() if value}, REASONING_KEYS, where)
    if reasoning is not None:
        if role == "assistant":
            message["reasoning_content"] = as_text(item[reasoning])
        else:
            notice(f"with {reasoning} in a message of role {role}, which is not used")

    for key in sorted(item.keys() - _KNOWN):
        if not is_empty(item[key]):
            notice(f"with a key of a message that is not used, {key!r}")
    learned = is_learned(item, where)
    if learned is None:
        learned = role == "assistant"
    elif learned and role != "assistant":
        notice(f"with a message of role {role} to be learned, but only answers of the assistant are learned")
    return Turn(message, learned and role == "assistant")  # type: ignore[arg-type]


def _role(item: Mapping[str, Any], where: str, roles: Mapping[str, str]) -> str:
    key = next((key for key in _ROLE_KEYS if key in item), None)
    if key is None:
        keys = ", ".join(item) or "nothing"
        raise InputError(
            f"{where}: no role, found: {keys}; expected role and content, or from and value", hint=_keys_hint(item)
        )
    role = known_role(str(item[key]).strip(), roles)
    assert role is not None, "roles are checked before, all at once"
    return role


def _keys_hint(item: Mapping[str, Any]) -> str | None:
    """The mapping for a message that has its role under an unknown key; None if it cannot be guessed."""
    texts = [key for key, value in item.items() if isinstance(value, str) and key not in _METADATA]
    if len(texts) < 2:
        return None
    known = [key for key in _CONTENT_KEYS if key in texts]
    others = [key for key in texts if key not in known]
    # A speaker is one word, and usually comes before the text.
    role = next((key for key in others if len(item[key].split()) == 1), None)
    if role is None:
        return None
    keys = {"role": role}
    if not known:
        keys["content"] = next(key for key in texts if key != role)
    return f"say which is which, such as {mapping_hint(keys)}"


def role_name(item: Any) -> str | None:
    """The name of a message's role as the file has it; ``None`` if it has none."""
    if not isinstance(item, Mapping):
        return None
    name = item.get("role")
    if name is None:
        name = item.get("from")
    return None if name is None else str(name).strip()


def known_role(name: str, roles: Mapping[str, str]) -> str | None:
    """The chat template's role for a name in a file; ``None`` if there is none.

    Args:
        name: The name.
        roles: The user's own names -> names that are known.
    """
    return ROLES.get(roles.get(name, name).lower())


def _refuse_what_no_turn_has(item: Mapping[str, Any], where: str) -> None:
    """Check that a message has no pictures or sounds, and marks no part of its text.

    Raises:
        InputError: It has or does.
    """
    for key, value in item.items():
        if is_empty(value):
            continue
        if fold(key) in _MEDIA_KEYS:
            raise InputError(
                f"{where}: a message with {key}, expected only text: lit-lora finetunes text models",
                hint=f"leave out the rows that need more than text, or remove {key} to train on the text alone",
            )
        if key in _DETAIL_KEYS:
            raise InputError(
                f"{where}: {key} marks parts of a message, but only whole messages can be learned or not",
                hint=f"remove {key}, and write train: true or train: false into the message",
            )


def _data_as_text(value: Any) -> Any:
    """What a function takes or returns: an object or a list as JSON, unless it is a list of parts with the text."""
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and (kind in _TEXT_PARTS or fold(kind) in _MEDIA_KEYS):
            return value
    return as_text(value) if isinstance(value, list | Mapping) else value


def _text_of(item: Mapping[str, Any], where: str, notice: Notice, *, optional: bool) -> str:
    """The text of a message; empty if it may be missing, as beside a call."""
    keys = [key for key in _CONTENT_KEYS if key in item]
    if not keys:
        if optional:
            return ""
        others = [key for key in item if key not in _ROLE_KEYS]
        meant = did_you_mean(others[0], ("content", "value")) if others else ""
        raise ValueError(f"{where}: no content, found: {', '.join(others) or 'null'}{meant}")
    texts = {content_text(item[key], where, notice) for key in keys}
    if len(texts) > 1:
        raise ValueError(f"{where}: {' and '.join(keys)} say different things")
    return texts.pop()


def content_text(content: Any, where: str, notice: Notice) -> str:
    """A text, which may be written in parts: ``[{"type": "text", "text": "Hi"}]`` or ``{"parts": [{"text": "Hi"}]}``.

    Raises:
        ValueError: It is of another shape, or has parts that are no text.
    """
    if isinstance(content, str | int | float) and not isinstance(content, bool):
        return as_text(content)
    if isinstance(content, Mapping) and isinstance(content.get("parts"), list):
        for key in sorted(content.keys() - {"parts", "role"}):
            notice(f"with a key of a message that is not used, {key!r}")
        content = content["parts"]
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise ValueError(f"{where}: expected content to be text, got {shown(content)}")
    return "".join(_part(part, where, notice) for part in content)


def _part(part: Any, where: str, notice: Notice) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}: expected content to be text or a list of texts, got {shown(part)}")
    present = {key: value for key, value in part.items() if not (key not in _PART_TEXT_KEYS and is_empty(value))}
    kind = present.pop("type", "text")
    if kind not in _TEXT_PARTS:
        raise ValueError(f"{where}: content of type {kind}, expected only text: lit-lora finetunes text models")
    for key in present:
        if fold(key) in _MEDIA_KEYS:
            raise ValueError(f"{where}: content with {key}, expected only text: lit-lora finetunes text models")

    keys = [key for key in _PART_TEXT_KEYS if isinstance(present.get(key), str)]
    if not keys:
        raise ValueError(f"{where}: expected content to be text or a list of texts, got {shown(part)}")
    texts = {as_text(present[key]) for key in keys}
    if len(texts) > 1:
        raise ValueError(f"{where}: {' and '.join(keys)} of a part say different things")
    for key in sorted(present.keys() - set(keys) - _METADATA):
        if not is_empty(present[key]):
            notice(f"with a key of a content part that is not used, {key!r}")
    return texts.pop()


def is_learned(item: Mapping[str, Any], where: str) -> bool | None:
    """What a message, or a row, itself says of whether it is learned; ``None`` if nothing.

    Raises:
        ValueError: It is to be learned by a weight between, or two keys say different things.
    """
    said: dict[bool, str] = {}
    for key in (*_LEARN_KEYS, *_MASK_KEYS):
        if key not in item:
            continue
        value = item[key]
        if isinstance(value, str):
            value = {"true": 1, "false": 0, "yes": 1, "no": 0, "1": 1, "0": 0, "1.0": 1, "0.0": 0}.get(
                value.lower(), value
            )
        if value not in (0, 1):
            raise ValueError(f"{where}: {key} is {shown(value)}, expected 0 or 1 (no or yes)")
        learned = not value if key in _MASK_KEYS else bool(value)
        said[learned] = key
    if len(said) > 1:
        raise ValueError(f"{where}: {said[True]} and {said[False]} say different things")
    return next(iter(said), None)


def _calls(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The functions that the message calls, in OpenAI's form or its former one, ``function_call``."""
    calls = tool_list(item.get("tool_calls"), f"{where}: tool_calls", "calls")
    former = parse_json(item["function_call"]) if item.get("function_call") else None
    if isinstance(former, Mapping):
        calls.append({"type": "function", "function": dict(former)})
    elif former is not None:
        raise ValueError(f"{where}: function_call: expected an object with name and arguments, got {shown(former)}")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where}: tool_calls: expected a function with a name, got {shown(call)}")
    return calls


def tool_list(value: Any, where: str, of: str) -> list[dict[str, Any]]:
    """A list of objects, which may be written as JSON text; null and empty text are none.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, str):
        value = parse_json(value) if value.strip() else None
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [value]
    items = [parse_json(item) for item in value] if isinstance(value, list) else None
    if items is None or not all(isinstance(item, Mapping) for item in items):
        raise ValueError(f"{where}: expected a list of {of}, got {shown(value)}")
    return [dict(item) for item in items]


def parse_json(value: Any) -> Any:
    """What JSON text stands for; anything else, and text that is no JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def shown(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:59]}…"


def _first(item: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str | None:
    """The first of the keys that the item has.

    Raises:
        ValueError: It has another one, too, with another value.
    """
    present = [key for key in keys if key in item]
    if any(item[key] != item[present[0]] for key in present):
        raise ValueError(f"{where}: {' and '.join(present)} say different things")
    return present[0] if present else None

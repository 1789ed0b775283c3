"""What a chat template reads beside role and content, and messages in the form that it reads.

Templates differ: some write tool calls and some do not; some want the arguments as an object, some as JSON text; the
reasoning has three names. What a template reads is found by rendering probes, never by looking at its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from lit_lora.errors import InputError
from lit_lora.tokenizer.template import ChatTemplate, Message

__all__ = ["REASONING_KEYS", "Reads", "Tools", "fit_messages", "fit_tools", "what_it_reads"]

Tools = Sequence[Mapping[str, Any]]

# Words that no template contains.
_NAME, _KEY, _VALUE = "qzxjname", "qzxjkey", "qzxjvalue"
_ONCE_ENCODED = re.compile(rf'"{_KEY}"\s*:\s*"{_VALUE}"')
_TWICE_ENCODED = f'\\"{_KEY}'
_CALL_ID = "qzxj12345"  # nine characters, which some templates require
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class CallForm:
    """How a template wants a call: under ``function`` or not, its arguments as an object or as JSON text."""

    nested: bool
    as_object: bool


@dataclass(frozen=True)
class Reads:
    """What a template reads beside role and content."""

    calls: CallForm | None
    """None: it writes no calls."""
    reasoning: str | None
    """The key of the reasoning in a message; None: it writes none."""
    nested_tools: bool
    """Whether it writes tools described under ``function``."""
    flat_tools: bool
    """Whether it writes tools described without ``function``."""


@lru_cache(maxsize=16)
def what_it_reads(template: ChatTemplate) -> Reads:
    """What a template reads, found once."""
    return Reads(
        calls=_call_form(template),
        reasoning=_reasoning_key(template),
        nested_tools=_writes_tool(template, {"type": "function", "function": _tool()}),
        flat_tools=_writes_tool(template, _tool()),
    )


def _probe(template: ChatTemplate, answer: Mapping[str, Any] | None, tools: Tools | None = None) -> str:
    messages: list[Message] = [{"role": "user", "content": "x"}]
    if answer is not None:
        messages.append(cast(Message, {"role": "assistant", "content": "", **answer}))
    try:
        return template.render(messages, tools=tools)
    except InputError:
        return ""


def _call_form(template: ChatTemplate) -> CallForm | None:
    call = {"id": _CALL_ID, "type": "function", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
    usable = []
    for nested in (True, False):
        for as_object in (True, False):
            form = CallForm(nested, as_object)
            text = _probe(template, {"tool_calls": [_fit_call(call, form)]})
            if _NAME in text and _ONCE_ENCODED.search(text):
                return form
            if all(word in text for word in (_NAME, _KEY, _VALUE)) and _TWICE_ENCODED not in text:
                usable.append(form)  # in a notation of its own
    return usable[0] if usable else None


def _reasoning_key(template: ChatTemplate) -> str | None:
    for key in REASONING_KEYS:
        if _VALUE in _probe(template, {"content": "y", key: _VALUE}):
            return key
    return None


def _tool() -> dict[str, Any]:
    return {"name": _NAME, "description": _VALUE, "parameters": {"type": "object", "properties": {}}}


def _writes_tool(template: ChatTemplate, tool: Mapping[str, Any]) -> bool:
    return _NAME in _probe(template, None, [tool])


def fit_tools(tools: Tools | None, reads: Reads) -> Tools | None:
    """Descriptions of functions in the form that a template reads."""
    if not tools:
        return None
    fitted = []
    for tool in tools:
        is_nested = isinstance(tool.get("function"), Mapping)
        if is_nested and reads.flat_tools and not reads.nested_tools:
            tool = tool["function"]
        elif not is_nested and "name" in tool and reads.nested_tools and not reads.flat_tools:
            tool = {"type": "function", "function": tool}
        fitted.append(tool)
    return fitted


def fit_messages(messages: Sequence[Message], reads: Reads) -> list[Message]:
    """Messages with their calls and their reasoning in the form that a template reads.

    Calls for which it has no place become JSON text after the content, an object with ``name`` and ``arguments`` per
    line, as a message of the role ``function_call`` has it.
    """
    return [_fit_message(message, reads) for message in messages]


def _fit_message(message: Message, reads: Reads) -> Message:
    if not ("tool_calls" in message or "reasoning_content" in message):
        return message
    fitted: dict[str, Any] = dict(message)
    calls = fitted.pop("tool_calls", None) or []
    if calls and reads.calls is not None:
        fitted["tool_calls"] = [_fit_call(call, reads.calls) for call in calls]
    elif calls:
        lines = [fitted.get("content") or ""]
        for call in calls:
            lines.append(json.dumps(_fit_call(call, CallForm(nested=False, as_object=True)), ensure_ascii=False))
        fitted["content"] = "\n".join(line for line in lines if line)
    if reads.reasoning is not None and "reasoning_content" in fitted:
        fitted[reads.reasoning] = fitted.pop("reasoning_content")
    return cast(Message, fitted)


def _fit_call(call: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        function = call
    arguments = function.get("arguments", {})
    if form.as_object and isinstance(arguments, str):
        arguments = _object_in(arguments)
    elif not form.as_object and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    plain = {"name": function.get("name"), "arguments": arguments}
    if not form.nested:
        return plain
    identity = {"id": call["id"]} if "id" in call else {}
    return {**identity, "type": "function", "function": plain}


def _object_in(text: str) -> Any:
    """The object that a text has as JSON; the text itself if it has none."""
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        return text
    return value if isinstance(value, dict) else text

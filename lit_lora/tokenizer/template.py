"""Chat templates: the checkpoint's own Jinja template, rendered in a sandbox as Hugging Face renders it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypedDict

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lit_lora.errors import InputError

__all__ = ["DATE", "FOLD_HINT", "ChatTemplate", "Message", "fold_system"]


DATE = "2024-07-26"
"""What a template that asks for today's date gets, the day that Llama 3's writes without being told one.

It never changes: else answers would follow another prompt than training had, and rows could not be made again.
"""


class Message(TypedDict, total=False):
    """One message of a conversation, as in OpenAI's format."""

    role: str
    """``system``, ``user``, ``assistant``, ``tool``, or another role that the template supports."""
    content: str | None
    """The text; may be absent beside ``tool_calls``."""
    name: str
    """The name of the speaker or of the tool."""
    tool_calls: list[dict[str, Any]]
    """Calls in an assistant message."""
    tool_call_id: str
    """In a tool message, the call that it answers."""
    reasoning_content: str
    """Reasoning in an assistant message, for templates that support it."""


FOLD_HINT = (
    "data.system_role: fold, or --system-role fold, puts the system message into the first user message, if the "
    "template has no place for it"
)


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation with its system message at the beginning of the first user message, a blank line between.

    Where an answer follows the system message, that becomes a user message of its own.
    """
    folded = list(messages)
    texts = []
    while folded and folded[0]["role"] == "system":
        texts.append(folded.pop(0).get("content") or "")
    if not texts:
        return folded
    first: Message = {"role": "user", "content": ""}
    if folded and folded[0]["role"] == "user":
        first = folded.pop(0)
    texts.append(first.get("content") or "")
    return [{**first, "content": "\n\n".join(text for text in texts if text)}, *folded]


class ChatTemplate:
    """A compiled chat template.

    Args:
        text: The Jinja source.
        special_tokens: ``bos_token``, ``eos_token``, … as the template sees them.
        where: The file it comes from, for error messages.

    Raises:
        InputError: The text is not a valid template.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str], where: str) -> None:
        self.text = text
        self.special_tokens = dict(special_tokens)
        """The tokens that it can write by name."""
        self._where = where
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{where}: chat template, line {error.lineno}: {error.message}") from error

    @property
    def asks_for_date(self) -> bool:
        """Whether it can write the date."""
        return "strftime_now" in self.text

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """The conversation as text, with its special tokens.

        Args:
            messages: The conversation.
            tools: JSON schemas of the functions that the model may call.
            generation_prompt: End with the opening of the assistant's next answer.

        Raises:
            InputError: The template rejects the conversation, or fails.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self.special_tokens,
            )
        except RecursionError as error:
            raise InputError(f"{self._where}: the chat template never ends") from error
        except Exception as error:  # a template is a program that can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            hint = None
            if messages and messages[0]["role"] == "system":
                hint = FOLD_HINT
            raise InputError(
                f"{self._where}: the chat template rejects this conversation: {reason}", hint=hint
            ) from error

    @cached_property
    def generation_prompt(self) -> str:
        """What opens an answer after a plain question, such as ``<|im_start|>assistant``; may be empty."""
        question: list[Message] = [{"role": "user", "content": "x"}]
        try:
            plain = self.render(question)
            opened = self.render(question, generation_prompt=True)
        except InputError:
            return ""
        return opened.removeprefix(plain) if opened.startswith(plain) else ""

    @cached_property
    def after_answer(self) -> str:
        """What the template writes after an assistant's text, such as ``<|im_end|>``; may be empty."""
        answer = "qzxj"  # letters that no template contains
        chat: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        try:
            text = self.render(chat)
        except InputError:
            return ""
        return text.rpartition(answer)[2] if answer in text else ""


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``: tags of transformers around the assistant's text, which is kept."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The nodes between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """Jinja as Hugging Face configures it: sandboxed, immutable, with the same filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    # The library's own two give a template a class and an object whose names beginning with _ it may set.
    environment.globals["dict"] = _dict
    environment.globals["namespace"] = _Namespace
    return environment


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Variables that a loop of a template may set; none that begins with ``_``, as in transformers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        variables = dict(*args, **kwargs)
        for name in variables:
            _check_name(name)
        super().__init__(variables)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a variable of a namespace may not be called {name!r}")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.fromisoformat(DATE).strftime(form)

"""Chat templates: the checkpoint's own Jinja text, rendered in a sandbox as Hugging Face renders it."""

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

__all__ = ["ChatTemplate", "Message", "default_template"]


class Message(TypedDict, total=False):
    """One message of a conversation, as in OpenAI's format."""

    role: str
    """``system``, ``user``, ``assistant``, ``tool``, or what else the template knows."""
    content: str | None
    """The text; may be absent beside ``tool_calls``."""
    name: str
    """Of the speaker or of the tool."""
    tool_calls: list[dict[str, Any]]
    """Of an assistant message."""
    tool_call_id: str
    """Of a tool message: the call that it answers."""
    reasoning_content: str
    """Of an assistant message, where the template knows it."""


def default_template(*, starts_with_bos: bool) -> str:
    """The template for a checkpoint that has none: plain headings, and EOS after each assistant text.

    Args:
        starts_with_bos: Whether the tokenizer puts BOS before plain text, so that a conversation gets it too.
    """
    return (
        ("{{ bos_token }}" if starts_with_bos else "")
        + "{% for message in messages %}"
        + "{{ ('' if loop.first else '\\n\\n') + '### ' + message['role'] | capitalize + ':\\n' + message['content'] }}"
        + "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        + "{% endfor %}"
        + "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
    )


class ChatTemplate:
    """A compiled chat template.

    Args:
        text: The Jinja source.
        special_tokens: ``bos_token``, ``eos_token``, … as the template sees them.
        where: The file it came from, for the messages.

    Raises:
        InputError: The text is not a valid template.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, str], where: str) -> None:
        self.text = text
        self._special_tokens = dict(special_tokens)
        self._where = where
        try:
            self._template = _environment().from_string(text)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{where}: chat template, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """The conversation as text, special tokens written out.

        Args:
            messages: The conversation.
            tools: JSON schemas of the functions that the model may call.
            generation_prompt: End with what opens the assistant's next answer.

        Raises:
            InputError: The template refuses the conversation, or fails.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
        except RecursionError as error:
            raise InputError(f"{self._where}: chat template: it never ends") from error
        except Exception as error:  # a template is a program: anything can come out of it
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{self._where}: the chat template refuses this conversation: {reason}") from error

    @cached_property
    def generation_prompt(self) -> str:
        """What opens an answer after a plain question, such as ``<|im_start|>assistant``; may be empty."""
        question: list[Message] = [{"role": "user", "content": "x"}]
        try:
            without, opened = self.render(question), self.render(question, generation_prompt=True)
        except InputError:
            return ""
        return opened[len(without) :] if opened.startswith(without) else ""

    @cached_property
    def after_answer(self) -> str:
        """What the template writes after an assistant's text, such as ``<|im_end|>``; may be empty."""
        answer = "qzxj"
        chat: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        try:
            _, found, after = self.render(chat).rpartition(answer)
        except InputError:
            return ""
        return after if found else ""


class _Generation(jinja2.ext.Extension):
    """``{% generation %} … {% endgeneration %}``: marks the assistant's part for others; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Give the nodes between the two tags."""
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
    return environment


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
    return datetime.datetime.now().strftime(form)

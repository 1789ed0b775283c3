"""Conversations to ids, and which of them are learned.

The conversation is rendered by the checkpoint's template, as one text, and encoded once; the ids are those of
transformers' ``apply_chat_template``. What is learned (each assistant's text and the token that ends its turn) is
found in that text by place, never by searching for marker strings or ids, so a padding token that equals EOS, or a
text that quotes the template, changes nothing.

How a message's place is found: the template is rendered a second time with every content wrapped in numbered marks
made of a character that occurs nowhere else. If the text without the marks is the first text, the template treats
contents as opaque and the marks say where each one lies. A template that looks into contents (to cut out reasoning,
say) fails that check; then each assistant turn is placed by rendering the conversation up to it, which must be a
prefix of the whole. Where neither holds, there is no true answer, and an error says for which message.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lit_lora import log
from lit_lora.errors import InputError
from lit_lora.tokenizer.template import Message
from lit_lora.tokenizer.tokenizer import Tokenizer

__all__ = [
    "EncodedChat",
    "RenderedChat",
    "encode_chat",
    "encode_completion",
    "encode_prompt",
    "encode_rendered",
    "encode_text",
    "render_chat",
]

Tools = Sequence[Mapping[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedChat:
    """Ids, and for each whether the model learns to produce it."""

    ids: list[int]
    """Token ids."""
    loss_mask: list[bool]
    """As long as ``ids``."""


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools | None = None) -> EncodedChat:
    """Encode a whole conversation for training.

    Learned are, for every assistant message, all that the model has to produce after the generation prompt: its text
    up to and including the end-of-turn token. A template that writes no such token gets EOS at the very end, or the
    model would never learn to stop.

    Args:
        tokenizer: The tokenizer with its template.
        messages: The conversation; assistant messages may stand anywhere.
        tools: JSON schemas of functions, for templates that know them.

    Raises:
        InputError: The template refuses the conversation, or leaves out or rewrites a message.
    """
    return encode_rendered(tokenizer, [render_chat(tokenizer, messages, tools=tools)])[0]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, ready to encode together with others."""

    text: str
    literal: list[Span]
    """Where special-token strings are text."""
    learned: list[Span]
    """What the model has to produce, in order."""
    needs_eos: bool
    """The last answer is not closed by a special token, so EOS follows it."""


def render_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools | None = None) -> RenderedChat:
    """The first half of :func:`encode_chat`: all that can go wrong with one conversation goes wrong here.

    Raises:
        InputError: The template refuses the conversation, or leaves out or rewrites a message.
    """
    rendered = _Rendered(tokenizer, messages, tools, generation_prompt=False)
    turns = [rendered.turn(index) for index, message in enumerate(messages) if message["role"] == "assistant"]
    is_open = bool(turns) and messages[-1]["role"] == "assistant" and not turns[-1].closed
    return RenderedChat(rendered.text, rendered.literal, [(turn.start, turn.end) for turn in turns], is_open)


def encode_rendered(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> list[EncodedChat]:
    """The second half of :func:`encode_chat`, for many conversations at once on all cores."""
    encodings = tokenizer.encode_many_with_offsets([chat.text for chat in chats], [chat.literal for chat in chats])
    encoded = []
    for chat, (ids, offsets) in zip(chats, encodings, strict=True):
        loss_mask = [False] * len(ids)
        for start, end in chat.learned:
            first = bisect_right(offsets, start, key=lambda place: place[1])
            last = bisect_left(offsets, end, first, key=lambda place: place[0])
            loss_mask[first:last] = [True] * (last - first)
        if chat.needs_eos and tokenizer.eos_id is not None:
            ids, loss_mask = [*ids, tokenizer.eos_id], [*loss_mask, True]
        encoded.append(EncodedChat(ids, loss_mask))
    return encoded


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools | None = None) -> list[int]:
    """Encode a conversation for generation: the whole history, and what opens the assistant's next answer.

    Raises:
        InputError: The template refuses the conversation, or leaves out a system, user or tool message.
    """
    rendered = _Rendered(tokenizer, messages, tools, generation_prompt=True)
    return tokenizer.encode_with_offsets(rendered.text, literal=rendered.literal)[0]


def encode_text(tokenizer: Tokenizer, text: str, *, end: bool = False) -> list[int]:
    """Encode plain text: BOS in front exactly when the checkpoint's tokenizer does so.

    Args:
        tokenizer: The tokenizer.
        text: Plain text; special-token strings in it are text.
        end: Put EOS after it, as for a document that is complete.
    """
    ids = [tokenizer.bos_id] if tokenizer.starts_with_bos and tokenizer.bos_id is not None else []
    ids += tokenizer.encode(text)
    return [*ids, tokenizer.eos_id] if end and tokenizer.eos_id is not None else ids


def encode_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> EncodedChat:
    """Encode a prompt and its completion as plain text without a template; the completion and EOS are learned.

    The ids begin with exactly those of ``encode_text(tokenizer, prompt)``, what generation starts from. Where the
    last word of the prompt and the first of the completion would melt into one token, the two are encoded apart.
    """
    start = encode_text(tokenizer, prompt)
    ids = encode_text(tokenizer, prompt + completion, end=True)
    if ids[: len(start)] != start:
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = [*start, *_continuation(tokenizer, completion), *end]
    return EncodedChat(ids, [position >= len(start) for position in range(len(ids))])


def _continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of ``text`` in the middle of a text: without the blank that some tokenizers put at the start."""
    before, both = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    return both[len(before) :] if both[: len(before)] == before else tokenizer.encode(text)


@dataclass(frozen=True)
class _Turn:
    """What the model has to produce of one assistant message: ``text[start:end]``."""

    start: int
    end: int
    closed: bool  # whether a special token ends it


class _Rendered:
    """One rendering of a conversation, and where each message lies in it."""

    def __init__(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None, *, generation_prompt: bool
    ) -> None:
        _check(messages)
        if not tokenizer.has_own_template:
            _note_default_template(tokenizer.where)
        self._tokenizer = tokenizer
        self._messages = messages
        self._tools = tools
        self.text = self._render(messages, generation_prompt)
        self._places = self._place_contents(generation_prompt)
        for index, message in enumerate(messages):
            # A prompt may leave out earlier reasoning of the assistant, as the template's author wanted.
            if message["role"] in ("system", "user") and self._is_left_out(index):
                raise self._lost(index)
        self.literal = self._literal_spans()

    def turn(self, index: int) -> _Turn:
        """Where assistant message ``index`` begins, ends, and whether a special token ends it.

        Raises:
            InputError: The template leaves out or rewrites its text.
        """
        template = self._tokenizer.template
        start, end = self._content(index)
        before, after = template.generation_prompt, template.after_answer
        if not before or not self.text.endswith(before, 0, start):
            opened = self._opened(index)
            start = opened if opened is not None and opened < start else start
        region = after if after and self.text.startswith(after, end) else self._after(index, end)
        specials = list(self._tokenizer.special_pattern.finditer(region))
        if specials:
            return _Turn(start, end + specials[-1].end(), closed=True)
        is_last = index == len(self._messages) - 1  # EOS will follow the very end of the text
        return _Turn(start, len(self.text) if is_last else end + len(region.rstrip()), closed=False)

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        return self._tokenizer.template.render(messages, tools=self._tools, generation_prompt=generation_prompt)

    def _place_contents(self, generation_prompt: bool) -> dict[int, list[Span]] | None:
        """Where each content lies, by rendering it between marks; nothing if the marks change the text."""
        taken = self.text + "".join(message.get("content") or "" for message in self._messages)
        mark = next(character for code in range(0xE000, 0xF900) if (character := chr(code)) not in taken)
        try:
            marked = self._render(
                [_mark(message, f"{mark}{i}{mark}") for i, message in enumerate(self._messages)], generation_prompt
            )
        except InputError:
            return None
        pieces = re.split(f"{mark}([0-9]+){mark}", marked)
        if "".join(pieces[::2]) != self.text:
            return None
        positions: dict[int, list[int]] = {}
        position = 0
        for piece, index in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            positions.setdefault(int(index), []).append(position)
        # An odd number of marks: the template cut the content, so they say nothing of where it lies.
        return {
            index: list(zip(found[::2], found[1::2], strict=True)) if len(found) % 2 == 0 else []
            for index, found in positions.items()
        }

    def _is_left_out(self, index: int) -> bool:
        """Whether nothing of a message's content is in the text."""
        content = _core(self._messages[index])
        if self._places is not None and index not in self._places:
            return bool(content)
        return content not in self.text and not (self._places or {}).get(index)

    def _content(self, index: int) -> Span:
        """Where the text of assistant message ``index`` lies."""
        content = _core(self._messages[index])
        places = (self._places or {}).get(index, [])
        if len(places) == 1 and self.text[slice(*places[0])] == content:
            return places[0]
        if self._is_left_out(index):
            raise self._lost(index)
        start, end = self._opened(index), self._turn_end(index)
        found = -1 if start is None or end is None else self.text.find(content, start, end)
        if found < 0:
            raise self._lost(index)
        return found, found + len(content)

    def _opened(self, index: int) -> int | None:
        """Where the answer of assistant message ``index`` begins, if what comes before is a prefix of the text."""
        return self._prefix(self._messages[:index], generation_prompt=True)

    def _turn_end(self, index: int) -> int | None:
        """Where the rendering of message ``index`` ends, if the conversation up to it is a prefix of the text."""
        messages = self._messages[: index + 1]
        return len(self.text) if len(messages) == len(self._messages) else self._prefix(messages)

    def _prefix(self, messages: Sequence[Message], generation_prompt: bool = False) -> int | None:
        try:
            text = self._render(messages, generation_prompt)
        except InputError:
            return None
        return len(text) if self.text.startswith(text) else None

    def _after(self, index: int, end: int) -> str:
        """What follows the text of assistant message ``index`` and still belongs to its turn."""
        turn_end = self._turn_end(index)
        if turn_end is not None:
            return self.text[end:turn_end]
        # The template writes this turn differently inside the conversation: only its usual last token can be its end.
        starts = [start for spans in (self._places or {}).values() for start, _ in spans if start > end]
        region = self.text[end : min(starts, default=len(self.text))]
        last = self._tokenizer.special_pattern.findall(self._tokenizer.template.after_answer)[-1:]
        return region[: region.find(last[0]) + len(last[0])] if last and last[0] in region else ""

    def _literal_spans(self) -> list[Span]:
        """Spans in which special-token strings are what somebody wrote, not what the template wrote."""
        spans: list[Span] = []
        pattern = self._tokenizer.special_pattern
        for index, message in enumerate(self._messages):
            others = {key: value for key, value in message.items() if key not in ("role", "content")}
            if others and pattern.search(repr(others)):
                raise InputError(f"{self._name(index)}: a field besides content holds a special token's text")
            if pattern.search(message.get("content") or ""):
                places = (self._places or {}).get(index, [])
                if not places and not self._is_left_out(index):
                    raise InputError(
                        f"{self._name(index)} holds a special token's text, which this chat template takes apart",
                        hint="remove that text from the message",
                    )
                spans += places
        return spans

    def _lost(self, index: int) -> InputError:
        return InputError(
            f"{self._name(index)}: the chat template leaves out or rewrites its content",
            hint="leave this message out, or use a checkpoint whose template keeps it",
        )

    def _name(self, index: int) -> str:
        return f"message {index + 1} ({self._messages[index]['role']})"


def _core(message: Message) -> str:
    return (message.get("content") or "").strip()


def _mark(message: Message, mark: str) -> Message:
    """A copy whose content, apart from blanks around it, stands between two marks."""
    content = message.get("content") or ""
    core = content.strip()
    if not core:
        return message
    start = content.index(core)
    marked = f"{content[:start]}{mark}{core}{mark}{content[start + len(core) :]}"
    return {**message, "content": marked}


def _check(messages: Sequence[Message]) -> None:
    """Raise InputError for what is not a conversation."""
    if not messages:
        raise InputError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index + 1}: expected an object with 'role' and 'content'")
        if not isinstance(message.get("content"), str | None):
            kind = type(message["content"]).__name__
            raise InputError(f"message {index + 1} ({message['role']}): expected content to be text, got {kind}")


@lru_cache
def _note_default_template(where: str) -> None:
    log.note(
        f"{where} has no chat template; a plain one is used ('### User:', '### Assistant:') and saved with results"
    )

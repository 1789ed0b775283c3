"""Conversations to ids, and which of the ids are targets.

The conversation is rendered by the checkpoint's template, as one text, and encoded once; the ids are those of
transformers' ``apply_chat_template``. The targets (each assistant message's text and the token that ends its turn) are
located in that text by position, never by searching for marker strings or ids, so a padding token that equals EOS, or
a message that quotes the template, changes nothing.

How a message is located: the template is rendered a second time with every content wrapped in numbered marks made of a
character that occurs nowhere else. If removing the marks gives the first text, the template treats contents as opaque,
and the marks show where each one is. A template that inspects contents (to cut out reasoning, say) fails that check;
then each assistant turn is located by rendering the conversation up to it, which must be a prefix of the whole. If that
fails too, the targets cannot be known, and an error names the message.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from lit_lora import log
from lit_lora.errors import InputError
from lit_lora.tokenizer.fields import REASONING_KEYS, Tools, fit_messages, fit_tools, what_it_reads
from lit_lora.tokenizer.template import DATE, FOLD_HINT, Message
from lit_lora.tokenizer.tokenizer import Offsets, Tokenizer

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

Span = tuple[int, int]
_OPENING = 200  # characters before an answer in which a special token is searched
_GUARDS = ("\n", "a", ":", "0")
_TEXT_FIELDS = ("name", "tool_call_id", *REASONING_KEYS)
_FIELDS = ("tool_calls", *_TEXT_FIELDS)
_TOOLS = -1  # stands for the index of a message, for what belongs to none


@dataclass(frozen=True)
class EncodedChat:
    """Token ids, and for each whether it is a target."""

    ids: list[int]
    loss_mask: list[bool]
    """As long as ``ids``."""


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools | None = None) -> EncodedChat:
    """Encode a whole conversation for training.

    The targets of an assistant message are all that the model has to generate after the generation prompt: the text
    up to and including the end-of-turn token. If the template writes no such token, EOS is appended to the last
    answer, or the model would never learn to stop.

    Args:
        tokenizer: The tokenizer with its template.
        messages: The conversation; assistant messages may be anywhere in it.
        tools: JSON schemas of functions, for templates that support them.

    Raises:
        InputError: The template rejects the conversation, or omits or rewrites a message.
    """
    return encode_rendered(tokenizer, [render_chat(tokenizer, messages, tools=tools)])[0]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, ready to encode together with others."""

    text: str
    literal: list[Span]
    """Where special-token strings are plain text, because a user wrote them."""
    targets: list[Span]
    """What the model has to generate, in order."""
    needs_eos: bool
    """Whether EOS has to be appended, because no special token ends the last answer."""
    cuts: list[int]
    """Where the prompt of each assistant message ends, whether the message is learned or not."""
    unwritten: frozenset[str] = frozenset()
    """Which of ``tools``, ``tool_calls``, ``reasoning``, ``name`` and ``tool_call_id`` the template does not write as
    such, in some message at least; calls are then written as JSON text."""


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Tools | None = None,
    learned: Collection[int] | None = None,
) -> RenderedChat:
    """The first half of :func:`encode_chat`, which finds every problem that a conversation can have.

    Args:
        tokenizer: The tokenizer with its template.
        messages: The conversation.
        tools: JSON schemas of functions.
        learned: Indices of the assistant messages that are targets; all of them if omitted.

    Raises:
        InputError: The template rejects the conversation, or omits or rewrites a message.
    """
    rendered = _Rendered(tokenizer, messages, tools, generation_prompt=False)
    if learned is None:
        learned = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    last = len(messages) - 1
    turns = {index: rendered.turn(index) for index in sorted(learned)}
    needs_eos = last in turns and not turns[last].closed
    if needs_eos and tokenizer.eos_id is None:
        _warn_of_no_end(tokenizer.where)
    return RenderedChat(
        text=rendered.text,
        literal=rendered.literal,
        targets=[(turn.start, turn.end) for turn in turns.values()],
        needs_eos=needs_eos,
        cuts=rendered.cuts(),
        unwritten=rendered.unwritten(learned),
    )


def encode_rendered(tokenizer: Tokenizer, chats: Sequence[RenderedChat]) -> list[EncodedChat]:
    """The second half of :func:`encode_chat`, for many conversations in parallel on all cores."""
    encodings = tokenizer.encode_many_with_offsets([chat.text for chat in chats], [chat.literal for chat in chats])
    encoded = []
    openings: dict[str, list[int]] = {}
    for chat, (ids, offsets) in zip(chats, encodings, strict=True):
        if not all(_is_token_end(tokenizer, chat, cut, ids, offsets, openings) for cut in chat.cuts):
            ids, offsets = _encode_in_parts(tokenizer, chat.text, chat.literal, chat.cuts)
        loss_mask = [False] * len(ids)
        for start, end in chat.targets:
            # Offsets are sorted: from the first token that ends after `start` to the last that begins before `end`.
            first = bisect_right(offsets, start, key=lambda offset: offset[1])
            stop = bisect_left(offsets, end, first, key=lambda offset: offset[0])
            loss_mask[first:stop] = [True] * (stop - first)
        if chat.needs_eos and tokenizer.eos_id is not None:
            ids = [*ids, tokenizer.eos_id]
            loss_mask.append(True)
        encoded.append(EncodedChat(ids, loss_mask))
    return encoded


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools | None = None) -> list[int]:
    """Encode a conversation for generation: the whole history, and the opening of the assistant's next answer.

    Raises:
        InputError: The template rejects the conversation, or omits a system or user message.
    """
    rendered = _Rendered(tokenizer, messages, tools, generation_prompt=True)
    return _encode_in_parts(tokenizer, rendered.text, rendered.literal, rendered.cuts())[0]


def _is_token_end(
    tokenizer: Tokenizer,
    chat: RenderedChat,
    cut: int,
    ids: list[int],
    offsets: Offsets,
    openings: dict[str, list[int]],
) -> bool:
    """Whether ``ids``, those of the whole chat, begin with what the text up to ``cut`` alone is encoded to.

    Args:
        tokenizer: The tokenizer.
        chat: The chat.
        cut: A place in its text.
        ids: The ids of the text.
        offsets: Their spans.
        openings: What opens an answer -> its ids; filled by this function.
    """
    stop = bisect_right(offsets, cut, key=lambda offset: offset[1])
    # What a special token separates is encoded independently, so that only the text after the last one matters. It is
    # nearly always the same: "<|im_start|>assistant\n".
    specials = list(tokenizer.special_pattern.finditer(chat.text, max(0, cut - _OPENING), cut))
    if not specials or chat.literal:
        return tokenizer.encode_with_offsets(chat.text[:cut], literal=_within(chat.literal, 0, cut))[0] == ids[:stop]
    opening = chat.text[specials[-1].start() : cut]
    if opening not in openings:
        openings[opening] = tokenizer.encode(opening, special=True)
    expected = openings[opening]
    return ids[max(0, stop - len(expected)) : stop] == expected


def _encode_in_parts(
    tokenizer: Tokenizer, text: str, literal: Sequence[Span], cuts: Sequence[int]
) -> tuple[list[int], Offsets]:
    """Encode ``text`` such that no token reaches over a cut, as generation begins there.

    Only where the text before and after a cut would merge are the two encoded separately. Whether they would is asked
    of the text up to the next cut, so that the ids of a text begin with those of the text up to any of its cuts.
    """
    ids: list[int] = []
    offsets: Offsets = []
    start = 0
    for cut, next_cut in pairwise([*cuts, len(text)]):
        before = _encode_part(tokenizer, text, literal, start, cut)
        both = _encode_part(tokenizer, text, literal, start, next_cut)
        if both[0][: len(before[0])] != before[0]:
            ids += before[0]
            offsets += before[1]
            start = cut
    rest = _encode_part(tokenizer, text, literal, start, len(text))
    return ids + rest[0], offsets + rest[1]


def _encode_part(
    tokenizer: Tokenizer, text: str, literal: Sequence[Span], start: int, end: int
) -> tuple[list[int], Offsets]:
    """Ids of ``text[start:end]`` as a continuation of what is before it, and their spans in ``text``."""
    spans = _within(literal, start, end)
    if start == 0:
        return tokenizer.encode_with_offsets(text[:end], literal=spans)

    # Some tokenizers add a space at the start of a text. After a character that does not merge with it, they do not.
    for guard in _GUARDS:
        guard_ids = tokenizer.encode(guard)
        shifted = [(first + len(guard), last + len(guard)) for first, last in spans]
        ids, offsets = tokenizer.encode_with_offsets(guard + text[start:end], literal=shifted)
        is_separate = all(first >= len(guard) for first, _ in offsets[len(guard_ids) : len(guard_ids) + 1])
        if is_separate and ids[: len(guard_ids)] == guard_ids:
            break
    else:
        guard_ids = []
        guard = ""
        ids, offsets = tokenizer.encode_with_offsets(text[start:end], literal=spans)
    shift = start - len(guard)
    return ids[len(guard_ids) :], [(first + shift, last + shift) for first, last in offsets[len(guard_ids) :]]


def _within(spans: Sequence[Span], start: int, end: int) -> list[Span]:
    """The parts of ``spans`` between two places, counted from the first."""
    parts = []
    for first, last in spans:
        if first < end and last > start:
            parts.append((max(first, start) - start, min(last, end) - start))
    return parts


def encode_text(tokenizer: Tokenizer, text: str, *, end: bool = False, special: bool = False) -> list[int]:
    """Encode plain text, with BOS in front exactly if the checkpoint's tokenizer puts it there.

    Args:
        tokenizer: The tokenizer.
        text: Plain text.
        end: Append EOS, as for a complete document.
        special: Read special-token strings as special tokens instead of text. Then a BOS or EOS of the text's own is
            not doubled.
    """
    ids = tokenizer.encode(text, special=special)
    has_bos = special and ids[:1] == [tokenizer.bos_id]
    if tokenizer.starts_with_bos and tokenizer.bos_id is not None and not has_bos:
        ids = [tokenizer.bos_id, *ids]
    has_eos = special and ids[-1:] == [tokenizer.eos_id]
    if end and tokenizer.eos_id is not None and not has_eos:
        ids = [*ids, tokenizer.eos_id]
    return ids


def encode_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> EncodedChat:
    """Encode a prompt and its completion as plain text, without a template; the targets are the completion and EOS.

    The ids begin with exactly those of ``encode_text(tokenizer, prompt)``, from which generation starts. If the end of
    the prompt and the start of the completion would merge into one token, the two are encoded separately.
    """
    start = encode_text(tokenizer, prompt)
    ids = encode_text(tokenizer, prompt + completion, end=True)
    if ids[: len(start)] != start:
        text = prompt + completion
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        ids = [*start, *_encode_part(tokenizer, text, [(0, len(text))], len(prompt), len(text))[0], *end]
    return EncodedChat(ids, [position >= len(start) for position in range(len(ids))])


@dataclass(frozen=True)
class _Turn:
    """The targets of one assistant message: ``text[start:end]``."""

    start: int
    end: int
    closed: bool  # whether a special token ends it


class _Rendered:
    """A rendered conversation, and where each message is in it."""

    def __init__(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools | None, *, generation_prompt: bool
    ) -> None:
        _check(messages)
        if not tokenizer.has_own_template:
            _note_default_template(tokenizer.where)
        self._tokenizer = tokenizer
        self._template = tokenizer.template_for(tools)
        if self._template.asks_for_date:
            _note_date(tokenizer.where)
        self._reads = what_it_reads(self._template)
        self._original_messages = messages
        messages = fit_messages(messages, self._reads)
        self._messages = messages
        self._tools = fit_tools(tools, self._reads)
        self.text = self._render(messages, generation_prompt)
        self._generation_prompt = generation_prompt
        self._field_marks: dict[tuple[int, str], list[int]] = {}
        self._places = self._place(generation_prompt)
        self._turn_starts: dict[int, int | None] = {}
        for index, message in enumerate(messages):
            # Assistant messages may be missing: many templates drop the reasoning of earlier turns.
            if message["role"] in ("system", "user", "tool") and self._is_omitted(index):
                raise self._lost(index)
        self.literal = self._literal_spans()

    def cuts(self) -> list[int]:
        """Where the prompt of each assistant message ends, as far as it is known."""
        cuts = []
        for index, message in enumerate(self._messages):
            if message["role"] == "assistant":
                start = self._turn_start(index)
                if start is not None:
                    cuts.append(start)
        return sorted(set(cuts))

    def turn(self, index: int) -> _Turn:
        """Where the turn of assistant message ``index`` begins and ends, and whether a special token ends it.

        Raises:
            InputError: The template omits or rewrites its text.
        """
        template = self._template
        start, end = self._content_span(index)

        # If something stands between the generation prompt and the text, such as "<think>", the model generates it.
        turn_start = self._turn_start(index)
        if turn_start is not None:
            start = min(start, turn_start)

        if template.after_answer and self.text.startswith(template.after_answer, end):
            rest = template.after_answer
        else:
            rest = self._rest_of_turn(index, end)
        specials = list(self._tokenizer.special_pattern.finditer(rest))
        if specials:
            return _Turn(start, end + specials[-1].end(), closed=True)
        if index == len(self._messages) - 1:
            return _Turn(start, len(self.text), closed=False)  # EOS will follow the very end of the text
        return _Turn(start, end + len(rest.rstrip()), closed=False)

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        return self._template.render(messages, tools=self._tools, generation_prompt=generation_prompt)

    def _place(self, generation_prompt: bool) -> dict[int, list[Span]] | None:
        """Spans of each message's content and of other fields, found by rendering them between marks.

        None if the marks change the text. A message that the template omits is missing; one whose content it cuts has
        no spans. The number of a content is that of its message; ``_field_marks`` has the numbers of other fields.
        """
        used = self.text + json.dumps([self._messages, self._tools], ensure_ascii=False, default=str)
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)  # private-use characters
        contents = [_mark(message, f"{mark}{index}{mark}") for index, message in enumerate(self._messages)]
        messages, tools = self._mark_fields(contents, mark)
        places = self._places_between(mark, messages, tools, generation_prompt)
        if places is None and self._field_marks:
            # The template compares a name, perhaps.
            self._field_marks = {}
            places = self._places_between(mark, contents, self._tools, generation_prompt)
        return places

    def _mark_fields(self, messages: Sequence[Message], mark: str) -> tuple[list[Message], Tools | None]:
        """Copies of the messages and of the tools with marks around some of their strings.

        These are the strings that show whether a field was written, and those with a special token's text.
        """
        first_number = len(messages)
        count = 0

        def marked(value: Any, owner: tuple[int, str], key: str = "") -> Any:
            nonlocal count
            if isinstance(value, Mapping):
                return {name: marked(item, owner, name) for name, item in value.items()}
            if isinstance(value, list):
                return [marked(item, owner) for item in value]
            shows = key == "name" or owner[1] in _TEXT_FIELDS
            if not isinstance(value, str) or not value.strip():
                return value
            if not shows and not self._tokenizer.special_pattern.search(value):
                return value
            number = first_number + count
            count += 1
            self._field_marks.setdefault(owner, []).append(number)
            return _between(value, f"{mark}{number}{mark}")

        copies: list[Message] = []
        for index, message in enumerate(messages):
            fields = {field: marked(message[field], (index, field)) for field in _FIELDS if field in message}  # type: ignore[literal-required]
            copies.append({**message, **fields})  # type: ignore[typeddict-item]
        return copies, marked(self._tools, (_TOOLS, "tools"))

    def _places_between(
        self, mark: str, messages: Sequence[Message], tools: Tools | None, generation_prompt: bool
    ) -> dict[int, list[Span]] | None:
        try:
            marked = self._template.render(messages, tools=tools, generation_prompt=generation_prompt)
        except InputError:
            return None

        # re.split alternates between the text and the numbers in the marks: text, number, text, number, …, text.
        pieces = re.split(f"{mark}([0-9]+){mark}", marked)
        texts = pieces[::2]
        numbers = pieces[1::2]
        if "".join(texts) != self.text:
            return None

        positions: dict[int, list[int]] = {}
        position = 0
        for text, number in zip(texts, numbers, strict=False):
            position += len(text)
            positions.setdefault(int(number), []).append(position)

        spans: dict[int, list[Span]] = {}
        for index, marks in positions.items():
            # Marks come in pairs, around the content. Of a content that the template cut, one may be missing.
            is_whole = len(marks) % 2 == 0
            spans[index] = list(zip(marks[::2], marks[1::2], strict=True)) if is_whole else []
        return spans

    def unwritten(self, learned: Collection[int]) -> frozenset[str]:
        """Which fields the template does not write.

        Raises:
            InputError: It omits a call that is to be learned.
        """
        names = set()
        if self._tools and not self._writes(_TOOLS, "tools"):
            names.add("tools")
        for index, message in enumerate(self._messages):
            for field in _FIELDS:
                if field in message and not self._writes(index, field):
                    if field == "tool_calls" and index in learned:
                        raise InputError(
                            f"{self._name(index)}: the chat template omits its calls of functions",
                            hint="remove them, or choose another model.chat_template",
                        )
                    names.add("reasoning" if field in REASONING_KEYS else field)
            if "tool_calls" in self._original_messages[index] and "tool_calls" not in message:
                names.add("tool_calls")
        return frozenset(names)

    def _writes(self, index: int, field: str) -> bool:
        """Whether the text would differ without a field of a message, or without the tools."""
        numbers = self._field_marks.get((index, field))
        if numbers and self._places is not None:
            return any(number in self._places for number in numbers)
        messages = list(self._messages)
        tools = self._tools
        if index == _TOOLS:
            tools = None
        else:
            messages[index] = {key: value for key, value in messages[index].items() if key != field}  # type: ignore[call-overload]
        try:
            return self._template.render(messages, tools=tools, generation_prompt=self._generation_prompt) != self.text
        except InputError:
            return True

    def _spans(self, index: int) -> list[Span]:
        """Where the content of message ``index`` is, as far as the marks show it."""
        return (self._places or {}).get(index, [])

    def _is_omitted(self, index: int) -> bool:
        """Whether nothing of a message's content is in the text."""
        content = _stripped_content(self._messages[index])
        if self._places is not None and index not in self._places:
            return bool(content)
        return content not in self.text and not self._spans(index)

    def _content_span(self, index: int) -> Span:
        """Where the content of assistant message ``index`` is.

        Raises:
            InputError: The template omits or rewrites it.
        """
        content = _stripped_content(self._messages[index])
        spans = self._spans(index)
        if len(spans) == 1:
            start, end = spans[0]
            if self.text[start:end] == content:
                return start, end
        if self._is_omitted(index):
            raise self._lost(index)

        # The marks do not help: search for the content, but only within this turn.
        turn_start = self._turn_start(index)
        turn_end = self._turn_end(index)
        if turn_start is None or turn_end is None:
            raise self._lost(index)
        start = self.text.find(content, turn_start, turn_end)
        if start < 0:
            raise self._lost(index)
        return start, start + len(content)

    def _turn_start(self, index: int) -> int | None:
        """Where the answer of assistant message ``index`` begins; None if the text before it is no rendering."""
        if index not in self._turn_starts:
            self._turn_starts[index] = self._find_turn_start(index)
        return self._turn_starts[index]

    def _find_turn_start(self, index: int) -> int | None:
        # Nearly always the generation prompt stands right before the content, which saves rendering it once more.
        opening = self._template.generation_prompt
        spans = self._spans(index)
        has_reasoning = any(key in self._messages[index] for key in REASONING_KEYS)
        if len(spans) == 1 and not has_reasoning and opening.strip() and self.text.endswith(opening, 0, spans[0][0]):
            return spans[0][0]
        return self._prefix_length(self._messages[:index], generation_prompt=True)

    def _turn_end(self, index: int) -> int | None:
        """Where the turn of message ``index`` ends; None if the text up to there is no rendering."""
        if index == len(self._messages) - 1:
            return len(self.text)
        return self._prefix_length(self._messages[: index + 1])

    def _prefix_length(self, messages: Sequence[Message], generation_prompt: bool = False) -> int | None:
        """The length of these messages' rendering if it is a prefix of the text, else None."""
        try:
            text = self._render(messages, generation_prompt)
        except InputError:
            return None
        return len(text) if self.text.startswith(text) else None

    def _rest_of_turn(self, index: int, end: int) -> str:
        """What follows the content of assistant message ``index``, which ends at ``end``, and belongs to its turn."""
        turn_end = self._turn_end(index)
        if turn_end is not None:
            return self.text[end:turn_end]

        # The template writes this turn differently within the conversation than at its end. Then the turn ends with
        # the special token that usually ends an answer, if it comes before the next message.
        next_message = len(self.text)
        for spans in (self._places or {}).values():
            for start, _ in spans:
                if start > end:
                    next_message = min(next_message, start)
        end_tokens = self._tokenizer.special_pattern.findall(self._template.after_answer)
        if not end_tokens:
            return ""
        position = self.text.find(end_tokens[-1], end, next_message)
        return self.text[end : position + len(end_tokens[-1])] if position >= 0 else ""

    def _literal_spans(self) -> list[Span]:
        """Spans whose special-token strings were written by a user, not by the template.

        Raises:
            InputError: Such a string is in a message that cannot be located.
        """
        literal: list[Span] = []
        pattern = self._tokenizer.special_pattern
        for index, message in enumerate(self._messages):
            if pattern.search(message["role"]):
                raise InputError(f"{self._name(index)}: a role with a special token's text")
            for field in _FIELDS:
                if field in message:
                    literal += self._literal_in_field(message[field], (index, field), self._name(index))  # type: ignore[literal-required]
            if not pattern.search(message.get("content") or ""):
                continue
            spans = self._spans(index)
            if not spans and not self._is_omitted(index):
                raise InputError(
                    f"{self._name(index)} contains a special token's text, and this chat template rewrites the message",
                    hint="remove that text from the message",
                )
            literal += spans
        if self._tools:
            literal += self._literal_in_field(self._tools, (_TOOLS, "tools"), "tools")
        return literal

    def _literal_in_field(self, value: Any, owner: tuple[int, str], where: str) -> list[Span]:
        """Spans of a field's strings that contain a special token's text.

        Raises:
            InputError: Such a text is not to be located.
        """
        pattern = self._tokenizer.special_pattern
        if not pattern.search(repr(value)):
            return []
        numbers = self._field_marks.get(owner)
        spans: list[Span] = []
        is_located = bool(numbers) and self._places is not None and not _has_key(value, pattern)
        for number in numbers or []:
            if number in (self._places or {}):
                is_located = is_located and bool(self._spans(number))
                spans += self._spans(number)
        if not is_located:
            raise InputError(
                f"{where}: {owner[1]} contains a special token's text, and this chat template rewrites it",
                hint="remove that text",
            )
        return [(start, end) for start, end in spans if pattern.search(self.text, start, end)]

    def _lost(self, index: int) -> InputError:
        hint = "remove this message, or use a checkpoint whose template keeps it"
        if self._messages[index]["role"] == "system":
            hint = FOLD_HINT
        return InputError(
            f"{self._name(index)}: the chat template omits or rewrites its content",
            hint=hint,
        )

    def _name(self, index: int) -> str:
        return f"message {index + 1} ({self._messages[index]['role']})"


def _stripped_content(message: Message) -> str:
    return (message.get("content") or "").strip()


def _mark(message: Message, mark: str) -> Message:
    """A copy with a mark on each side of its content.

    White space around the content stays outside, so that a template that strips it still does.
    """
    content = message.get("content") or ""
    stripped = content.strip()
    if not stripped:
        return message
    return {**message, "content": _between(content, mark)}


def _between(text: str, mark: str) -> str:
    """A text between two marks, with the white space around it outside of them."""
    stripped = text.strip()
    before, _, after = text.partition(stripped)
    return f"{before}{mark}{stripped}{mark}{after}"


def _has_key(value: Any, pattern: re.Pattern[str]) -> bool:
    """Whether a key somewhere in a value matches."""
    if isinstance(value, Mapping):
        return any(pattern.search(str(key)) or _has_key(item, pattern) for key, item in value.items())
    return isinstance(value, list) and any(_has_key(item, pattern) for item in value)


def _check(messages: Sequence[Message]) -> None:
    """Check that this is a conversation.

    Raises:
        InputError: It is empty, or a message has no role or a content that is not text.
    """
    if not messages:
        raise InputError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {index + 1}: expected an object with 'role' and 'content'")
        if not isinstance(message.get("content"), str | None):
            kind = type(message["content"]).__name__
            raise InputError(f"message {index + 1} ({message['role']}): expected content to be text, got {kind}")


@lru_cache
def _warn_of_no_end(where: str) -> None:
    log.warn(
        f"{where}: neither the chat template nor the tokenizer has a token that ends an answer, so the model will not "
        "learn to stop (name an eos_token in tokenizer_config.json, or choose another model.chat_template)"
    )


@lru_cache
def _note_date(where: str) -> None:
    log.note(f"{where}: the chat template asks for today's date and always gets {DATE}, in training and in answers")


@lru_cache
def _note_default_template(where: str) -> None:
    # Cached, so that each tokenizer says it once.
    log.note(f"{where} has no chat template; using a plain one ('### User:', '### Assistant:'), saved with the result")

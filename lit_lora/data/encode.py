"""Samples to token ids: which tokens are targets, and what happens to rows that are too long."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from lit_lora.data.config import DataConfig
from lit_lora.data.findings import Findings
from lit_lora.data.rows import EncodedRow, Status
from lit_lora.data.sample import Conversation, Sample
from lit_lora.errors import InputError
from lit_lora.tokenizer import RenderedChat, Tokenizer, encode_rendered, encode_text, render_chat

__all__ = ["Place", "encode_samples", "learned_answers"]

_CHUNK = 1024  # samples encoded in one call, which the tokenizer spreads over all cores
_MARGIN = 16  # tokens of a prompt that stay on each side of a cut

# What the templates of well-known models write around messages.
_TEMPLATE_MARKS = re.compile(
    r"<\|im_(?:start|end|sep)\|>|<\|(?:start|end)_header_id\|>|<\|eot_id\|>|<\|(?:start|end)_of_role\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<\|(?:START|END)_OF_TURN_TOKEN\|>|<｜(?:User|Assistant)｜>"
    r"|<\|(?:user|assistant|system|endoftext|begin_of_text|end)\|>"
)
_UNWRITTEN = {
    "tools": "with tools, for which the model's chat template has no place",
    "tool_calls": "with calls of functions, written as JSON text because the chat template has no place for them",
    "reasoning": "with reasoning that the chat template does not write",
}

Place = tuple[str, int]
"""File name and line of a sample."""


def encode_samples(
    tokenizer: Tokenizer, samples: Sequence[Sample], places: Sequence[Place], config: DataConfig, findings: Findings
) -> Iterator[EncodedRow]:
    """Encode samples as ``config`` says: a conversation gives one row, a plain text as many as its length needs.

    What is noticed in them, such as tools that the template does not write, is counted in ``findings``.

    Raises:
        InputError: The chat template refuses a conversation, or a row is too long and ``too_long`` is ``error``.
    """
    learn_all = config.learn == "all"
    for start in range(0, len(samples), _CHUNK):
        end = start + _CHUNK
        chunk = list(zip(samples[start:end], places[start:end], strict=True))

        # Conversations are encoded together; below, each takes its own result from the iterator.
        chats = []
        for sample, place in chunk:
            if isinstance(sample, Conversation) and (sample.has_answer or learn_all):
                chat = _render(tokenizer, sample, place, config.learn)
                _count_unwritten(chat, place, findings)
                _count_marks(tokenizer, sample, chat, place, findings)
                chats.append(chat)
        encoded_chats = iter(encode_rendered(tokenizer, chats))

        for sample, place in chunk:
            if isinstance(sample, str):
                ids = _encode_plain(tokenizer, sample, place, config, findings)
                yield from _pieces(ids, place, config.max_seq_length)
            elif not (sample.has_answer or learn_all):
                yield EncodedRow((), (), Status.NOTHING_TO_LEARN, 0, *place)
            else:
                encoded = next(encoded_chats)
                loss_mask = [True] * len(encoded.ids) if learn_all else encoded.loss_mask
                yield _fit(encoded.ids, loss_mask, place, config)


def _encode_plain(tokenizer: Tokenizer, text: str, place: Place, config: DataConfig, findings: Findings) -> list[int]:
    """The ids of a plain text; special-token strings in it are what ``config`` says."""
    where = f"{place[0]}:{place[1]}"
    parse = config.special_tokens == "parse"
    if not parse and tokenizer.special_pattern.search(text):
        findings.warn(
            "with special tokens written as text, which stay text (data.special_tokens: parse makes them tokens)", where
        )
    _count_foreign_marks(tokenizer, text, where, findings)
    return encode_text(tokenizer, text, end=True, special=parse)


def _count_marks(
    tokenizer: Tokenizer, sample: Conversation, chat: RenderedChat, place: Place, findings: Findings
) -> None:
    """Count a conversation whose messages contain the marks of a chat template."""
    where = f"{place[0]}:{place[1]}"
    if chat.literal:
        findings.warn("with a special token's text in a message, which stays text", where)
    _count_foreign_marks(
        tokenizer, "\n".join(message.get("content") or "" for message in sample.messages), where, findings
    )


def _count_foreign_marks(tokenizer: Tokenizer, text: str, where: str, findings: Findings) -> None:
    """Count a text with the marks of a chat template that is not this model's."""
    for mark in _TEMPLATE_MARKS.findall(text):
        if not tokenizer.special_pattern.fullmatch(mark) and mark not in tokenizer.template.text:
            findings.warn("that look like text rendered by the chat template of another model", where)
            return


def _count_unwritten(chat: RenderedChat, place: Place, findings: Findings) -> None:
    """Count what a conversation has and the chat template does not write."""
    where = f"{place[0]}:{place[1]}"
    for field in sorted(chat.unwritten):
        if field in _UNWRITTEN:
            findings.warn(_UNWRITTEN[field], where)
        else:  # the model answers as well without it
            findings.note(f"with {field} of a message, which the chat template does not write", where)


def _render(tokenizer: Tokenizer, sample: Conversation, place: Place, learn: str) -> RenderedChat:
    learned = learned_answers(sample, learn)
    try:
        return render_chat(tokenizer, sample.messages, tools=sample.tools, learned=learned)
    except InputError as error:
        raise InputError(f"{place[0]}:{place[1]}: {error}", hint=error.hint) from error


def learned_answers(sample: Conversation, learn: str) -> list[int]:
    """Indices of the assistant messages to learn, or of the last of them."""
    return sample.answers[-1:] if learn == "last" else sample.answers


def _pieces(tokens: list[int], place: Place, max_length: int) -> Iterator[EncodedRow]:
    """Split a text into pieces that overlap by one token, so that every token but the first is predicted once."""
    for start in range(0, max(len(tokens) - 1, 1), max_length - 1):
        ids = tokens[start : start + max_length]
        if len(ids) > 1:
            yield EncodedRow(ids, [True] * len(ids), Status.KEPT, len(ids), *place)
        else:  # a single token: nothing comes before it that could predict it
            yield EncodedRow((), (), Status.NOTHING_TO_LEARN, len(ids), *place)


def _fit(ids: list[int], loss_mask: list[bool], place: Place, config: DataConfig) -> EncodedRow:
    """A conversation as a row, shortened or dropped if it is too long.

    Raises:
        InputError: It is too long, and ``too_long`` is ``error``.
    """
    length = len(ids)
    status = Status.KEPT
    if length > config.max_seq_length:
        where = f"{place[0]}:{place[1]}"
        if config.too_long == "error":
            raise InputError(
                f"{where}: {length} tokens, max_seq_length is {config.max_seq_length}",
                hint=f"set max_seq_length: {length}, or too_long: drop or truncate_prompt",
            )
        positions = None
        if config.too_long == "truncate_prompt":
            positions = _positions_after_cut(loss_mask, length - config.max_seq_length)
        if positions is None:
            return EncodedRow((), (), Status.TOO_LONG, length, *place)
        ids = [ids[i] for i in positions]
        loss_mask = [loss_mask[i] for i in positions]
        status = Status.TRUNCATED
    if not any(loss_mask[1:]):  # the first token has nothing before it that could predict it
        return EncodedRow((), (), Status.NOTHING_TO_LEARN, length, *place)
    return EncodedRow(ids, loss_mask, status, length, *place)


def _positions_after_cut(loss_mask: Sequence[bool], excess: int) -> list[int] | None:
    """Positions that remain after cutting ``excess`` tokens out of the prompts; None if the prompts are too short.

    Tokens go from the middle of the longest prompt, then of the next: its ends hold what the template writes around
    a message, and the beginning and the end of a prompt say most of what is asked.
    """
    # Prompts are the runs of False. Where the mask changes, a run begins or ends; True on both sides closes the outer.
    changes = np.flatnonzero(np.diff(np.concatenate([[True], loss_mask, [True]]).astype(np.int8))).tolist()
    prompts = list(zip(changes[::2], changes[1::2], strict=True))
    prompts.sort(key=lambda prompt: prompt[1] - prompt[0], reverse=True)

    remains = np.ones(len(loss_mask), np.bool_)
    for start, end in prompts:
        length = end - start
        cut = min(excess, length - 2 * _MARGIN)
        if cut <= 0:
            break
        first = start + (length - cut) // 2
        remains[first : first + cut] = False
        excess -= cut
    return np.flatnonzero(remains).tolist() if excess == 0 else None

"""Samples to token ids: what is learned, what is too long, and what is done about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lit_lora.data.config import DataConfig
from lit_lora.data.rows import EncodedRow, Status
from lit_lora.data.sample import Conversation, Sample
from lit_lora.errors import InputError
from lit_lora.tokenizer import RenderedChat, Tokenizer, encode_rendered, encode_text, render_chat

__all__ = ["Place", "encode_samples"]

_TOGETHER = 1024
_KEEP = 16  # tokens of a prompt's stretch that are left standing at each side of a cut

Place = tuple[str, int]
"""File name and line of a sample."""


def encode_samples(
    tokenizer: Tokenizer, samples: Sequence[Sample], places: Sequence[Place], config: DataConfig
) -> Iterator[EncodedRow]:
    """Encode samples under the rules of ``config``; each gives one row, but a plain text as many as its length needs.

    Conversations are encoded many at a time, which uses all cores.

    Raises:
        InputError: The chat template refuses a conversation, or a row is too long and ``too_long`` is ``error``.
    """
    for start in range(0, len(samples), _TOGETHER):
        end = start + _TOGETHER
        some = list(zip(samples[start:end], places[start:end], strict=True))
        learn_all = config.learn == "all"
        chats = [
            _render(tokenizer, sample, place)
            for sample, place in some
            if isinstance(sample, Conversation) and (sample.has_answer or learn_all)
        ]
        encoded = iter(encode_rendered(tokenizer, chats))
        for sample, place in some:
            if isinstance(sample, str):
                yield from _pieces(encode_text(tokenizer, sample, end=True), place, config.max_seq_length)
            elif not (sample.has_answer or learn_all):
                yield EncodedRow((), (), Status.NOTHING_TO_LEARN, 0, *place)
            else:
                chat = next(encoded)
                loss_mask = [True] * len(chat.ids) if learn_all else chat.loss_mask
                yield _fit(chat.ids, loss_mask, place, config)


def _render(tokenizer: Tokenizer, sample: Conversation, place: Place) -> RenderedChat:
    try:
        return render_chat(tokenizer, sample.messages, tools=sample.tools)
    except InputError as error:
        raise InputError(f"{place[0]}:{place[1]}: {error}", hint=error.hint) from error


def _pieces(tokens: list[int], place: Place, most: int) -> Iterator[EncodedRow]:
    """A long text in pieces that overlap by one token, so that every token but the first is predicted exactly once."""
    for start in range(0, max(len(tokens) - 1, 1), most - 1):
        ids = tokens[start : start + most]
        status = Status.KEPT if len(ids) > 1 else Status.NOTHING_TO_LEARN
        kept = ids if status is Status.KEPT else []
        yield EncodedRow(kept, [True] * len(kept), status, len(ids), *place)


def _fit(ids: list[int], loss_mask: list[bool], place: Place, config: DataConfig) -> EncodedRow:
    length = len(ids)
    status = Status.KEPT
    if length > config.max_seq_length:
        where = f"{place[0]}:{place[1]}"
        if config.too_long == "error":
            raise InputError(
                f"{where}: {length} tokens, max_seq_length is {config.max_seq_length}",
                hint=f"set max_seq_length: {length}, or too_long: drop or truncate_prompt",
            )
        kept = _cut(loss_mask, length - config.max_seq_length) if config.too_long == "truncate_prompt" else None
        if kept is None:
            return EncodedRow((), (), Status.TOO_LONG, length, *place)
        ids, loss_mask = [ids[i] for i in kept], [loss_mask[i] for i in kept]
        status = Status.TRUNCATED
    if not any(loss_mask[1:]):
        return EncodedRow((), (), Status.NOTHING_TO_LEARN, length, *place)
    return EncodedRow(ids, loss_mask, status, length, *place)


def _cut(loss_mask: Sequence[bool], excess: int) -> list[int] | None:
    """Positions that stay when ``excess`` tokens go, or None when what is not learned cannot spare them.

    Tokens go from the middle of the longest stretch that is not learned, then of the next: a stretch's ends hold what
    the template writes around a message, and the beginning and the end of a prompt say most of what is asked.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[True], loss_mask, [True]]).astype(np.int8)))
    stretches = sorted(zip(edges[::2], edges[1::2], strict=True), key=lambda stretch: stretch[0] - stretch[1])
    stays = np.ones(len(loss_mask), np.bool_)
    for start, end in stretches:
        cut = min(excess, int(end - start) - 2 * _KEEP)
        if cut <= 0:
            break
        first = int(start) + (int(end - start) - cut) // 2
        stays[first : first + cut] = False
        excess -= cut
    return [int(i) for i in np.flatnonzero(stays)] if excess == 0 else None

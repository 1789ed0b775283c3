"""Rows to training steps: which rows a step takes, and how they are laid into micro-batches without padding.

Tokens that all rows begin with, such as a system prompt, stand in a micro-batch once.

A step is a pure function of its number: epoch ``step // steps_per_epoch`` has its own permutation, drawn from the seed
and the epoch, and the step takes the next ``batch_size`` rows of it. So every row is visited exactly once an epoch, and
resuming at any step costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lit_lora import IGNORE_INDEX
from lit_lora.data.rows import Integers, Rows

__all__ = ["Batches", "MicroBatch", "Shuffled", "collate", "validation_batches"]


@dataclass(frozen=True)
class MicroBatch:
    """Documents packed one after the other; they must not see each other (``lengths`` tells them apart)."""

    input_ids: torch.Tensor  # (1, T) int64: the common tokens, and the rest of each document
    labels: torch.Tensor  # (1, T) int64: the token that each position must predict, or IGNORE_INDEX
    lengths: list[int]
    """Tokens of each document, the common ones included."""
    rows: list[int]
    """Position in the rows of each document."""
    shared_prefix: int = 0
    """Tokens that every document begins with; none of them has a label."""

    @property
    def target_count(self) -> int:
        """Positions with a label."""
        return int((self.labels != IGNORE_INDEX).sum())


class Shuffled:
    """Which rows each step takes: a permutation for every epoch.

    Args:
        count: Rows that there are, at least one.
        batch_size: Rows per step; the last step of an epoch takes what is left.
        seed: Decides the order of the rows.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.steps_per_epoch = -(-count // batch_size)
        self._order = lru_cache(maxsize=1)(
            lambda epoch: np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)
        )

    def row_indices(self, step: int) -> Integers:
        """Positions of the rows that step ``step`` (from 0) learns from."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order: Integers = self._order(epoch)
        return order[place * self.batch_size : (place + 1) * self.batch_size]


class Batches(Shuffled):
    """The training steps over some rows, laid out without padding.

    Args:
        rows: At least one row.
        batch_size: Rows per step; the last step of an epoch takes what is left.
        micro_batch_tokens: The most tokens of a micro-batch. A longer row makes a micro-batch of its own.
        seed: Decides the order of the rows.
        shared_prefix: Tokens that all rows begin with, held once per micro-batch; at most ``rows.shared_prefix``.

    Raises:
        ValueError: There are no rows, or a size is below 1.
    """

    def __init__(
        self, rows: Rows, *, batch_size: int, micro_batch_tokens: int, seed: int, shared_prefix: int = 0
    ) -> None:
        if len(rows) < 1 or batch_size < 1 or micro_batch_tokens < 1:
            raise ValueError(f"{len(rows)} rows, batch_size {batch_size}, micro_batch_tokens {micro_batch_tokens}")
        super().__init__(len(rows), batch_size, seed)
        self.rows = rows
        self.micro_batch_tokens = micro_batch_tokens
        self.shared_prefix = shared_prefix

    def places(self, step: int) -> list[list[int]]:
        """Positions of the rows in each micro-batch of step ``step`` (from 0)."""
        chosen = self.row_indices(step)
        bins = _pack(self.rows.token_counts[chosen] - self.shared_prefix, self.micro_batch_tokens - self.shared_prefix)
        return [[int(chosen[i]) for i in places] for places in bins]

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of step ``step`` (from 0)."""
        return [collate(self.rows, places, self.shared_prefix) for places in self.places(step)]


def validation_batches(rows: Rows, micro_batch_tokens: int) -> Iterator[MicroBatch]:
    """Every row once, the longest first so that a lack of memory shows at once."""
    order, shared_prefix = np.argsort(-rows.token_counts, kind="stable"), rows.shared_prefix
    places: list[int] = []
    tokens = shared_prefix
    for place in order:
        count = int(rows.token_counts[place]) - shared_prefix
        if places and tokens + count > micro_batch_tokens:
            yield collate(rows, places, shared_prefix)
            places, tokens = [], shared_prefix
        places.append(int(place))
        tokens += count
    if places:
        yield collate(rows, places, shared_prefix)


def collate(rows: Rows, places: Sequence[int], shared_prefix: int = 0) -> MicroBatch:
    """The rows at ``places`` as one packed micro-batch, with the ``shared_prefix`` tokens that they begin with once.

    One row alone is one document, whatever it begins with.
    """
    documents = [rows[place] for place in places]
    lengths = [len(document.input_ids) for document in documents]
    shared_prefix = shared_prefix if len(documents) > 1 else 0
    ids = np.concatenate(
        [documents[0].input_ids[:shared_prefix], *(document.input_ids[shared_prefix:] for document in documents)]
    )
    ids = ids.astype(np.int64)
    labels = np.full_like(ids, IGNORE_INDEX)
    start = shared_prefix
    for document, length in zip(documents, lengths, strict=True):
        end = start + length - shared_prefix
        following, loss_mask = document.input_ids[shared_prefix + 1 :], document.loss_mask[shared_prefix + 1 :]
        labels[start : end - 1] = np.where(loss_mask, following, IGNORE_INDEX)
        start = end
    return MicroBatch(torch.from_numpy(ids)[None], torch.from_numpy(labels)[None], lengths, list(places), shared_prefix)


def _pack(counts: Integers, budget: int) -> list[list[int]]:
    """Positions into as few bins as first-fit-decreasing finds, then evened out.

    Even bins have the least peak memory: each row, the longest first, goes into the emptiest bin. Where that breaks the
    budget the first packing stays.
    """
    order = [int(i) for i in np.argsort(-counts, kind="stable")]
    bins, _ = _fill(order, counts, budget, bins=0)
    even, even_loads = _fill(order, counts, 0, bins=len(bins))
    fits = all(load <= budget or len(rows) == 1 for rows, load in zip(even, even_loads, strict=True))
    return even if fits else bins


def _fill(order: Sequence[int], counts: Integers, budget: int, *, bins: int) -> tuple[list[list[int]], list[int]]:
    """First fit into new bins when ``bins`` is 0, else the emptiest of ``bins`` bins."""
    filled: list[list[int]] = [[] for _ in range(bins)]
    loads = [0] * bins
    for i in order:
        count = int(counts[i])
        if bins:
            place = loads.index(min(loads))
        else:
            place = next((b for b, load in enumerate(loads) if load + count <= budget), len(loads))
            if place == len(loads):
                filled.append([])
                loads.append(0)
        filled[place].append(i)
        loads[place] += count
    return filled, loads

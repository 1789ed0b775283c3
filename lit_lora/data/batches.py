"""Training steps from rows: which rows a step takes, and how they are packed into micro-batches without padding.

Tokens that all rows begin with, such as a system prompt, are stored once per micro-batch.

A step is a pure function of its number: epoch ``step // steps_per_epoch`` has its own permutation, drawn from the seed
and the epoch, and the step takes the next ``batch_size`` rows of it. So every row is visited exactly once per epoch,
and resuming at any step needs no replay. Data sets with weights are drawn from as :mod:`lit_lora.data.mixing` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lit_lora import IGNORE_INDEX
from lit_lora.data.mixing import Mixture
from lit_lora.data.rows import Integers, Rows

__all__ = ["Batches", "MicroBatch", "Shuffled", "collate", "validation_batches"]


@dataclass(frozen=True)
class MicroBatch:
    """Documents packed one after the other; attention must not cross them (``lengths`` tells them apart)."""

    input_ids: torch.Tensor  # (1, T) int64: the shared prefix, then the rest of each document
    labels: torch.Tensor  # (1, T) int64: the token that each position must predict, or IGNORE_INDEX
    lengths: list[int]
    """Tokens in each document, the shared prefix included."""
    rows: list[int]
    """The row index of each document."""
    shared_prefix: int = 0
    """Number of tokens that every document begins with; none of them has a label."""

    @property
    def target_count(self) -> int:
        """Number of positions with a label."""
        return int((self.labels != IGNORE_INDEX).sum())


class Shuffled:
    """Which rows each step takes: a new permutation in every epoch, or draws by weight.

    Args:
        count: Number of rows, at least one.
        batch_size: Rows per step; the last step of an epoch takes what is left.
        seed: Seeds the row order.
        mixture: The data sets that the rows consist of, if they have weights.
    """

    def __init__(self, count: int, batch_size: int, seed: int, mixture: Mixture | None = None) -> None:
        self.batch_size = batch_size
        self.steps_per_epoch = math.ceil(count / batch_size)
        self._count = count
        self._seed = seed
        self._mixture = mixture
        self._epoch = -1
        self._order: Integers = np.empty(0, np.int64)

    def row_indices(self, step: int) -> Integers:
        """Indices of the rows in step ``step`` (from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.batch_size
        return self._order_of(epoch)[start : start + self.batch_size]

    def _order_of(self, epoch: int) -> Integers:
        # Steps come in order, so remembering one epoch saves a permutation of all rows per step.
        if epoch != self._epoch:
            if self._mixture is None:
                self._order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(self._count)
            else:
                self._order = self._mixture.order(self._seed, epoch)
            self._epoch = epoch
        return self._order


class Batches(Shuffled):
    """The training steps over some rows, packed without padding.

    Args:
        rows: At least one row.
        batch_size: Rows per step; the last step of an epoch takes what is left.
        micro_batch_tokens: Maximum number of tokens in a micro-batch. A longer row gets a micro-batch of its own.
        seed: Seeds the row order.
        shared_prefix: Number of leading tokens to store once per micro-batch; at most ``rows.shared_prefix``.
        mixture: The data sets that the rows consist of, if they have weights.

    Raises:
        ValueError: There are no rows, or a size is below 1.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        batch_size: int,
        micro_batch_tokens: int,
        seed: int,
        shared_prefix: int = 0,
        mixture: Mixture | None = None,
    ) -> None:
        if len(rows) < 1 or batch_size < 1 or micro_batch_tokens < 1:
            raise ValueError(f"{len(rows)} rows, batch_size {batch_size}, micro_batch_tokens {micro_batch_tokens}")
        super().__init__(len(rows), batch_size, seed, mixture)
        self.rows = rows
        self.micro_batch_tokens = micro_batch_tokens
        self.shared_prefix = shared_prefix

    def places(self, step: int) -> list[list[int]]:
        """Indices of the rows in each micro-batch of step ``step`` (from 0)."""
        chosen = self.row_indices(step)
        # Every micro-batch holds the shared prefix once, so only the rest of each row takes from the budget.
        counts = self.rows.token_counts[chosen] - self.shared_prefix
        bins = _pack(counts, self.micro_batch_tokens - self.shared_prefix)
        return [chosen[places].tolist() for places in bins]

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of step ``step`` (from 0)."""
        return [collate(self.rows, places, self.shared_prefix) for places in self.places(step)]


def validation_batches(rows: Rows, micro_batch_tokens: int) -> Iterator[MicroBatch]:
    """Every row once, the longest first, so that an out-of-memory error comes with the first batch."""
    shared_prefix = rows.shared_prefix
    places: list[int] = []
    tokens = shared_prefix
    for place in np.argsort(-rows.token_counts, kind="stable"):
        count = int(rows.token_counts[place]) - shared_prefix
        if places and tokens + count > micro_batch_tokens:
            yield collate(rows, places, shared_prefix)
            places = []
            tokens = shared_prefix
        places.append(int(place))
        tokens += count
    if places:
        yield collate(rows, places, shared_prefix)


def collate(rows: Rows, places: Sequence[int], shared_prefix: int = 0) -> MicroBatch:
    """Pack the rows at ``places`` into one micro-batch, their first ``shared_prefix`` tokens stored once.

    A single row is packed as one plain document: sharing would save nothing.
    """
    documents = [rows[place] for place in places]
    if len(documents) == 1:
        shared_prefix = 0

    pieces = [documents[0].input_ids[:shared_prefix]]
    pieces += [document.input_ids[shared_prefix:] for document in documents]
    input_ids = np.concatenate(pieces).astype(np.int64)

    # labels[t] is the token after position t. The prefix and each document's last position have none.
    labels = np.full_like(input_ids, IGNORE_INDEX)
    start = shared_prefix
    for document in documents:
        end = start + len(document.input_ids) - shared_prefix
        next_ids = document.input_ids[shared_prefix + 1 :]
        is_target = document.loss_mask[shared_prefix + 1 :]
        labels[start : end - 1] = np.where(is_target, next_ids, IGNORE_INDEX)
        start = end

    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        labels=torch.from_numpy(labels)[None],
        lengths=[len(document.input_ids) for document in documents],
        rows=list(places),
        shared_prefix=shared_prefix,
    )


def _pack(counts: Integers, budget: int) -> list[list[int]]:
    """Assign positions to as few bins as first-fit-decreasing finds, then even the bins out.

    Even bins have the lowest peak memory. Where evening out would exceed the budget, the first packing is used.
    """
    longest_first = np.argsort(-counts, kind="stable").tolist()
    bins = _first_fit(longest_first, counts, budget)
    even_bins = _even(longest_first, counts, len(bins))
    fits = all(len(positions) == 1 or counts[positions].sum() <= budget for positions in even_bins)
    return even_bins if fits else bins


def _first_fit(order: Sequence[int], counts: Integers, budget: int) -> list[list[int]]:
    """Put each position into the first bin that has room for it, or into a new one."""
    bins: list[list[int]] = []
    loads: list[int] = []
    for position in order:
        count = int(counts[position])
        for number, load in enumerate(loads):
            if load + count <= budget:
                bins[number].append(position)
                loads[number] += count
                break
        else:
            bins.append([position])
            loads.append(count)
    return bins


def _even(order: Sequence[int], counts: Integers, bin_count: int) -> list[list[int]]:
    """Put each position into the emptiest of ``bin_count`` bins."""
    bins: list[list[int]] = [[] for _ in range(bin_count)]
    loads = [0] * bin_count
    for position in order:
        emptiest = loads.index(min(loads))
        bins[emptiest].append(position)
        loads[emptiest] += int(counts[position])
    return bins

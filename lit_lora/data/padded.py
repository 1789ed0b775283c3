"""Training steps from labeled rows: rows of similar length share a micro-batch, so that little padding is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_lora import IGNORE_INDEX
from lit_lora.data.batches import Shuffled
from lit_lora.data.labeled import LabeledRow, LabeledRows
from lit_lora.data.rows import Integers

__all__ = ["CALL", "LabeledBatch", "Layout", "PaddedBatches", "by_length", "collate", "padded_tokens"]

CALL = 48
"""Cost of one more forward pass, in tokens: a micro-batch is not split to save less padding than that."""


@dataclass(frozen=True)
class LabeledBatch:
    """A micro-batch of rows, padded on the right to the longest."""

    inputs: dict[str, Tensor]
    """The model's arguments: ``input_ids``, ``attention_mask`` and, if it takes them, ``token_type_ids``, (B, T) int64;
    for an encoder-decoder also ``decoder_input_ids``, (B, U) int64."""
    labels: Tensor
    """(B,) int64 or float32; for seq2seq (B, U) int64, padded with ``IGNORE_INDEX``."""
    lengths: list[int]
    """Tokens in each row, without padding."""
    rows: list[int]
    """The row index of each row."""


@dataclass(frozen=True)
class Layout:
    """What a model expects of its inputs."""

    pad_id: int
    """The token to pad with."""
    token_types: bool = False
    """Whether the model takes ``token_type_ids``."""
    decoder_start: int | None = None
    """The first token of the decoder's input; ``None`` for an encoder."""


class PaddedBatches(Shuffled):
    """The training steps over some rows, each split into micro-batches of rows of similar length.

    Args:
        rows: At least one row.
        layout: What the model expects of its inputs.
        batch_size: Rows per step; the last step of an epoch takes what is left.
        micro_batch_tokens: Maximum number of tokens in a micro-batch, padding included. A longer row gets a micro-batch
            of its own.
        seed: Seeds the row order.
    """

    def __init__(
        self, rows: LabeledRows, layout: Layout, *, batch_size: int, micro_batch_tokens: int, seed: int
    ) -> None:
        super().__init__(len(rows), batch_size, seed)
        self.rows = rows
        self.layout = layout
        self.micro_batch_tokens = micro_batch_tokens

    def places(self, step: int) -> list[list[int]]:
        """Indices of the rows in each micro-batch of step ``step`` (from 0)."""
        chosen = self.row_indices(step)
        micro_batches = split_by_length(self.rows.token_counts[chosen], self.micro_batch_tokens)
        return [chosen[positions].tolist() for positions in micro_batches]

    def step(self, step: int) -> list[LabeledBatch]:
        """The micro-batches of step ``step`` (from 0)."""
        return [collate(self.rows, places, self.layout) for places in self.places(step)]


def split_by_length(counts: Integers, budget: int) -> list[list[int]]:
    """Split rows, the longest first, into the micro-batches with the least padding and the fewest forward passes.

    Args:
        counts: Tokens in each row.
        budget: Maximum number of padded tokens in a micro-batch of more than one row.

    Returns:
        Positions in ``counts``, per micro-batch.
    """
    order = np.argsort(-counts, kind="stable").tolist()

    # Dynamic programming over the sorted rows: best_cost[n] is the least cost of the first n rows, and best_start[n]
    # is where the last of their micro-batches begins.
    best_cost = [0.0] + [math.inf] * len(order)
    best_start = [0] * (len(order) + 1)
    for start in range(len(order)):
        length = int(counts[order[start]])  # the longest of the micro-batch, to which the others are padded
        last_stop = min(start + _rows_that_fit(length, budget), len(order))
        for stop in range(start + 1, last_stop + 1):
            cost = best_cost[start] + length * (stop - start) + CALL
            if cost < best_cost[stop]:
                best_cost[stop] = cost
                best_start[stop] = start

    # Walk back from the end, through the start of each last micro-batch.
    micro_batches: list[list[int]] = []
    stop = len(order)
    while stop:
        start = best_start[stop]
        micro_batches.append(order[start:stop])
        stop = start
    micro_batches.reverse()
    return micro_batches


def _rows_that_fit(length: int, budget: int) -> int:
    """How many rows of this length fit into ``budget`` tokens; at least one."""
    return max(1, budget // max(length, 1))


def by_length(rows: LabeledRows, layout: Layout, micro_batch_tokens: int) -> list[LabeledBatch]:
    """Every row once, the longest first, so that an out-of-memory error comes with the first batch."""
    order = np.argsort(-rows.token_counts, kind="stable").tolist()
    batches = []
    start = 0
    while start < len(order):
        stop = start + _rows_that_fit(int(rows.token_counts[order[start]]), micro_batch_tokens)
        batches.append(collate(rows, order[start:stop], layout))
        start = stop
    return batches


def padded_tokens(micro_batches: Sequence[Sequence[int]], counts: Integers) -> int:
    """Number of tokens computed for some micro-batches of rows, padding included."""
    return sum(len(places) * int(counts[list(places)].max()) for places in micro_batches)


def collate(rows: LabeledRows, places: Sequence[int], layout: Layout) -> LabeledBatch:
    """Pad the rows at ``places`` into one micro-batch."""
    chosen = [rows[place] for place in places]
    lengths = [len(row.ids) for row in chosen]
    ids = torch.full((len(chosen), max(lengths)), layout.pad_id)
    inputs = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    if layout.token_types:
        inputs["token_type_ids"] = torch.zeros_like(ids)

    for number, (row, length) in enumerate(zip(chosen, lengths, strict=True)):
        ids[number, :length] = torch.from_numpy(row.ids.astype(np.int64))
        inputs["attention_mask"][number, :length] = 1
        if layout.token_types:
            inputs["token_type_ids"][number, :length] = torch.from_numpy(row.types.astype(np.int64))

    if layout.decoder_start is None:
        labels = torch.from_numpy(np.stack([row.label for row in chosen]))
        return LabeledBatch(inputs, labels, lengths, list(places))

    labels = _target_ids(chosen)
    # The decoder predicts each target token from those before it: its input is the target, one position later.
    shifted = torch.cat([torch.full_like(labels[:, :1], layout.decoder_start), labels[:, :-1]], dim=1)
    inputs["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORE_INDEX, layout.pad_id)
    return LabeledBatch(inputs, labels, lengths, list(places))


def _target_ids(rows: Sequence[LabeledRow]) -> Tensor:
    """The rows' target tokens, (B, U), padded with ``IGNORE_INDEX``."""
    labels = torch.full((len(rows), max(len(row.label) for row in rows)), IGNORE_INDEX)
    for number, row in enumerate(rows):
        labels[number, : len(row.label)] = torch.from_numpy(row.label)
    return labels

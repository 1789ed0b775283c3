"""Rows with labels to training steps: rows of like length together, so that little is computed for padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lit_lora import IGNORE_INDEX
from lit_lora.data.batches import Shuffled
from lit_lora.data.labelled import LabelledRow, LabelledRows
from lit_lora.data.rows import Integers

__all__ = ["CALL", "LabelledBatch", "Layout", "PaddedBatches", "by_length", "collate", "padded_tokens"]

CALL = 48
"""What one more call of the model costs, in tokens: a portion is not cut for less padding than that."""


@dataclass(frozen=True)
class LabelledBatch:
    """Rows side by side, padded at the right to the longest."""

    inputs: dict[str, Tensor]
    """What the model is called with: ``input_ids``, ``attention_mask`` and what else it takes, (B, T) int64; for a
    decoder ``decoder_input_ids``, (B, U) int64."""
    labels: Tensor
    """(B,) int64 or float32; of texts (B, U) int64, padded with ``IGNORE_INDEX``."""
    lengths: list[int]
    rows: list[int]


@dataclass(frozen=True)
class Layout:
    """How a model wants its rows."""

    pad_id: int
    """The token to pad with."""
    token_types: bool = False
    """It takes ``token_type_ids``."""
    decoder_start: int | None = None
    """The token that its decoder starts with; ``None`` for an encoder."""


class PaddedBatches(Shuffled):
    """The training steps over some rows, each cut into portions of like length.

    Args:
        rows: At least one row.
        layout: How the model wants them.
        batch_size: Rows per step; the last step of an epoch takes what is left.
        micro_batch_tokens: The most tokens of a portion, padding counted. A longer row makes one of its own.
        seed: Decides the order of the rows.
    """

    def __init__(
        self, rows: LabelledRows, layout: Layout, *, batch_size: int, micro_batch_tokens: int, seed: int
    ) -> None:
        super().__init__(len(rows), batch_size, seed)
        self.rows, self.layout, self.micro_batch_tokens = rows, layout, micro_batch_tokens

    def places(self, step: int) -> list[list[int]]:
        """Positions of the rows in each portion of step ``step`` (from 0)."""
        chosen = self.row_indices(step)
        cut = cut_by_length(self.rows.token_counts[chosen], self.micro_batch_tokens)
        return [[int(chosen[i]) for i in micro_batch] for micro_batch in cut]

    def step(self, step: int) -> list[LabelledBatch]:
        """The portions of step ``step`` (from 0)."""
        return [collate(self.rows, places, self.layout) for places in self.places(step)]


def cut_by_length(counts: Integers, budget: int) -> list[list[int]]:
    """Rows, the longest first, cut into the portions that cost least: padded tokens and calls of the model.

    Args:
        counts: Tokens of each row.
        budget: The most padded tokens of a portion of more than one row.

    Returns:
        Positions in ``counts``, by portion.
    """
    order = np.argsort(-counts, kind="stable")
    longest = counts[order]
    cheapest, cuts = [0.0] + [float("inf")] * len(order), [0] * (len(order) + 1)
    for start in range(len(order)):  # a portion from `start` is as long as its first row
        most = max(1, budget // max(int(longest[start]), 1))
        for stop in range(start + 1, min(start + most, len(order)) + 1):
            cost = cheapest[start] + int(longest[start]) * (stop - start) + CALL
            if cost < cheapest[stop]:
                cheapest[stop], cuts[stop] = cost, start
    micro_batches: list[list[int]] = []
    stop = len(order)
    while stop:
        micro_batches.insert(0, [int(i) for i in order[cuts[stop] : stop]])
        stop = cuts[stop]
    return micro_batches


def by_length(rows: LabelledRows, layout: Layout, micro_batch_tokens: int) -> list[LabelledBatch]:
    """Every row once, the longest first so that a lack of memory shows at once."""
    order = np.argsort(-rows.token_counts, kind="stable")
    batches, start = [], 0
    while start < len(order):
        stop = start + max(1, micro_batch_tokens // max(int(rows.token_counts[order[start]]), 1))
        batches.append(collate(rows, [int(place) for place in order[start:stop]], layout))
        start = stop
    return batches


def padded_tokens(micro_batches: Sequence[Sequence[int]], counts: Integers) -> int:
    """Tokens that are computed for some portions of rows, padding included."""
    return sum(len(places) * int(counts[list(places)].max()) for places in micro_batches)


def collate(rows: LabelledRows, places: Sequence[int], layout: Layout) -> LabelledBatch:
    """The rows at ``places`` side by side."""
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
        return LabelledBatch(inputs, labels, lengths, list(places))
    labels = _texts(chosen)
    shifted = torch.cat([torch.full_like(labels[:, :1], layout.decoder_start), labels[:, :-1]], dim=1)
    inputs["decoder_input_ids"] = shifted.masked_fill(shifted == IGNORE_INDEX, layout.pad_id)
    return LabelledBatch(inputs, labels, lengths, list(places))


def _texts(rows: Sequence[LabelledRow]) -> Tensor:
    """The rows' target tokens, (B, U)."""
    labels = torch.full((len(rows), max(len(row.label) for row in rows)), IGNORE_INDEX)
    for number, row in enumerate(rows):
        labels[number, : len(row.label)] = torch.from_numpy(row.label)
    return labels

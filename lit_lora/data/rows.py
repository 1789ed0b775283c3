"""Tokenized rows in Arrow files, mapped into memory: opening is instant, and only what is read is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["EncodedRow", "Integers", "Row", "Rows", "Status", "TokenTable", "record_batch"]

Integers = npt.NDArray[np.int64]


class Status(IntEnum):
    """What happened to a row."""

    KEPT = 0
    TRUNCATED = 1
    """Kept, with the middle of its prompt cut out."""
    TOO_LONG = 2
    """Dropped for its length."""
    NOTHING_TO_LEARN = 3
    """Dropped, because it has no target token."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as stored in the table; ``ids`` and ``loss_mask`` are empty if it was dropped."""

    ids: Sequence[int]
    loss_mask: Sequence[bool]
    status: Status
    length: int
    """Number of tokens before any cut."""
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Row:
    """One row to train on. ``loss_mask[t]`` says whether token ``t`` is a target, so that the loss counts it."""

    input_ids: npt.NDArray[np.int32]  # (T,)
    loss_mask: npt.NDArray[np.bool_]  # (T,)
    source: str
    """``file:line``"""


_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("learn", pa.large_list(pa.uint8())),  # the loss mask, in bytes instead of bits so that a row is a view
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int64()),
        ("length", pa.int64()),  # before any cut
        ("tokens", pa.int64()),  # after it
        ("targets", pa.int64()),
        ("status", pa.int8()),
        ("hash", pa.uint64()),
    ]
)


def record_batch(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    """The rows as one Arrow record batch."""
    tokens = np.array([len(row.ids) for row in rows], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(tokens)]).astype(np.int64)
    total = int(offsets[-1])
    ids = np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32, count=total)
    loss_mask = np.fromiter(chain.from_iterable(row.loss_mask for row in rows), np.uint8, count=total)

    targets = np.zeros(len(rows), np.int64)
    hashes = np.zeros(len(rows), np.uint64)
    for number in range(len(rows)):
        start, end = offsets[number], offsets[number + 1]
        # The first token of a row is no target: nothing comes before it that could predict it.
        targets[number] = loss_mask[start + 1 : end].sum()
        hashes[number] = _hash(ids[start:end], loss_mask[start:end])

    columns = {
        "input_ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids)),
        "learn": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(loss_mask)),
        "file": pa.array([row.file for row in rows], pa.string()).dictionary_encode(),
        "line": pa.array([row.line for row in rows], pa.int64()),
        "length": pa.array([row.length for row in rows], pa.int64()),
        "tokens": pa.array(tokens),
        "targets": pa.array(targets),
        "status": pa.array([int(row.status) for row in rows], pa.int8()),
        "hash": pa.array(hashes),
    }
    return pa.record_batch([columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _hash(ids: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]) -> int:
    digest = hashlib.blake2b(ids.tobytes() + loss_mask.tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class TokenTable:
    """All rows of a dataset, dropped ones included, over the Arrow batches that store them."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.batches = batches
        # The large columns stay in their batches. One number per row is cheap, so those are joined to one array.
        self._ids = [_flat(batch, "input_ids") for batch in batches]
        self._loss_masks = [_flat(batch, "learn") for batch in batches]
        self._files = [batch.column("file") for batch in batches]
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])]).astype(np.int64)
        """Index of the first row of each batch, and the number of all rows."""
        self.line = _joined(batches, "line")
        self.length = _joined(batches, "length")
        self.tokens = _joined(batches, "tokens")
        self.targets = _joined(batches, "targets")
        self.status = _joined(batches, "status")
        self.hash = _joined(batches, "hash")

    @classmethod
    def open(cls, files: Iterable[Path]) -> TokenTable:
        """Map Arrow files into memory, in this order."""
        batches: list[pa.RecordBatch] = []
        for file in files:
            batches += pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_batches()
        return cls(batches)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        """Row ``index`` as views into the file."""
        batch, position = self._place(index)
        offsets, ids = self._ids[batch]
        _, loss_mask = self._loss_masks[batch]
        start = offsets[position]
        end = offsets[position + 1]
        return Row(ids[start:end], loss_mask[start:end].view(np.bool_), self.source(index))

    def source(self, index: int) -> str:
        """``file:line`` of row ``index``."""
        batch, position = self._place(index)
        return f"{self._files[batch][position].as_py()}:{self.line[index]}"

    @classmethod
    def joined(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """The rows of several tables, one behind the other; their tokens stay where they are."""
        batches: list[pa.RecordBatch] = []
        for table in tables:
            batches += table.batches
        return cls(batches)

    def kept(self) -> Rows:
        """The rows to train on: all that were not dropped."""
        return Rows(self, np.flatnonzero(self.status <= Status.TRUNCATED))

    def shared_prefix(self, index: Integers) -> int:
        """See :attr:`Rows.shared_prefix`, for the rows ``index``."""
        if not len(index):
            return 0
        first_row = self.row(int(index[0])).input_ids
        length = int(self.tokens[index].min()) - 1
        for batch, (offsets, ids) in enumerate(self._ids):
            _, loss_mask = self._loss_masks[batch]
            in_batch = (self._starts[batch] <= index) & (index < self._starts[batch + 1])
            row_starts = offsets[index[in_batch] - self._starts[batch]]
            # Token by token, over all rows of the batch at once.
            for position in range(length):
                differs = (ids[row_starts + position] != first_row[position]).any()
                predicts_target = loss_mask[row_starts + position + 1].any()
                if differs or predicts_target:
                    length = position
                    break
        return length

    def _place(self, index: int) -> tuple[int, int]:
        """The batch of a row, and its position in the batch."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return batch, index - int(self._starts[batch])


class Rows:
    """Rows of a table, selected and ordered by ``index``. Reading a row is O(1) and copies nothing."""

    def __init__(self, table: TokenTable, index: Integers) -> None:
        self.table = table
        self.index = index
        self.token_counts: Integers = table.tokens[index]
        """Number of tokens in each row."""
        self.target_counts: Integers = table.targets[index]
        """Number of target tokens in each row."""

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several tables, one part behind the other; at least one part."""
        if len(parts) == 1:
            return parts[0]
        indices = []
        rows_before = 0
        for part in parts:
            indices.append(part.index + rows_before)
            rows_before += len(part.table)
        return cls(TokenTable.joined([part.table for part in parts]), np.concatenate(indices))

    @cached_property
    def shared_prefix(self) -> int:
        """Number of tokens that all rows begin with and that predict no target; fewer than the shortest row has.

        Mostly a system prompt. A causal decoder's outputs for these tokens are the same in all rows.
        """
        return self.table.shared_prefix(self.index)

    @classmethod
    def from_tokens(cls, rows: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Rows:
        """Rows in memory, from their ids and loss masks."""
        encoded = [
            EncodedRow(ids, loss_mask, Status.KEPT, len(ids), "memory", number)
            for number, (ids, loss_mask) in enumerate(rows, 1)
        ]
        return TokenTable([record_batch(encoded)]).kept()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> Row:
        return self.table.row(int(self.index[i]))

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """A hash of each row's tokens and loss mask: equal for identical rows."""
        hashes: npt.NDArray[np.uint64] = self.table.hash[self.index]
        return hashes

    @property
    def fingerprint(self) -> str:
        """A hash of all rows in their order; the same data has the same hash, whatever its path."""
        return hashlib.sha256(np.ascontiguousarray(self.hashes).tobytes()).hexdigest()[:16]

    def subset(self, positions: npt.NDArray[Any]) -> Rows:
        """The rows at these positions, in this order."""
        return Rows(self.table, self.index[positions])


def _flat(batch: pa.RecordBatch, column: str) -> tuple[Integers, npt.NDArray[Any]]:
    """The offsets and the joined values of a list column: row ``i`` is ``values[offsets[i] : offsets[i + 1]]``."""
    array = batch.column(column)
    return array.offsets.to_numpy(), array.values.to_numpy(zero_copy_only=True)


def _joined(batches: Sequence[pa.RecordBatch], column: str) -> npt.NDArray[Any]:
    arrays = [batch.column(column).to_numpy() for batch in batches]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)

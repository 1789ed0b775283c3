"""Tokenised rows in Arrow files, mapped into memory: opening costs nothing, and only what is read is loaded."""

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
    """What became of a row."""

    KEPT = 0
    TRUNCATED = 1
    """Kept, with the middle of its prompt cut out."""
    TOO_LONG = 2
    """Dropped."""
    NOTHING_TO_LEARN = 3
    """Dropped: no token that a loss could be computed for."""


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """A row as it goes into the table; ``ids`` and ``loss_mask`` are empty when it was dropped."""

    ids: Sequence[int]
    loss_mask: Sequence[bool]
    status: Status
    length: int
    """Tokens before anything was cut."""
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class Row:
    """One row to train on. ``loss_mask[t]`` says whether token ``t`` is learned."""

    input_ids: npt.NDArray[np.int32]  # (T,)
    loss_mask: npt.NDArray[np.bool_]  # (T,)
    source: str
    """``file:line``"""


_SCHEMA = pa.schema(
    [
        ("input_ids", pa.large_list(pa.int32())),
        ("learn", pa.large_list(pa.uint8())),  # bytes, not bits, so that a row is a view
        ("file", pa.dictionary(pa.int32(), pa.string())),
        ("line", pa.int64()),
        ("length", pa.int64()),
        ("tokens", pa.int64()),
        ("targets", pa.int64()),
        ("status", pa.int8()),
        ("hash", pa.uint64()),
    ]
)


def record_batch(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    """The rows as one Arrow record batch."""
    tokens = np.array([len(row.ids) for row in rows], dtype=np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(tokens)]), pa.int64())
    ids = np.fromiter(chain.from_iterable(row.ids for row in rows), np.int32, count=int(tokens.sum()))
    loss_mask = np.fromiter(chain.from_iterable(row.loss_mask for row in rows), np.uint8, count=int(tokens.sum()))
    ends = np.cumsum(tokens)
    pieces = list(zip(ends - tokens, ends, strict=True))
    columns: list[Any] = [
        pa.LargeListArray.from_arrays(offsets, pa.array(ids)),
        pa.LargeListArray.from_arrays(offsets, pa.array(loss_mask)),
        pa.array([row.file for row in rows], pa.string()).dictionary_encode(),
        np.array([row.line for row in rows], np.int64),
        np.array([row.length for row in rows], np.int64),
        tokens,
        # the first token of a row has nothing before it that could predict it
        np.array([int(loss_mask[start + 1 : end].sum()) for start, end in pieces], np.int64),
        np.array([row.status for row in rows], np.int8),
        np.array([_hash(ids[start:end], loss_mask[start:end]) for start, end in pieces], np.uint64),
    ]
    return pa.record_batch([pa.array(column) for column in columns], schema=_SCHEMA)


def _hash(ids: npt.NDArray[np.int32], loss_mask: npt.NDArray[np.uint8]) -> int:
    digest = hashlib.blake2b(ids.tobytes() + loss_mask.tobytes(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class TokenTable:
    """All rows of a dataset, the dropped ones included, over the Arrow batches that hold them."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._ids = [_flat(batch, "input_ids") for batch in batches]
        self._learn = [_flat(batch, "learn") for batch in batches]
        self._files = [batch.column("file") for batch in batches]
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])]).astype(np.int64)
        self.line, self.length, self.tokens, self.targets, self.status, self.hash = (
            _joined(batches, name) for name in ("line", "length", "tokens", "targets", "status", "hash")
        )

    @classmethod
    def open(cls, files: Iterable[Path]) -> TokenTable:
        """Map Arrow files into memory, in this order."""
        return cls(
            [batch for file in files for batch in pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_batches()]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def row(self, index: int) -> Row:
        """Row ``index`` as views into the file."""
        part, local = self._place(index)
        (offsets, ids), (_, loss_mask) = self._ids[part], self._learn[part]
        start, end = offsets[local], offsets[local + 1]
        return Row(ids[start:end], loss_mask[start:end].view(np.bool_), self.source(index))

    def source(self, index: int) -> str:
        """``file:line`` of row ``index``."""
        part, local = self._place(index)
        return f"{self._files[part][local].as_py()}:{self.line[index]}"

    def kept(self) -> Rows:
        """The rows to train on."""
        return Rows(self, np.flatnonzero(self.status <= Status.TRUNCATED))

    def shared_prefix(self, index: Integers) -> int:
        """See :attr:`Rows.shared_prefix`, of the rows at these places."""
        if not len(index):
            return 0
        first, shared_prefix = self.row(int(index[0])).input_ids, int(self.tokens[index].min()) - 1
        for part, ((offsets, ids), (_, loss_mask)) in enumerate(zip(self._ids, self._learn, strict=True)):
            here = index[(self._starts[part] <= index) & (index < self._starts[part + 1])] - self._starts[part]
            starts = offsets[here]
            for place in range(shared_prefix):
                if loss_mask[starts + place + 1].any() or (ids[starts + place] != first[place]).any():
                    shared_prefix = place
                    break
        return shared_prefix

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])


class Rows:
    """Some rows of a table, in some order. Reading one is O(1) and copies nothing."""

    def __init__(self, table: TokenTable, index: Integers) -> None:
        self.table = table
        self.index = index
        self.token_counts: Integers = table.tokens[index]
        """Tokens of each row."""
        self.target_counts: Integers = table.targets[index]
        """Tokens of each row that some position must predict."""

    @cached_property
    def shared_prefix(self) -> int:
        """Tokens that all rows begin with, and that predict nothing which is learned; less than any row has.

        A system prompt, mostly: what comes out of a decoder for them is the same in all rows.
        """
        return self.table.shared_prefix(self.index)

    @classmethod
    def from_tokens(cls, rows: Iterable[tuple[Sequence[int], Sequence[bool]]]) -> Rows:
        """Rows in memory from ids and which of them are learned."""
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
        """A hash of each row's tokens: equal for equal rows."""
        hashes: npt.NDArray[np.uint64] = self.table.hash[self.index]
        return hashes

    @property
    def fingerprint(self) -> str:
        """A hash of the rows' tokens in their order: the same data gives the same, wherever it lies."""
        return hashlib.sha256(np.ascontiguousarray(self.hashes).tobytes()).hexdigest()[:16]

    def subset(self, positions: npt.NDArray[Any]) -> Rows:
        """The rows at these positions, in their order."""
        return Rows(self.table, self.index[positions])


def _flat(batch: pa.RecordBatch, column: str) -> tuple[Integers, npt.NDArray[Any]]:
    array = batch.column(column)
    return array.offsets.to_numpy(), array.values.to_numpy(zero_copy_only=True)


def _joined(batches: Sequence[pa.RecordBatch], column: str) -> npt.NDArray[Any]:
    arrays = [batch.column(column).to_numpy() for batch in batches]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int64)

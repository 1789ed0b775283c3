"""Read rows from Parquet and Arrow files, a few at a time."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_lora.data.findings import Findings
from lit_lora.data.read.text_files import first_bytes, open_bytes
from lit_lora.errors import InputError, first_line

__all__ = ["read_arrow", "read_parquet"]

_ROWS_AT_ONCE = 1024
_BUFFER = 1 << 20
"""Bytes of a column read at once. Without it, or with pre_buffer, a whole row group is read: perhaps the whole file."""


def read_parquet(path: Path, findings: Findings) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a Parquet file.

    Raises:
        InputError: It is damaged.
    """
    with ExitStack() as stack:
        stack.enter_context(_named_errors(path, "Parquet"))
        file = stack.enter_context(pq.ParquetFile(_seekable(path, stack), buffer_size=_BUFFER, pre_buffer=False))
        yield from _numbered_rows(path, file.iter_batches(_ROWS_AT_ONCE))


def read_arrow(path: Path, findings: Findings) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of an Arrow file of either form: the stream that ``save_to_disk`` writes, or a file (Feather).

    Raises:
        InputError: It is damaged, or of Feather's first version.
    """
    if first_bytes(path, 4) == b"FEA1":
        raise InputError(
            f"{path}: an old Feather file (version 1)",
            hint="write it again: pyarrow.feather.write_feather(table, PATH)",
        )
    with ExitStack() as stack:
        stack.enter_context(_named_errors(path, "Arrow"))
        source = stack.enter_context(pa.PythonFile(_seekable(path, stack), "r"))
        batches = _file_batches(source) if first_bytes(path, 6) == b"ARROW1" else pa.ipc.open_stream(source)
        yield from _numbered_rows(path, batches)


def _file_batches(source: pa.PythonFile) -> Iterator[pa.RecordBatch]:
    file = pa.ipc.open_file(source)
    for index in range(file.num_record_batches):
        yield file.get_batch(index)


def _seekable(path: Path, stack: ExitStack) -> IO[bytes]:
    """The file's bytes; a gzipped file is unpacked on disk, because its readers jump back and forth."""
    file = stack.enter_context(open_bytes(path))
    if not isinstance(file, gzip.GzipFile):
        return file
    unpacked = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (the stack closes it)
    shutil.copyfileobj(file, unpacked)
    unpacked.seek(0)
    return unpacked


@contextmanager
def _named_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises about a damaged file into an error that names it.

    Raises:
        InputError: The file is damaged.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's; Arrow's own has no number
            raise
        hint = "download it again"
        if first_bytes(path, 1) in (b"{", b"["):
            hint = "its text looks like JSON: name it .jsonl"
        raise InputError(f"{path}: not a complete {kind} file ({first_line(error)})", hint=hint) from error


def _numbered_rows(path: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for row in _to_rows(path, batch.slice(start, _ROWS_AT_ONCE)):
                number += 1
                yield number, {name: _without_added_nulls(value) for name, value in row.items()}


def _to_rows(path: Path, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as Python values.

    Raises:
        InputError: A value cannot be one, such as a date after the year 9999.
    """
    columns = []
    for column in batch.columns:
        # Python's times have microseconds, and pandas wrote nanoseconds.
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
            column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
        columns.append(column)
    try:
        batch = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
        rows: list[dict[str, Any]] = batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, OverflowError, KeyError) as error:
        if isinstance(error, pa.ArrowException):
            raise
        raise InputError(f"{path}: a value cannot be read: {error}", hint="write the column as text") from error
    return rows


def _without_added_nulls(value: Any) -> Any:
    """The value without the nulls within its objects.

    Arrow gives all objects of a column the same keys, and those that a row did not have become null.
    """
    if isinstance(value, dict):
        return {name: _without_added_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_added_nulls(part) for part in value]
    return value

"""Files of rows: JSON Lines, JSON, CSV, Parquet and text, plain or gzipped, read row by row.

A byte order mark, CRLF line ends and blank lines are no problem; a broken row is an error that names file and line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from lit_lora.config import did_you_mean
from lit_lora.errors import InputError

__all__ = ["READERS", "NumberedRow", "is_data_file", "read_rows"]

NumberedRow: TypeAlias = tuple[int, dict[str, Any]]
"""The line (or for JSON lists and Parquet the row, from 1) and its columns."""

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_rows(path: Path) -> Iterator[NumberedRow]:
    """The rows of one file with their line or row numbers, lazily.

    Raises:
        InputError: The file is missing, damaged or of an unknown kind, or a row cannot be read.
    """
    kind = _kind(path)
    if kind not in READERS:
        known = ", ".join(READERS)
        raise InputError(
            f"{path}: unknown kind of data file{did_you_mean(kind, READERS)}",
            hint=f"known: {known}, each also with .gz",
        )
    try:
        yield from READERS[kind](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})", hint="save it as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged or cut off gzip file ({error})", hint="fetch it again") from error
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a complete Parquet file ({str(error).splitlines()[0]})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def is_data_file(path: Path) -> bool:
    """Whether the name is one of a file that ``read_rows`` knows."""
    return path.is_file() and _kind(path) in READERS and not path.name.startswith((".", "_"))


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"  # by content: a .gz that was unpacked in passing is read too
    return gzip.open(path, "rb") if zipped else open(path, "rb")  # type: ignore[return-value]


def _text(path: Path) -> str:
    with _open(path) as file:
        data = file.read()
    return data.decode("utf-16") if data.startswith(_UTF16) else data.decode("utf-8-sig")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines. Only a newline ends a line: JSON text may hold Unicode's other separators."""
    with _open(path) as file:
        if file.read(2) in _UTF16:
            yield from enumerate(_text(path).split("\n"), 1)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 text ({error.reason})", hint="save it as UTF-8"
                ) from error


def _read_jsonl(path: Path) -> Iterator[NumberedRow]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}:{number}: not valid JSON: {_json_problem(error, line)}") from error
        yield number, _object(row, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[NumberedRow]:
    """A list of objects, an object that holds one such list, or JSON Lines under the name ``.json``."""
    text = _text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.splitlines() if line.strip()]
        if lines and lines[0].rstrip().endswith("}") and lines[0].lstrip().startswith("{"):
            yield from _read_jsonl(path)
            return
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}:{line}: not valid JSON: {_json_problem(error, text)}") from error
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        data = lists[0] if len(lists) == 1 and len(data) <= 4 else [data]
    if not isinstance(data, list):
        raise InputError(f"{path}: expected a list of objects, got {type(data).__name__}")
    for number, row in enumerate(data, 1):
        yield number, _object(row, f"{path}:{number}")


def _read_csv(path: Path) -> Iterator[NumberedRow]:
    csv.field_size_limit(1 << 30)  # the module's default of 128 KiB is less than a long document
    text = _text(path)
    header = text.lstrip().partition("\n")[0]
    delimiter = max("\t,;", key=header.count) if any(sign in header for sign in "\t,;") else ","
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    columns: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            what = "a quote is opened here and never closed" if "unexpected end" in str(error) else str(error)
            raise InputError(f"{path}:{line}: not valid CSV: {what}") from error
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            columns = _header([cell.strip() for cell in cells], f"{path}:{line}")
        elif len(cells) != len(columns):
            raise InputError(
                f"{path}:{line}: {len(cells)} cells, expected {len(columns)} ({', '.join(columns)})",
                hint='a text with a comma or a line break stands in quotes: "…", and a quote inside is doubled',
            )
        else:
            yield line, dict(zip(columns, cells, strict=True))


def _header(columns: list[str], where: str) -> list[str]:
    repeated = {name for name in columns if columns.count(name) > 1}
    if repeated:
        raise InputError(f"{where}: the header names {', '.join(sorted(repeated))!r} more than once")
    return columns


def _read_parquet(path: Path) -> Iterator[NumberedRow]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _read_text(path: Path) -> Iterator[NumberedRow]:
    """A text file is one document."""
    yield 1, {"text": _text(path).replace("\r\n", "\n")}


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f'{where}: expected an object such as {{"prompt": …}}, got {json.dumps(row)[:60]}')
    return row


def _json_problem(error: Exception, text: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deep" if isinstance(error, RecursionError) else str(error)
    cut_off = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    return f"{error.msg} (column {error.colno})" + ("; the line looks cut off" if cut_off else "")


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}

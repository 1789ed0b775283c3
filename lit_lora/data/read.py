"""Files of rows: JSON Lines, JSON, CSV, Parquet and text, plain or gzipped, read row by row.

A byte order mark, CRLF line ends and blank lines are no problem; a broken row is an error that names file and line, and
a key that stands twice in a JSON object a warning, because only one of its values can be read.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from lit_lora import log
from lit_lora.config import did_you_mean
from lit_lora.data.report import name_rows
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


class _Decoder:
    """Decodes the JSON of one file and remembers which rows name a key twice."""

    def __init__(self) -> None:
        self.decode = json.JSONDecoder(object_pairs_hook=self._join).decode  # a hook costs what no hook costs
        self.found: dict[int, tuple[str, dict[str, Any]]] = {}
        """Such objects since they were last looked at, by ``id``, each with the key."""
        self._rows: list[str] = []
        self._keys: dict[str, None] = {}

    def _join(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            self.found[id(row)] = next(name for name in row if names.count(name) > 1), row
        return row

    def note(self, place: str, keys: Iterable[str]) -> None:
        """The row at ``file:line`` names these keys twice."""
        self._rows.append(place)
        self._keys.update(dict.fromkeys(keys))

    def warn(self) -> None:
        """Say what was noted."""
        if self._rows:
            keys = ", ".join(map(repr, self._keys))
            log.warn(f"{name_rows(self._rows)}: a key stands twice ({keys}); its last value is taken")


def _read_jsonl(path: Path) -> Iterator[NumberedRow]:
    decoder = _Decoder()
    try:
        for number, line in _lines(path):
            if not line.strip():
                continue
            try:
                row = decoder.decode(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not valid JSON: {_json_problem(error, line)}") from error
            if decoder.found:
                decoder.note(f"{path}:{number}", (key for key, _ in decoder.found.values()))
                decoder.found.clear()
            yield number, _object(row, f"{path}:{number}")
    finally:  # also where no more rows are wanted
        decoder.warn()


def _read_json(path: Path) -> Iterator[NumberedRow]:
    """A list of objects, an object that holds one such list, or JSON Lines under the name ``.json``."""
    text, decoder = _text(path), _Decoder()
    try:
        data = decoder.decode(text)
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
    if decoder.found:
        for number, row in enumerate(data, 1):
            if keys := [decoder.found[one][0] for one in _objects(row) if one in decoder.found]:
                decoder.note(f"{path}:{number}", keys)
        decoder.warn()
    for number, row in enumerate(data, 1):
        yield number, _object(row, f"{path}:{number}")


def _objects(value: Any) -> Iterator[int]:
    """``id`` of every object in a row, its own included."""
    if isinstance(value, dict):
        yield id(value)
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _objects(part)


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

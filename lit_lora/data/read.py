"""Read rows from JSON Lines, JSON, CSV, Parquet and text files, plain or gzipped.

A byte order mark, CRLF line endings and blank lines are accepted. A broken row is an error that names file and line; a
key repeated within a JSON object is a warning, because only its last value can be used.
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
from lit_lora.data.findings import Findings, name_rows
from lit_lora.errors import InputError

__all__ = ["READERS", "NumberedRow", "is_data_file", "read_rows"]

NumberedRow: TypeAlias = tuple[int, dict[str, Any]]
"""The line number (for JSON lists and Parquet the row number), from 1, and the columns."""

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_rows(path: Path, findings: Findings) -> Iterator[NumberedRow]:
    """The rows of one file with their line or row numbers, lazily.

    Args:
        path: The file.
        findings: Rows that cannot be read are added to its bad rows; reading goes on with the next.

    Raises:
        InputError: The file is missing, damaged or of an unknown kind.
    """
    kind = _kind(path)
    if kind not in READERS:
        raise InputError(
            f"{path}: unknown kind of data file{did_you_mean(kind, READERS)}",
            hint=f"known: {', '.join(READERS)}, each also with .gz",
        )
    try:
        yield from READERS[kind](path, findings)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason})", hint="save it as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged or truncated gzip file ({error})", hint="download it again") from error
    except pa.ArrowException as error:
        raise InputError(f"{path}: not a complete Parquet file ({str(error).splitlines()[0]})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def is_data_file(path: Path) -> bool:
    """Whether ``read_rows`` can read the file, judged by its name; hidden files are skipped."""
    return path.is_file() and _kind(path) in READERS and not path.name.startswith((".", "_"))


def _kind(path: Path) -> str:
    """The suffix that says how to read the file: ``.jsonl`` for ``rows.JSONL.gz``; empty without one."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _open(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        # By content, not by name: browsers and proxies may unpack a .gz and leave its name.
        is_gzip = file.read(2) == b"\x1f\x8b"
    if is_gzip:
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return open(path, "rb")


def _text(path: Path) -> str:
    with _open(path) as file:
        data = file.read()
    return data.decode("utf-16") if data.startswith(_UTF16) else data.decode("utf-8-sig")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers. Only a newline ends a line: JSON strings may contain Unicode's other separators."""
    with _open(path) as file:
        if file.read(2) in _UTF16:
            yield from enumerate(_text(path).split("\n"), 1)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"  # only the first line may have a byte order mark
            try:
                yield number, line.decode(encoding)
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 text ({error.reason})", hint="save it as UTF-8"
                ) from error


class _Decoder:
    """Decodes the JSON of one file, and collects the rows that repeat a key."""

    def __init__(self) -> None:
        # An object hook would see a plain dict, in which the repeated key is already lost.
        self.decode = json.JSONDecoder(object_pairs_hook=self._build_object).decode
        self.repeated: dict[int, tuple[str, dict[str, Any]]] = {}
        """Objects that repeat a key, by ``id``: the key, and the object itself, so that its ``id`` stays taken."""
        self._places: list[str] = []
        self._keys: dict[str, None] = {}  # a dict as an ordered set

    def _build_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            names = [name for name, _ in pairs]
            first_repeated = next(name for name in built if names.count(name) > 1)
            self.repeated[id(built)] = (first_repeated, built)
        return built

    def note(self, place: str, keys: Iterable[str]) -> None:
        """Note that the row at ``file:line`` repeats these keys."""
        self._places.append(place)
        self._keys.update(dict.fromkeys(keys))

    def warn(self) -> None:
        """Warn about all rows noted so far, in one line."""
        if self._places:
            keys = ", ".join(map(repr, self._keys))
            log.warn(f"{name_rows(self._places)}: repeated key ({keys}); the last value is used")


def _read_jsonl(path: Path, findings: Findings) -> Iterator[NumberedRow]:
    decoder = _Decoder()
    try:
        for number, line in _lines(path):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = decoder.decode(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place}: not valid JSON: {_json_problem(error, line)}") from error
            if decoder.repeated:
                decoder.note(place, (key for key, _ in decoder.repeated.values()))
                decoder.repeated.clear()
            yield number, _require_object(row, place)
    finally:  # also when the caller stops early
        decoder.warn()


def _read_json(path: Path, findings: Findings) -> Iterator[NumberedRow]:
    """A list of objects, an object that contains one such list, or JSON Lines named ``.json``."""
    text = _text(path)
    decoder = _Decoder()
    try:
        data = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        if _looks_like_jsonl(text):
            yield from _read_jsonl(path, findings)
            return
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}:{line}: not valid JSON: {_json_problem(error, text)}") from error

    rows = _row_list(data)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    if decoder.repeated:
        for number, row in enumerate(rows, 1):
            keys = [decoder.repeated[each][0] for each in _object_ids(row) if each in decoder.repeated]
            if keys:
                decoder.note(f"{path}:{number}", keys)
        decoder.warn()
    for number, row in enumerate(rows, 1):
        yield number, _require_object(row, f"{path}:{number}")


def _looks_like_jsonl(text: str) -> bool:
    """Whether the first line is an object of its own."""
    first_line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return first_line.startswith("{") and first_line.endswith("}")


def _row_list(data: Any) -> Any:
    """The rows in a JSON value: ``{"version": 1, "data": [{…}, …]}`` holds its only list, another object is one row."""
    if not isinstance(data, dict):
        return data
    lists = []
    for value in data.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lists.append(value)
    # A wrapper has few keys; with more, the object is a row that happens to contain a list.
    is_wrapper = len(lists) == 1 and len(data) <= 4
    return lists[0] if is_wrapper else [data]


def _object_ids(value: Any) -> Iterator[int]:
    """``id`` of every JSON object in a value, itself included."""
    if isinstance(value, dict):
        yield id(value)
        for part in value.values():
            yield from _object_ids(part)
    elif isinstance(value, list):
        for part in value:
            yield from _object_ids(part)


def _read_csv(path: Path, findings: Findings) -> Iterator[NumberedRow]:
    csv.field_size_limit(1 << 30)  # the default of 128 KiB is less than a long document
    text = _text(path)
    header = text.lstrip().partition("\n")[0]
    delimiter = max("\t,;", key=header.count)
    if delimiter not in header:  # a single column
        delimiter = ","
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    columns: list[str] | None = None
    while True:
        line = reader.line_num + 1  # where the row begins; a quoted cell may contain line breaks
        try:
            cells = next(reader, None)
        except csv.Error as error:
            reason = "a quote is opened but never closed" if "unexpected end" in str(error) else str(error)
            raise InputError(f"{path}:{line}: not valid CSV: {reason}") from error
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            columns = [cell.strip() for cell in cells]
            _require_distinct(columns, f"{path}:{line}")
        elif len(cells) != len(columns):
            raise InputError(
                f"{path}:{line}: {len(cells)} cells, expected {len(columns)} ({', '.join(columns)})",
                hint='put a text with a comma or a line break in quotes ("…"), and double the quotes inside',
            )
        else:
            yield line, dict(zip(columns, cells, strict=True))


def _require_distinct(columns: list[str], where: str) -> None:
    repeated = {name for name in columns if columns.count(name) > 1}
    if repeated:
        raise InputError(f"{where}: the header names {', '.join(sorted(repeated))!r} more than once")


def _read_parquet(path: Path, findings: Findings) -> Iterator[NumberedRow]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _read_text(path: Path, findings: Findings) -> Iterator[NumberedRow]:
    """A text file is one document."""
    yield 1, {"text": _text(path).replace("\r\n", "\n")}


def _require_object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f'{where}: expected an object such as {{"prompt": …}}, got {json.dumps(row)[:60]}')
    return row


def _json_problem(error: Exception, text: str) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return "nested too deeply" if isinstance(error, RecursionError) else str(error)
    problem = f"{error.msg} (column {error.colno})"
    truncated = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    return f"{problem}; the line looks truncated" if truncated else problem


READERS: dict[str, Callable[[Path, Findings], Iterator[NumberedRow]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}

"""Read rows from JSON Lines, JSON, CSV, Parquet, Arrow and text files, plain or gzipped.

A byte order mark, UTF-16, all line endings and blank lines are accepted. A row that cannot be read is added to the
findings with its line, and reading goes on; a file that cannot be read is an error.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from lit_lora.config import did_you_mean
from lit_lora.data.findings import Findings
from lit_lora.data.read.arrow_files import read_arrow, read_parquet
from lit_lora.data.read.csv_files import read_csv
from lit_lora.data.read.json_files import read_json
from lit_lora.data.read.text_files import first_bytes, is_web_page, read_text, require_data
from lit_lora.errors import InputError

__all__ = ["READERS", "NumberedRow", "is_data_file", "read_rows"]

NumberedRow: TypeAlias = tuple[int, dict[str, Any]]
"""The line number (for JSON lists, Parquet and Arrow the row number), from 1, and the columns."""

_INDEX_COLUMN = re.compile(r"Unnamed: 0(\.\d+)*|__index_level_\d+__")
"""A column that pandas writes to number the rows."""


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
        if path.is_file():
            require_data(path, plain_text=True)  # a workbook or an archive has a remedy of its own
        raise InputError(
            f"{path}: unknown kind of data file{did_you_mean(kind, READERS)}",
            hint=f"known: {', '.join(READERS)}, each also with .gz",
        )
    try:
        require_data(path, plain_text=READERS[kind] is _read_text)
        reader = _reader_by_content(path) or READERS[kind]
        for number, row in reader(path, findings):
            index_columns = [name for name in row if _INDEX_COLUMN.fullmatch(name)]
            for name in index_columns:
                del row[name]
            yield number, row
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not {error.encoding} text ({error.reason})", hint="save it as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged or truncated gzip file ({error})", hint="download it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def is_data_file(path: Path) -> bool:
    """Whether ``read_rows`` can read the file, judged by its name; hidden files are skipped."""
    return path.is_file() and _kind(path) in READERS and not path.name.startswith((".", "_"))


def _kind(path: Path) -> str:
    """The suffix that says how to read the file: ``.jsonl`` for ``rows.JSONL.gz``; empty without one."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _read_text(path: Path, findings: Findings) -> Iterator[NumberedRow]:
    """A text file is one document."""
    if is_web_page(first_bytes(path, 512)):
        findings.warn("that is a web page (HTML), whose tags are read as text", f"{path}:1")
    text = read_text(path)
    if text.lstrip().startswith(('{"', '[{"')):
        findings.warn("that looks like JSON and is read as plain text (name it .jsonl?)", f"{path}:1")
    yield 1, {"text": text}


_Reader: TypeAlias = Callable[[Path, Findings], Iterator[NumberedRow]]

READERS: dict[str, _Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".txt": _read_text,
    ".md": _read_text,
}


def _reader_by_content(path: Path) -> _Reader | None:
    """The reader of a file whose first bytes are unmistakable, whatever its name."""
    head = first_bytes(path, 6)
    if head.startswith(b"PAR1"):
        return read_parquet
    if head == b"ARROW1":
        return read_arrow
    return None

"""Read rows from CSV and TSV files, whatever separates and quotes their cells."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lit_lora.data.findings import Findings
from lit_lora.data.read.text_files import find_undecodable, open_text
from lit_lora.errors import InputError

__all__ = ["read_csv"]

_SAMPLE_LINES = 200
_LONGEST_ROW = 1 << 26
"""Characters after which a quote counts as never closed."""

_QUOTING_HINT = 'put a text with a comma or a line break in quotes ("…"), and double the quotes inside'
_NEVER_CLOSED = "a quote is opened but never closed"
_NO_DELIMITER = "\x1f"
_NUMBER = re.compile(r"[-+]?\d+([.,]\d+)?")

csv.field_size_limit(_LONGEST_ROW)  # the default of 128 KiB is less than a long document


def read_csv(path: Path, findings: Findings) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with a header line, each with the line in which it begins.

    Raises:
        InputError: The header line cannot be read.
    """
    with open_text(path, newline="") as file:  # a cell may contain line breaks
        sample = list(islice(file, _SAMPLE_LINES))
        if re.match(r"\s*(\{\s*\"|\[\s*\{)", "".join(sample)):
            raise InputError(f"{path}: JSON, not CSV", hint="name it .jsonl")
        dialect = _sniff(sample, is_tsv=path.name.lower().removesuffix(".gz").endswith(".tsv"))
        records = _records(chain(sample, file), dialect)
        header = _header(next(records, None), path, findings)
        if header is None:
            return
        after_bad_quote = False
        for record in records:
            where = f"{path}:{record.line}"
            if record.problem:
                findings.bad_row(where, f"not valid CSV: {record.problem}", _QUOTING_HINT)
                after_bad_quote = True
                continue
            row = _row(record, header, where, path, findings)
            if row is not None and after_bad_quote:
                findings.warn("after a badly quoted one, which may be a part of that", where)
            after_bad_quote = False
            if row is not None:
                yield record.line, row


@dataclass(frozen=True)
class _Dialect:
    """How a file separates and quotes its cells."""

    delimiter: str
    quote: str | None = '"'
    skip_spaces: bool = False
    """Whether a space follows each separator."""
    skip_first_line: bool = False
    """Whether the first line only names the separator."""

    def reader(self, lines: Iterable[str]) -> Iterator[list[str]]:
        return csv.reader(
            lines,
            delimiter=self.delimiter,
            quotechar=self.quote or '"',
            quoting=csv.QUOTE_MINIMAL if self.quote else csv.QUOTE_NONE,
            skipinitialspace=self.skip_spaces,
            strict=True,
        )


@dataclass(frozen=True)
class _Record:
    """A row of cells as it stands in the file, or what is wrong with it."""

    line: int
    text: str
    cells: list[str]
    problem: str = ""


def _records(lines: Iterable[str], dialect: _Dialect) -> Iterator[_Record]:
    """The rows of cells that are not blank.

    A badly quoted row ends with its first line: the next line is the beginning of a row.
    """
    numbered = enumerate(lines, 1)
    if dialect.skip_first_line:
        next(numbered)
    again: deque[tuple[int, str]] = deque()
    while True:
        taken: list[tuple[int, str]] = []
        reader = dialect.reader(_take_lines(again, numbered, taken))
        problem = ""
        cells: list[str] = []
        try:
            cells = next(reader, [])
        except csv.Error as error:
            problem = _problem(error)
        if not taken:
            return
        line, text = taken[0]
        if problem:
            again.extendleft(reversed(taken[1:]))
            yield _Record(line, text, [], problem)
        elif any(cell.strip() for cell in cells):
            yield _Record(line, "".join(text for _, text in taken), cells)


def _take_lines(
    again: deque[tuple[int, str]], lines: Iterator[tuple[int, str]], taken: list[tuple[int, str]]
) -> Iterator[str]:
    """Lines for one row: first those to read again, then those of the file; each is added to ``taken``."""
    size = 0
    while size < _LONGEST_ROW:
        line = again.popleft() if again else next(lines, None)
        if line is None:
            return
        taken.append(line)
        size += len(line[1])
        yield line[1]


def _problem(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return _NEVER_CLOSED
    if "expected after" in str(error):
        return "text after a closing quote"
    return str(error)


@dataclass(frozen=True)
class _Header:
    """The columns of a file."""

    names: list[str]
    """Their names; a column without one has an empty name."""

    def __str__(self) -> str:
        return ", ".join(name or "without a name" for name in self.names)


def _header(record: _Record | None, path: Path, findings: Findings) -> _Header | None:
    """The columns that the first row of cells names; None if there is none.

    Raises:
        InputError: It cannot be read, or names a column twice.
    """
    if record is None:
        return None
    where = f"{path}:{record.line}"
    if record.problem:
        raise InputError(f"{where}: not valid CSV: {record.problem}", hint=_QUOTING_HINT)
    undecodable = find_undecodable(record.text, path)
    if undecodable is not None:
        problem, hint = undecodable
        raise InputError(f"{where}: {problem}", hint=hint)

    names = [name.strip() for name in record.cells]
    repeated = {name for name in names if name and names.count(name) > 1}
    if repeated:
        listed = ", ".join(map(repr, sorted(repeated)))
        raise InputError(f"{where}: the header names {listed} more than once", hint="give each column its own name")
    if any(_looks_like_data(name) for name in names):
        findings.warn("taken for the names of the columns, which looks like data (is the header missing?)", where)
    return _Header(names)


def _looks_like_data(name: str) -> bool:
    return bool(_NUMBER.fullmatch(name)) or len(name) > 80 or name.endswith((".", "!"))


def _row(record: _Record, header: _Header, where: str, path: Path, findings: Findings) -> dict[str, Any] | None:
    """The cells under their columns' names; None if the row is bad."""
    undecodable = find_undecodable(record.text, path)
    if undecodable is not None:
        findings.bad_row(where, *undecodable)
        return None
    cells = record.cells
    names = header.names
    while len(cells) > len(names) and not cells[-1].strip():  # spreadsheets append separators
        cells = cells[:-1]
    if len(cells) != len(names):
        found = "1 cell" if len(cells) == 1 else f"{len(cells)} cells"
        findings.bad_row(where, f"{found}, expected {len(names)} ({header})", _QUOTING_HINT)
        return None

    row: dict[str, Any] = {}
    for name, cell in zip(names, cells, strict=True):
        if name:
            row[name] = cell.replace("\r\n", "\n")
        elif cell.strip() and not _NUMBER.fullmatch(cell.strip()):  # numbers are an index, as pandas writes it
            findings.warn("with text in a column without a name, which is not used", where)
    return row


def _sniff(lines: list[str], *, is_tsv: bool) -> _Dialect:
    """How the file separates and quotes cells: the way in which most of its first rows have a cell per column."""
    if is_tsv:
        return _best(lines, [_Dialect("\t"), _Dialect("\t", None)])
    first = re.fullmatch(r'"?sep=(.)"?\s*', lines[0]) if lines else None
    if first is not None:
        return _Dialect(first[1], skip_first_line=True)

    header = next((line for line in lines if line.strip()), "")
    delimiters = [delimiter for delimiter in ",;\t|" if delimiter in header]
    if not delimiters:
        return _Dialect(_NO_DELIMITER)  # one column: commas in it are text
    dialects = []
    for delimiter in delimiters:
        spaces = f"{delimiter} " in header
        dialects.append(_Dialect(delimiter, skip_spaces=spaces))
    for delimiter in delimiters:
        dialects.append(_Dialect(delimiter, "'"))
    for delimiter in delimiters:
        dialects.append(_Dialect(delimiter, None))
    return _best(lines, dialects)


def _best(lines: list[str], dialects: list[_Dialect]) -> _Dialect:
    """The dialect that leaves the fewest rows unreadable; the double quote is given up for good reasons only."""
    unreadable = {dialect: _count_unreadable(lines, dialect) for dialect in dialects}
    best = min((dialect for dialect in dialects if dialect.quote == '"'), key=lambda dialect: unreadable[dialect])
    for dialect in dialects:
        is_single = dialect.quote == "'" and _has_quoted_cell(lines, dialect)
        if is_single and (unreadable[dialect] < unreadable[best] or _all_quoted(lines, dialect)):
            best = dialect
    for dialect in dialects:
        # One badly quoted row is an error in it; several in a file without a well quoted one are its manner.
        is_unquoted = dialect.quote is None and unreadable[dialect] + 3 <= unreadable[best]
        if is_unquoted and not _has_quoted_cell(lines, best):
            best = dialect
    return best


def _count_unreadable(lines: list[str], dialect: _Dialect) -> int:
    """Number of rows without a cell for each column; all, if there are fewer than two columns."""
    columns = 0
    count = 0
    for record in _records(lines, dialect):
        if record.problem == _NEVER_CLOSED and len(lines) == _SAMPLE_LINES:
            break  # the sample may end within a cell
        columns = columns or len(record.cells)
        if record.problem or len(record.cells) != columns or columns < 2:
            count += 1
    return count


def _all_quoted(lines: list[str], dialect: _Dialect) -> bool:
    """Whether every column's name is in the dialect's quotes."""
    header = next((line.strip() for line in lines if line.strip()), "")
    names = header.split(dialect.delimiter)
    return all(len(name) > 1 and name[0] == name[-1] == dialect.quote for name in map(str.strip, names))


def _has_quoted_cell(lines: list[str], dialect: _Dialect) -> bool:
    """Whether a readable row has a cell in the dialect's quotes."""
    opening = f"{dialect.delimiter}{dialect.quote}"
    for record in _records(lines, dialect):
        if not record.problem and f"{dialect.delimiter}{record.text}".count(opening):
            return True
    return False

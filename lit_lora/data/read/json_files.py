"""Read rows from JSON in whatever arrangement: lines, a list, objects one after another, or one document.

The arrangement is told by content, not by name. Lines and lists are read value by value, so that the size of the file
does not matter; one object that holds all rows is read whole (:mod:`lit_lora.data.read.json_documents`).
"""

from __future__ import annotations

import ast
import io
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from lit_lora.data.findings import Findings
from lit_lora.data.formats.turns import is_message
from lit_lora.data.read.json_documents import document_rows, starts_conversation, wrap_messages
from lit_lora.data.read.json_stream import JsonStream, ends_early, skip_separators
from lit_lora.data.read.text_files import find_undecodable, open_text
from lit_lora.errors import InputError

__all__ = ["read_json"]

_HEAD = 1 << 20
"""Characters that decide about the arrangement."""

_HEAD_OF_LINES = 1 << 14
"""Of these, characters in which a line of its own is looked for."""

_PYTHON = re.compile(r"""\A[\[{\s]*'|\b(None|True|False)\b""")
"""What JSON has not and a printed Python value has."""

_NumberedValue: TypeAlias = tuple[int, Any]
"""The line, or the number in a list; the decoded value."""


def read_json(path: Path, findings: Findings) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON or JSON Lines file."""
    reader = _Reader(path, findings)
    with open_text(path) as file:
        yield from reader.rows(file)


class _Decoder:
    """Decodes JSON, and remembers what a plain dict cannot show: repeated keys, and numbers that are not finite."""

    def __init__(self) -> None:
        # An object hook would see a plain dict, in which the repeated key is already lost.
        self._json = json.JSONDecoder(
            object_pairs_hook=self._build_object, parse_constant=self._float, parse_float=self._float
        )
        self.decode = self._json.decode
        self.raw_decode = self._json.raw_decode
        self.repeated: dict[int, tuple[str, dict[str, Any]]] = {}
        """Objects that repeat a key, by ``id``: the key, and the object itself, so that its ``id`` stays taken."""
        self.not_finite = False
        """Whether a NaN or an infinite number was decoded."""

    def forget(self) -> None:
        """Forget what was remembered about earlier values."""
        self.repeated.clear()
        self.not_finite = False

    def _build_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) < len(pairs):
            names = [name for name, _ in pairs]
            first_repeated = next(name for name in built if names.count(name) > 1)
            self.repeated[id(built)] = (first_repeated, built)
        return built

    def _float(self, text: str) -> float:
        number = float(text)  # 1e400 is infinite
        self.not_finite = self.not_finite or not math.isfinite(number)
        return number


class _Reader:
    """Reads the rows of one file."""

    def __init__(self, path: Path, findings: Findings) -> None:
        self._path = path
        self._findings = findings
        self._decoder = _Decoder()

    def rows(self, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a text, whatever their arrangement."""
        head = file.read(_HEAD)
        if _is_lines(head):
            yield from self._line_rows(_chain_lines(head, file))
            return
        stream = JsonStream(head, file, self._decoder.raw_decode)
        if stream.peek() == "[":
            yield from self._list_rows(stream)
        else:
            yield from self._sequence_rows(stream)

    def _line_rows(self, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of lines; a line alone may hold all rows."""
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        first_two = list(islice(numbered, 2))
        for number, line in chain(first_two, numbered):
            values = self._line_values(number, line)
            if len(first_two) == len(values) == 1:
                yield from self._document(number, values[0])
                return
            for value in values:
                yield from self._value_rows(number, value)

    def _line_values(self, number: int, line: str) -> list[Any]:
        """The value of a line, or several where a line break between objects is missing; none if it is bad."""
        # Objects may be joined by commas, and files with a byte order mark by each other.
        text = line.strip().lstrip("\ufeff").rstrip(",")
        if self._is_undecodable(number, text):
            return []
        self._decoder.forget()
        values = []
        position = 0
        try:
            while position < len(text):
                value, position = self._decoder.raw_decode(text, position)
                values.append(value)
                position = skip_separators(text, position)
        except (ValueError, RecursionError) as error:
            python = _python_value(text)
            if python is not None:
                self._findings.note("written as Python, not as JSON", f"{self._path}:{number}")
                return [python]
            problem = _problem(error)
            if isinstance(error, json.JSONDecodeError) and ends_early(error, text):
                problem += "; the line looks truncated"
            self._bad_row(number, f"not valid JSON: {problem}")
            return []
        return values

    def _sequence_rows(self, stream: JsonStream) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of values that span lines, one after another; a value alone may hold all rows."""
        is_first = True
        while stream.peek():
            number = stream.line
            for value in self._take(stream, number):
                if is_first and not stream.peek():
                    yield from self._document(number, value)
                else:
                    yield from self._value_rows(number, value)
            is_first = False

    def _items(self, stream: JsonStream) -> Iterator[_NumberedValue]:
        """The items of a list, and of lists that follow it."""
        number = 0
        stream.skip("[")
        while stream.peek():
            if stream.peek() == "]":
                stream.skip("]")
                if not stream.peek():
                    return
                if stream.peek() == "[":
                    stream.skip("[")
                continue
            number += 1
            for value in self._take(stream, number):
                yield number, value
        self._bad_row(number, "the list is not closed after this row: the file looks truncated")

    def _take(self, stream: JsonStream, number: int) -> Iterator[Any]:
        """The next value, or none if it is bad.

        Raises:
            InputError: It is bad, and there is no telling where the next begins.
        """
        self._decoder.forget()
        try:
            value, text = stream.take()
        except (ValueError, RecursionError) as error:
            line = stream.line_of(error)
            problem = _problem(error)
            is_cut = stream.is_cut(error)
            if not stream.resynchronize():
                if is_cut:
                    problem += "; the file looks truncated"
                raise InputError(
                    f"{self._path}:{line}: not valid JSON: {problem}",
                    hint="correct the file or write it again; what follows cannot be read",
                ) from error
            self._bad_row(number, f"not valid JSON: {problem}, in line {line}")
            return
        if not self._is_undecodable(number, text):
            yield value

    # From values to rows

    def _list_rows(self, stream: JsonStream) -> Iterator[tuple[int, dict[str, Any]]]:
        python = _python_value(stream.rest) if _PYTHON.match(stream.rest) and stream.ended else None
        if isinstance(python, list):
            values: Iterator[_NumberedValue] = iter(enumerate(python, 1))
            self._findings.note("written as Python, not as JSON", f"{self._path}:1")
        else:
            values = self._items(stream)
        first = next(values, None)
        if first is None:
            return
        if starts_conversation(first[1]):  # a conversation that is a list by itself
            messages = [first[1], *(value for _, value in values)]
            yield from self._value_rows(1, messages)
            return
        for number, value in chain([first], values):
            yield from self._value_rows(number, value)

    def _document(self, number: int, value: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of the only value of a file."""
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "[", '"'):
            yield from self.rows(io.StringIO(value))  # encoded twice
            return
        if isinstance(value, list):
            yield from self._unpack_list(value)
            return
        if not isinstance(value, dict):
            raise InputError(
                f"{self._path}: expected a list of objects, got {type(value).__name__}",
                hint='write a row per line: {"prompt": …, "completion": …}',
            )
        rows = document_rows(value, self._path, self._findings)
        if rows is None:
            yield from self._row(number, value)
            return
        if id(value) in self._decoder.repeated:
            self._warn_repeated([self._decoder.repeated[id(value)][0]], 1)
        for row_number, row in enumerate(rows, 1):
            yield from self._value_rows(row_number, row)

    def _unpack_list(self, value: list[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        if value and starts_conversation(value[0]):
            yield from self._value_rows(1, value)
            return
        for number, item in enumerate(value, 1):
            yield from self._value_rows(number, item)

    def _value_rows(self, number: int, value: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """The row that a value is; none if it is bad."""
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            try:
                value = self._decoder.decode(value)  # encoded twice
            except (ValueError, RecursionError) as error:
                self._bad_row(number, f"text that is not valid JSON: {_problem(error)}")
                return
        if isinstance(value, list) and value:
            if all(map(is_message, value)):
                value = wrap_messages(value)
            elif len(value) == 1 and isinstance(value[0], dict):  # a list per line, of one row each
                value = value[0]
        if not isinstance(value, dict):
            shown = json.dumps(value, ensure_ascii=False, default=str)[:60]
            problem = f'expected an object such as {{"prompt": …}}, got {shown}'
            self._findings.bad_row(f"{self._path}:{number}", problem, "write each row as an object with its columns")
            return
        yield from self._row(number, value)

    def _row(self, number: int, row: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._decoder.repeated:
            ids = _object_ids(row)
            keys = [self._decoder.repeated[each][0] for each in ids if each in self._decoder.repeated]
            if keys:
                self._warn_repeated(keys, number)
        if self._decoder.not_finite:
            for name, value in row.items():
                if isinstance(value, float) and math.isnan(value):
                    row[name] = None  # tables use it for a missing value
            key = next(_not_finite(row), None)
            if key is not None:
                self._bad_row(number, f"{key}: NaN or an infinite number, which JSON has not")
                return
        yield number, row

    # What is noticed

    def _bad_row(self, number: int, problem: str) -> None:
        self._findings.bad_row(f"{self._path}:{number}", problem)

    def _warn_repeated(self, keys: Iterable[str], number: int) -> None:
        names = ", ".join(map(repr, dict.fromkeys(keys)))
        self._findings.warn(f"with a repeated key ({names}), of which the last value is used", f"{self._path}:{number}")

    def _is_undecodable(self, number: int, text: str) -> bool:
        undecodable = find_undecodable(text, self._path)
        if undecodable is None:
            return False
        problem, hint = undecodable
        self._findings.bad_row(f"{self._path}:{number}", problem, hint)
        return True


def _is_lines(head: str) -> bool:
    """Whether a text that begins so has a value per line; else its values span lines."""
    lines = [line for line in head[:_HEAD_OF_LINES].split("\n") if line.strip()]
    text = lines[0].strip() if lines else ""
    # A value that goes on in the next line breaks off after one of these; else the line is broken.
    goes_on = text.endswith(("{", "[", ",", ":"))
    if text.startswith("{") and not goes_on and any(_is_object(line) for line in lines[1:]):
        return True
    text = text.rstrip(",")
    try:
        json.loads(text)
    except RecursionError:
        return True
    except json.JSONDecodeError as error:
        if text.startswith("["):
            return _python_value(text) is not None
        # What is wrong in the middle of a line does not go on in the next.
        is_prefix = error.pos >= len(text) or error.msg == "Extra data"
        return not is_prefix
    return True


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object that is not part of another value: within one, it would be indented."""
    if not line.startswith("{"):
        return False
    try:
        json.loads(line.rstrip().rstrip(","))
    except (ValueError, RecursionError):
        return False
    return True


def _chain_lines(head: str, file: TextIO) -> Iterator[str]:
    """The lines of a file of which ``head`` has been read."""
    lines = head.split("\n")
    yield from lines[:-1]
    yield lines[-1] + file.readline()
    yield from file


def _python_value(text: str) -> dict[str, Any] | list[Any] | None:
    """An object or a list as Python prints it; None if it is something else."""
    if _PYTHON.search(text) is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an escape that Python does not know is no Python
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, dict | list) else None


def _object_ids(value: Any) -> Iterator[int]:
    """``id`` of every JSON object in a value, itself included."""
    if isinstance(value, dict):
        yield id(value)
        for part in value.values():
            yield from _object_ids(part)
    elif isinstance(value, list):
        for part in value:
            yield from _object_ids(part)


def _not_finite(value: Any, name: str = "") -> Iterator[str]:
    """The keys of numbers that are not finite, such as ``answer.x``."""
    if isinstance(value, float) and not math.isfinite(value):
        yield name
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _not_finite(part, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for part in value:
            yield from _not_finite(part, name)


def _problem(error: Exception) -> str:
    """What the decoder found wrong."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return str(error)

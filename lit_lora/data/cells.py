"""A cell as text, written as a person would write it, and templates that put several cells into one text."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Container, Mapping
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

from lit_lora.config import did_you_mean
from lit_lora.errors import InputError

__all__ = ["as_json_value", "as_text", "cell", "columns_in", "columns_read", "is_empty", "require_text"]

_PLACEHOLDER = re.compile(r"\{([^{}\"':,\n]+)\}")
"""A column name in a template: ``{name}``. Braces around anything else, such as JSON, are plain text."""

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]")
"""A step into a value: ``.text`` or ``[0]``."""


def as_text(value: Any) -> str:
    """A cell as text: null is empty; a list or an object is written as JSON.

    NaN, which tables use for a missing value, is empty too. A whole number has no ``.0``: tables write a column of
    whole numbers with such a value in it as decimals. A number of 32 bits has the digits that it was written with.

    Raises:
        ValueError: The value has no text: infinite numbers, NaN within an object, bytes that are no text, or half of a
            surrogate pair, which no tokenizer accepts.
    """
    value = _plain(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, float):
        _require_finite(value)
        text = str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    elif isinstance(value, Decimal):
        text = "" if value.is_nan() else f"{value:f}"
    else:
        text = json.dumps(as_json_value(value), ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair (an emoji cut in two?) at character {error.start}") from None
    return text


def require_text(value: Any, column: str, source: str) -> None:
    """Check that a cell of a prompt is no list or object, which would be learned as JSON.

    Args:
        value: The cell.
        column: The format's column.
        source: The file's column, for the error and its hint.

    Raises:
        InputError: It is one.
    """
    if isinstance(value, Mapping):
        what = "an object"
        path = f".{next(iter(value), 'KEY')}"
    elif isinstance(value, list | tuple):
        what = "a list"
        path = "[0]"
    else:
        return
    raise InputError(
        f"{source}: expected text, got {what}",
        hint=f'take a value out of it, columns: {{{column}: "{{{source}{path}}}"}}, '
        f'or write all of it as JSON, columns: {{{column}: "{{{source}}}"}}',
    )


def is_empty(value: Any) -> bool:
    """Whether a cell has nothing in it: null, NaN, blank text, or an empty list or object."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, Mapping | list) and not value)


def _plain(value: Any) -> Any:
    """A value of Arrow, NumPy or Python as one of JSON's or as a decimal; what is within it stays as it is."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("bytes that are not UTF-8 text") from None
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ").removesuffix(" 00:00:00")  # a date, as tables store it
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta | UUID):
        return str(value)
    if isinstance(value, float):
        return _short_float(value)
    if value is None or isinstance(value, str | bool | int | Decimal | list | Mapping):
        return value
    raise ValueError(f"a value of type {type(value).__name__}, which has no text")


def _short_float(value: float) -> float:
    """0.1 for 0.10000000149011612, which is the 32-bit number nearest to 0.1.

    A number with so many digits is a 32-bit one only if it was stored as such: by chance, 1 in 500 million would be.
    """
    if len(repr(value)) > 12 and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def as_json_value(value: Any) -> Any:
    """The value in JSON's types, however deep.

    Raises:
        ValueError: JSON has no such value.
    """
    value = _plain(value)
    if isinstance(value, Mapping):
        return {str(name): as_json_value(part) for name, part in value.items()}
    if isinstance(value, list):
        return [as_json_value(part) for part in value]
    if isinstance(value, Decimal):
        number = float(value)
        _require_finite(number)
        return number if Decimal(repr(number)) == value else f"{value:f}"  # as text, no digit is lost
    if isinstance(value, float):
        _require_finite(value)
    return value


def _require_finite(number: float) -> None:
    if math.isnan(number):
        raise ValueError("NaN within an object or a list: JSON has no such number")
    if math.isinf(number):
        raise ValueError("an infinite number, which JSON cannot write (1e400 is one, too)")


def columns_read(columns: Mapping[str, str], row: Container[str] = ()) -> set[str]:
    """All of the file's columns that a mapping reads; see :func:`columns_in`."""
    return {name for source in columns.values() for name in columns_in(source, row)}


def columns_in(source: str, row: Container[str] = ()) -> list[str]:
    """The file's columns that a source names: the source itself, or those in its braces.

    Args:
        source: A column, or a template such as ``{title}: {answers.text[0]}``.
        row: The file's columns; a name with dots and brackets that is one of them is not a path.
    """
    if source in row:
        return [source]
    placeholders = _PLACEHOLDER.findall(source)
    if not placeholders:
        return [source]
    return [name if name in row else re.split(r"[.\[]", name, maxsplit=1)[0] for name in placeholders]


def cell(row: Mapping[str, Any], source: str) -> Any:
    """A column's value, or a template filled with the columns' values.

    Raises:
        ValueError: The row lacks the column, or its value has no such part.
    """
    if source in row:
        return row[source]
    if not _PLACEHOLDER.search(source):
        return _part(row, source)
    return _PLACEHOLDER.sub(lambda match: as_text(_part(row, match[1])), source)


def _part(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or what a path such as ``answers.text[0]`` finds in it."""
    if path in row:
        return row[path]
    column = re.split(r"[.\[]", path, maxsplit=1)[0]
    if column not in row:
        raise ValueError(f"no column {path!r}{did_you_mean(path, row)}, found: {', '.join(row) or 'none'}")

    value = row[column]
    reached = column
    for step in _STEP.finditer(path, len(column)):
        if value is None:
            return None
        key, index = step.groups()
        if key is not None and isinstance(value, Mapping) and key in value:
            value = value[key]
        elif index is not None and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            raise ValueError(f"{path}: {reached} has no {step[0]}, {_contents(value)}")
        reached += step[0]
    if reached != path:
        raise ValueError(f"{path}: cannot be read as a path, expected one such as {column}.text or {column}[0]")
    return value


def _contents(value: Any) -> str:
    """What can be asked of a value, for an error."""
    if isinstance(value, Mapping):
        return f"found: {', '.join(map(str, value)) or 'nothing'}"
    if isinstance(value, list):
        return f"it is a list of {len(value)}"
    return "it is no list or object"

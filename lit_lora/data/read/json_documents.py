"""The rows within one JSON object: a wrapper, splits, or a table written by columns or by rows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from lit_lora.data.findings import Findings
from lit_lora.data.formats import FORMATS, load_format
from lit_lora.data.formats.messages import exchange_keys
from lit_lora.data.formats.turns import is_message
from lit_lora.errors import InputError

__all__ = ["document_rows", "starts_conversation", "wrap_messages"]

_SPLIT = re.compile(r"(train|training|test|testing|validation|valid|val|dev|eval)([_-].*)?", re.IGNORECASE)
_FIRST_ROLES = ("system", "developer", "user", "human")


def starts_conversation(value: Any) -> bool:
    """Whether the first item of a list says that the list is a conversation: rows may have a ``from`` of their own."""
    if not is_message(value):
        return False
    return value.get("role", value.get("from")) in _FIRST_ROLES


def wrap_messages(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a conversation that is a list by itself."""
    column = "messages" if "role" in messages[0] else "conversations"
    return {column: messages}


def document_rows(document: dict[str, Any], path: Path, findings: Findings) -> list[Any] | None:
    """The rows that one object holds; None if the object is a row itself.

    Args:
        document: All of a file.
        path: The file, for errors.
        findings: Counts the rows of splits that are left out.

    Raises:
        InputError: The object holds no training rows, or there is no telling which.
    """
    splits = _splits(document)
    if splits:
        return _training_rows(splits, path, findings)
    if isinstance(document.get("data"), list) and isinstance(document.get("columns"), list):
        return _split_table(document, path)
    if isinstance(document.get("schema"), dict) and isinstance(document.get("data"), list):
        return _schema_table(document)

    values = list(document.values())
    if values and all(isinstance(value, list) for value in values) and _is_table(document):
        return _from_columns(document, path)
    if values and all(isinstance(value, dict) and value for value in values):
        if len(values) == 1 and not _is_row(document):  # a wrapper around another arrangement
            return document_rows(values[0], path, findings) or values
        return _from_objects(document)
    return _wrapped_rows(document, path)


def _splits(document: dict[str, Any]) -> dict[str, Any]:
    """The splits of a document that has nothing else than splits, and perhaps single values about them."""
    if _is_row(document):
        return {}
    parts = {name: value for name, value in document.items() if isinstance(value, list | dict)}
    if parts and all(_SPLIT.fullmatch(name) for name in parts):
        return parts
    return {}


def _training_rows(splits: dict[str, Any], path: Path, findings: Findings) -> list[Any]:
    training: list[Any] = []
    for name, value in splits.items():
        rows = value
        if isinstance(value, dict):
            rows = document_rows(value, path, findings)
            if rows is None:
                rows = [value]
        if name.lower().startswith("train"):
            training += rows
            continue
        for number in range(1, len(rows) + 1):
            findings.warn(f"in the split {name!r}, which is left out", f"{path}:{name}[{number}]")
    if not training:
        raise InputError(
            f"{path}: no training rows, found the splits {', '.join(splits)}",
            hint="write the rows to train on to a file of their own",
        )
    return training


def _split_table(document: dict[str, Any], path: Path) -> list[Any]:
    """A table as ``{"columns": […], "data": [[…], …]}``."""
    columns = document["columns"]
    rows = []
    for number, cells in enumerate(document["data"], 1):
        if not isinstance(cells, list) or len(cells) != len(columns):
            raise InputError(
                f"{path}: row {number} of data does not have a cell for each of columns ({len(columns)})",
                hint="write it again, or as a list of objects",
            )
        rows.append(dict(zip(map(str, columns), cells, strict=True)))
    return rows


def _schema_table(document: dict[str, Any]) -> list[Any]:
    """A table as ``{"schema": {…}, "data": [{…}, …]}``, without its index."""
    index = document["schema"].get("primaryKey") or []
    rows = []
    for row in document["data"]:
        if isinstance(row, dict):
            rows.append({name: value for name, value in row.items() if name not in index})
        else:
            rows.append(row)
    return rows


def _is_table(document: dict[str, list[Any]]) -> bool:
    """Whether lists are columns: a row may have lists too, but of messages or other objects."""
    has_objects = False
    for name, values in document.items():
        if any(isinstance(value, dict) for value in values):
            has_objects = True
        elif values and _is_row({name}):
            return True  # a prompt is one text, so several are those of several rows
    return not has_objects


def _from_columns(document: dict[str, Any], path: Path) -> list[Any]:
    """A table as ``{"prompt": […], "completion": […]}``.

    Raises:
        InputError: The columns are not of one length.
    """
    lengths = {name: len(values) for name, values in document.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise InputError(
            f"{path}: a list per column, but of different lengths: {found}",
            hint="give all columns as many values",
        )
    return [dict(zip(document, values, strict=True)) for values in zip(*document.values(), strict=True)]


def _from_objects(document: dict[str, dict[str, Any]]) -> list[Any] | None:
    """A table of objects: by column, or by row; None if the object is a row."""
    inner_names = {name for value in document.values() for name in value}
    if all(name.isdigit() for name in inner_names):
        rows: dict[str, dict[str, Any]] = {}
        for column, cells in document.items():
            for index, cell in cells.items():
                rows.setdefault(index, {})[column] = cell
        return list(rows.values())

    is_numbered = all(name.isdigit() for name in document)
    if is_numbered or (_is_row(inner_names) and not _is_row(document)):
        return list(document.values())
    return None


def _wrapped_rows(document: dict[str, Any], path: Path) -> list[Any] | None:
    """The only list of rows in a wrapper such as ``{"version": 1, "data": [{…}, …]}``; None if it is a row."""
    lists: dict[str, list[Any]] = {}
    for name, value in document.items():
        if isinstance(value, list) and value and _is_row_like(name, value[0]):
            lists[name] = value
    others = document.keys() - lists.keys()
    if not lists or _is_row(others):
        return None
    if len(lists) > 1:
        raise InputError(
            f"{path}: several lists of rows ({', '.join(lists)}), expected one",
            hint="write each list to a file of its own",
        )
    (rows,) = lists.values()
    return rows


def _is_row_like(column: str, value: Any) -> bool:
    """Whether the first item of a list in this column may be a row."""
    if isinstance(value, list):  # perhaps a conversation
        return bool(value) and is_message(value[0])
    if not isinstance(value, dict) or is_message(value):
        return False
    # A conversation may be a list of exchanges.
    is_exchange = _is_row({column}) and exchange_keys(value) is not None
    return not is_exchange


def _is_row(names: Iterable[str]) -> bool:
    """Whether one of these names is that of a column to read."""
    return not _column_names().isdisjoint(name.lower() for name in names)


@cache
def _column_names() -> frozenset[str]:
    """The names of the columns that the formats need."""
    names = {"chosen", "rejected"}
    for name in FORMATS:
        format_ = load_format(name)
        names.update(format_.required)
        for aliases in format_.aliases.values():
            names.update(aliases)
    return frozenset(names)

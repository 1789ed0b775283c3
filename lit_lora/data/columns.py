"""From the columns of a file to those of a format: detection, mapping, and errors that say what to write."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lit_lora.config import did_you_mean
from lit_lora.data.config import DataConfig
from lit_lora.data.formats import FORMATS, load_format
from lit_lora.data.sample import Conversation, Format, Sample, as_text
from lit_lora.errors import InputError, UsageError

__all__ = ["RowReader", "cell", "choose_format", "columns_in", "guess_columns"]

_PLACE = re.compile(r"\{([^{}\"':,\n]+)\}")
"""A column in a text: ``{name}``. Braces around anything else, such as JSON, stay as they are."""

_GUESSES = {
    "prompt": (
        "question",
        "query",
        "input",
        "instruction",
        "text",
        "sentence",
        "review",
        "document",
        "article",
        "goal",
    ),
    "completion": (
        "answer",
        "response",
        "output",
        "label",
        "target",
        "intent",
        "summary",
        "slots",
        "category",
        "class",
    ),
    "text": ("content", "document", "body", "passage"),
}
_ABOUT_A_TEXT = {"id", "idx", "_id", "url", "source", "meta", "metadata", "title", "timestamp", "date", "language"}


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one dataset in the format that was chosen for it."""

    name: str
    format: Format
    columns: Mapping[str, str]
    """The format's column -> the file's column, or a text with the file's columns in braces."""
    values: Mapping[str, Mapping[str, str]]
    system: str | None
    unused: tuple[str, ...]
    """Columns of the first row that nothing reads."""

    def sample(self, row: Mapping[str, Any], where: str) -> Sample:
        """The row as a conversation or a text.

        Args:
            row: The file's columns.
            where: ``file:line`` for the error.

        Raises:
            InputError: A column is missing or its value has a wrong shape.
        """
        try:
            row = {name: self._word(name, value) if name in self.values else value for name, value in row.items()}
            sample = self.format.read({name: cell(row, source) for name, source in self._sources(row)})
        except (ValueError, KeyError) as error:
            message = str(error.args[0]) if error.args else str(error)
            raise InputError(f"{where}: {message}") from error
        if self.system and isinstance(sample, Conversation) and sample.messages[0]["role"] != "system":
            return replace(sample, messages=[{"role": "system", "content": self.system}, *sample.messages])
        return sample

    def _sources(self, row: Mapping[str, Any]) -> list[tuple[str, str]]:
        optional = [name for name in self.format.optional if name in row and name not in self.columns]
        return [*self.columns.items(), *((name, name) for name in optional)]

    def _word(self, column: str, value: Any) -> str:
        words = self.values[column]
        text = as_text(value)
        if text not in words:
            raise ValueError(f"column {column}: no word for the value {text!r}, values has: {', '.join(words)}")
        return words[text]


def choose_format(config: DataConfig, row: Mapping[str, Any], where: str) -> RowReader:
    """The reader for a dataset whose first row is ``row``.

    Args:
        config: Says the format and the mapping, or leaves them to be found.
        row: The first row; its columns decide.
        where: ``file:line`` of the row, for the error.

    Raises:
        UsageError: The mapping names a column that no format has.
        InputError: The row fits no format, or lacks a column that the mapping names.
    """
    _check_mapping(config, row, where)
    if config.format == "auto" and not config.columns and {"chosen", "rejected"} <= row.keys():
        raise InputError(
            f"{where}: preference rows (chosen, rejected), expected one answer per row",
            hint="to learn the chosen answers, map it: columns: {prompt: YOUR_COLUMN, completion: chosen}",
        )
    names = list(FORMATS) if config.format == "auto" else [config.format]
    for name in names:
        format_ = load_format(name)
        columns = _resolve(format_, config.columns, row)
        if columns is not None and (config.format != "auto" or _plausible(format_, columns, config, row)):
            read = {part for source in columns.values() for part in columns_in(source)}
            unused = tuple(sorted(row.keys() - read - set(format_.optional)))
            return RowReader(name, format_, columns, config.values, config.system, unused)
    raise _no_format(config, row, where)


def _check_mapping(config: DataConfig, row: Mapping[str, Any], where: str) -> None:
    formats = [load_format(name) for name in FORMATS]
    known = {column for format_ in formats for column in (*format_.required, *format_.optional)}
    for column, source in config.columns.items():
        if column not in known:
            raise UsageError(
                f"columns: {column!r} is a column of no format{did_you_mean(column, known)}",
                hint="the format's column comes first, yours second: columns: {prompt: question, completion: answer}",
            )
        for name in columns_in(source):
            if name not in row:
                raise InputError(
                    f"{where}: no column {name!r}{did_you_mean(name, row)}, found: {', '.join(row)}",
                    hint=f"--columns {column}=YOUR_COLUMN, or columns: {{{column}: YOUR_COLUMN}} in the config",
                )
    for column in config.values:
        if column not in row:
            raise InputError(f"{where}: no column {column!r} for values{did_you_mean(column, row)}")


def _resolve(format_: Format, given: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str] | None:
    """The source of each column, or None when the row cannot fill the format or the mapping is not about it."""
    if set(given) - {*format_.required, *format_.optional}:
        return None
    columns = dict(given)
    for column in format_.required:
        names = (column, *format_.aliases.get(column, ()))
        source = columns.get(column) or next((name for name in names if name in row), None)
        if source is None:
            return None
        columns[column] = source
    return columns


def _plausible(format_: Format, columns: Mapping[str, str], config: DataConfig, row: Mapping[str, Any]) -> bool:
    """Whether the values look as the format has them: a format that nobody named must not be guessed wrongly."""
    for column in format_.required:
        if column in config.columns:
            continue
        value = row[columns[column]]  # under another name than the format's, an answer is text: 0 may be an index
        if format_.nested:
            if not isinstance(value, list) and not str(value).lstrip().startswith("["):
                return False
        elif columns[column] != column and not (value is None or isinstance(value, str)):
            return False
    if format_.required == ("text",) and "text" not in config.columns:
        # a text beside a label is a task, whose label must not be lost in silence
        return not {name.lower() for name in row} - {"text"} - _ABOUT_A_TEXT
    return True


def guess_columns(config: DataConfig, row: Mapping[str, Any]) -> dict[str, str] | None:
    """A mapping for a row that fits no format, from the usual names of questions and answers; None without a guess."""
    mapping = _guess(config, row, "prompt_completion")
    return mapping if config.format in ("auto", "prompt_completion") and all(mapping.values()) else None


def _guess(config: DataConfig, row: Mapping[str, Any], name: str) -> dict[str, str]:
    """A column of the row for each column that the format needs, or an empty text."""
    format_ = load_format(name)
    mapping: dict[str, str] = {}
    for column in format_.required:
        names = (column, *format_.aliases.get(column, ()), *_GUESSES.get(column, ()))
        free = (guess for guess in names if guess in row and guess not in mapping.values())
        mapping[column] = config.columns.get(column) or next(free, "")
    return mapping


def _no_format(config: DataConfig, row: Mapping[str, Any], where: str) -> InputError:
    found = ", ".join(row) or "none"
    name = config.format if config.format != "auto" else _nearest(row)
    format_ = load_format(name)
    if format_.nested and (column := format_.required[0]) in row:
        shown = json.dumps(row[column], ensure_ascii=False, default=str)[:60]
        return InputError(f"{where}: {column}: expected a list of {{role, content}}, got {shown}")
    mapping = {column: source or "YOUR_COLUMN" for column, source in _guess(config, row, name).items()}
    shown = ", ".join(f"{column}: {source}" for column, source in mapping.items())
    flags = " ".join(f"--columns {column}={source}" for column, source in mapping.items())
    required = ", ".join(format_.required)
    fits = f"do not fill format {name}" if config.format != "auto" else f"fit no format, the nearest is {name}"
    return InputError(
        f"{where}: the columns found ({found}) {fits}, which needs {required}",
        hint=f"say which is which: columns: {{{shown}}} in the config, or {flags}",
    )


def _nearest(row: Mapping[str, Any]) -> str:
    """The format of which the row has the largest share of columns; a task when it has none of any."""
    shares = {"prompt_completion": 0.01}
    for name in FORMATS:
        format_ = load_format(name)
        hits = [any(known in row for known in (c, *format_.aliases.get(c, ()))) for c in format_.required]
        share = sum(hits) / len(hits)
        if name != "text" or len(row) == 1:
            shares[name] = max(share, shares.get(name, 0))
    return max(shares, key=lambda name: shares[name])


def columns_in(source: str) -> list[str]:
    """The file's columns that a source names: itself, or those in its braces."""
    return _PLACE.findall(source) or [source]


def cell(row: Mapping[str, Any], source: str) -> Any:
    """A column's value, or a text with the columns' values in it.

    Raises:
        ValueError: The row lacks the column.
    """
    for name in columns_in(source):
        if name not in row:
            raise ValueError(f"no column {name!r}, found: {', '.join(row) or 'none'}")
    if source in row:
        return row[source]
    return _PLACE.sub(lambda place: as_text(row[place[1]]), source)

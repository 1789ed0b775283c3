"""Map the columns of a file to those of a format: detection, mapping, and errors that say what to write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lit_lora.config import did_you_mean
from lit_lora.data.config import DataConfig
from lit_lora.data.findings import Findings
from lit_lora.data.formats import FORMATS, load_format
from lit_lora.data.formats.turns import UnknownRole
from lit_lora.data.refused import check_preference, check_wanted, check_without_media
from lit_lora.data.sample import Conversation, Format, RowContext, Sample, as_text
from lit_lora.errors import InputError, UsageError

__all__ = ["RowReader", "cell", "choose_layout", "columns_in", "columns_read", "guess_columns", "replace_values"]

_PLACEHOLDER = re.compile(r"\{([^{}\"':,\n]+)\}")
"""A column name in a template: ``{name}``. Braces around anything else, such as JSON, are plain text."""

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
"""Format column -> usual names of such a column, the likeliest first; for suggestions, never used unasked."""

# Columns beside a text that describe it; any other may hold the label of a task.
_METADATA = {"id", "idx", "_id", "url", "source", "meta", "metadata", "title", "timestamp", "date", "language"}


class RowReader:
    """Reads the rows of one dataset, which may be of different formats: each row is read by its own columns.

    Args:
        config: Names the format and the mapping, or leaves them to be detected.
        findings: Collects the rows that cannot be read, and what else is noticed.
    """

    def __init__(self, config: DataConfig, findings: Findings) -> None:
        self._config = config
        self._findings = findings
        self._layouts: dict[tuple[Any, ...], _Layout] = {}
        """The layout by the names and types of a row's columns."""

    def sample(self, row: Mapping[str, Any], where: str) -> Sample | None:
        """The row as a conversation or a text; ``None`` if it is bad.

        Args:
            row: The file's columns.
            where: ``file:line``.

        Raises:
            UsageError: The mapping names a column that no format has.
        """
        findings = self._findings

        def notice(message: str) -> None:
            findings.warn(message, where)

        try:
            layout = self._layout(row)
            if not self._config.columns:  # a mapping is the user's own choice
                check_without_media(row)
            check_wanted(row, columns_read(layout.columns))
            context = RowContext(notice, layout.columns, self._config.roles)
            values = layout.format_row(replace_values(row, self._config.values, "values"))
            sample = layout.format.read(values, context)
        except InputError as error:
            findings.bad_row(where, str(error), error.hint)
            return None
        except UnknownRole as error:
            role = json.dumps(error.name, ensure_ascii=False)
            findings.bad_row(where, str(error), f"say what it is: columns: {{roles: {{{role}: assistant}}}}")
            return None
        except (ValueError, KeyError) as error:
            findings.bad_row(where, str(error.args[0]) if error.args else str(error))
            return None

        findings.formats[layout.name] = findings.formats.get(layout.name, 0) + 1
        for column in layout.unused:
            findings.unused_columns[column] = findings.unused_columns.get(column, 0) + 1
        system = self._config.system
        if not system or not isinstance(sample, Conversation) or not sample.messages:
            return sample
        if sample.messages[0]["role"] == "system":
            return sample
        return replace(
            sample,
            messages=[{"role": "system", "content": system}, *sample.messages],
            context_only=frozenset(index + 1 for index in sample.context_only),
        )

    def _layout(self, row: Mapping[str, Any]) -> _Layout:
        key = tuple((name, type(value)) for name, value in row.items())
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = choose_layout(self._config, row)
        return layout


@dataclass(frozen=True)
class _Layout:
    """The format of rows with the same columns, and which column is which."""

    name: str
    format: Format
    columns: Mapping[str, str]
    """The format's column -> the file's column, or a template with the file's columns in braces."""
    unused: tuple[str, ...]
    """The file's columns that are not read."""

    def format_row(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row under the format's column names."""
        return {column: cell(row, source) for column, source in self.columns.items()}


def choose_layout(config: DataConfig, row: Mapping[str, Any]) -> _Layout:
    """The format and the columns of rows such as ``row``.

    Args:
        config: Names the format and the mapping, or leaves them to be detected.
        row: Its columns decide, and the types of their values.

    Raises:
        UsageError: The mapping names a column that no format has.
        InputError: The row fits no format, or lacks a column that the mapping names.
    """
    _check_mapping(config, row)
    if config.format == "auto" and not config.columns:
        check_preference(row)
    names = list(FORMATS) if config.format == "auto" else [config.format]
    for name in names:
        format_ = load_format(name)
        columns = _resolve(format_, config.columns, row)
        if columns is None:
            continue
        if config.format == "auto" and not _plausible(format_, columns, config, row):
            continue
        unused = row.keys() - columns_read(columns)
        return _Layout(name, format_, columns, tuple(sorted(unused)))
    raise _no_format(config, row)


def _check_mapping(config: DataConfig, row: Mapping[str, Any]) -> None:
    """Check ``columns`` and ``values`` of the config against the formats and the row.

    Raises:
        UsageError: No format has such a column.
        InputError: The row lacks a column.
    """
    format_columns: set[str] = set()
    for name in FORMATS:
        format_ = load_format(name)
        format_columns.update(format_.required, format_.optional)

    for column, source in config.columns.items():
        if column not in format_columns:
            raise UsageError(
                f"columns: no format has a column {column!r}{did_you_mean(column, format_columns)}",
                hint="the format's column comes first, yours second: columns: {prompt: question, completion: answer}",
            )
        for name in columns_in(source):
            if name not in row:
                raise InputError(
                    f"no column {name!r}{did_you_mean(name, row)}, found: {', '.join(row)}",
                    hint=f"--columns {column}=YOUR_COLUMN, or columns: {{{column}: YOUR_COLUMN}} in the config",
                )
    for column in config.values:
        if column not in row:
            raise InputError(f"no column {column!r} for values{did_you_mean(column, row)}")


def _resolve(format_: Format, mapping: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str] | None:
    """The source of each column; None if the row cannot fill the format, or the mapping is for another format."""
    if mapping.keys() - {*format_.required, *format_.optional}:
        return None
    columns = dict(mapping)
    for column in (*format_.required, *format_.optional):
        source = columns.get(column) or _first_in(row, _names(format_, column))
        if source is not None:
            columns[column] = source
        elif column in format_.required:
            return None
    return columns


def _names(format_: Format, column: str) -> tuple[str, ...]:
    """The names under which a format's column is recognized, its own first."""
    return (column, *format_.aliases.get(column, ()))


def _first_in(row: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The column of the row with the first of the names that it has, however it is capitalized and spaced."""
    columns = {_folded(column): column for column in reversed(list(row))}
    return next((columns[_folded(name)] for name in names if _folded(name) in columns), None)


def _folded(name: str) -> str:
    return re.sub(r"[\s_-]", "", str(name)).lower()


def _plausible(format_: Format, columns: Mapping[str, str], config: DataConfig, row: Mapping[str, Any]) -> bool:
    """Whether the row's values fit a format that was detected, not named; a wrong guess would train on the wrong text.

    A column mapped by the config is the user's choice and is not checked.
    """
    for column in format_.required:
        if column in config.columns:
            continue
        value = row[columns[column]]
        if format_.nested:
            if not isinstance(value, list) and not str(value).lstrip().startswith("["):
                return False
        # Recognized by an alias, such as "answer", it must be text: a number may be the index of an option.
        elif columns[column] != column and value is not None and not isinstance(value, str):
            return False

    if format_.required == ("text",) and "text" not in config.columns:
        # A text beside a label is a classification task; as plain text, its label would be dropped silently.
        return not {name.lower() for name in row} - {"text"} - _METADATA
    return True


def guess_columns(config: DataConfig, row: Mapping[str, Any]) -> dict[str, str] | None:
    """A mapping for a row that fits no format, from usual names of questions and answers; None if a column has none."""
    if config.format not in ("auto", "prompt_completion"):
        return None
    mapping = _guess(config, row, "prompt_completion")
    return mapping if all(mapping.values()) else None


def _guess(config: DataConfig, row: Mapping[str, Any], name: str) -> dict[str, str]:
    """A column of the row for each required column of the format, or an empty string."""
    format_ = load_format(name)
    mapping: dict[str, str] = {}
    for column in format_.required:
        names = (*_names(format_, column), *_GUESSES.get(column, ()))
        free = [candidate for candidate in names if candidate not in mapping.values()]
        mapping[column] = config.columns.get(column) or _first_in(row, free) or ""
    return mapping


def _no_format(config: DataConfig, row: Mapping[str, Any]) -> InputError:
    """The error for a row that fits no format, with the mapping to write."""
    name = _nearest(row) if config.format == "auto" else config.format
    format_ = load_format(name)
    if format_.nested and (column := format_.required[0]) in row:
        value = json.dumps(row[column], ensure_ascii=False, default=str)[:60]
        return InputError(f"{column}: expected a list of {{role, content}}, got {value}")

    columns = ", ".join(row) or "none"
    needed = ", ".join(format_.required)
    if config.format == "auto":
        message = f"the columns ({columns}) fit no format; the nearest, {name}, needs {needed}"
    else:
        message = f"the columns ({columns}) do not fit format {name}, which needs {needed}"

    mapping = {column: source or "YOUR_COLUMN" for column, source in _guess(config, row, name).items()}
    in_config = ", ".join(f"{column}: {source}" for column, source in mapping.items())
    flags = " ".join(f"--columns {column}={source}" for column, source in mapping.items())
    return InputError(message, hint=f"map them: columns: {{{in_config}}} in the config, or {flags}")


def _nearest(row: Mapping[str, Any]) -> str:
    """The format of whose required columns the row has the largest share; prompt_completion if it has none."""
    shares = {"prompt_completion": 0.01}
    for name in FORMATS:
        if name == "text" and len(row) > 1:  # a text beside other columns is rarely plain text
            continue
        format_ = load_format(name)
        matched = [column for column in format_.required if _first_in(row, _names(format_, column))]
        shares[name] = max(len(matched) / len(format_.required), shares.get(name, 0))
    return max(shares, key=lambda name: shares[name])


def replace_values(row: Mapping[str, Any], values: Mapping[str, Mapping[str, str]], setting: str) -> dict[str, Any]:
    """The row with the values of some columns replaced by words.

    Args:
        row: The file's columns.
        values: Column -> its values -> words.
        setting: What ``values`` is called in the config, for the error.

    Raises:
        ValueError: A value has no word.
    """
    replaced = dict(row)
    for column, words in values.items():
        if column not in row:
            continue
        text = as_text(row[column])
        if text not in words:
            raise ValueError(
                f"column {column}: no word for the value {text!r}; {setting} has words for: {', '.join(words)}"
            )
        replaced[column] = words[text]
    return replaced


def columns_read(columns: Mapping[str, str]) -> set[str]:
    """All of the file's columns that a mapping reads."""
    return {name for source in columns.values() for name in columns_in(source)}


def columns_in(source: str) -> list[str]:
    """The file's columns that a source names: the source itself, or those in its braces."""
    return _PLACEHOLDER.findall(source) or [source]


def cell(row: Mapping[str, Any], source: str) -> Any:
    """A column's value, or a template filled with the columns' values.

    Raises:
        ValueError: The row lacks the column.
    """
    for name in columns_in(source):
        if name not in row:
            raise ValueError(f"no column {name!r}, found: {', '.join(row) or 'none'}")
    if source in row:
        return row[source]
    return _PLACEHOLDER.sub(lambda match: as_text(row[match[1]]), source)

"""Map the columns of a file to those of a format: detection, mapping, and errors that say what to write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lit_lora.config import did_you_mean
from lit_lora.data.cells import as_text, cell, columns_in, columns_read, is_empty
from lit_lora.data.config import DataConfig
from lit_lora.data.findings import Findings, Notice
from lit_lora.data.formats import FORMATS, load_format
from lit_lora.data.formats.exchange import message_list
from lit_lora.data.formats.messages import dialog_messages
from lit_lora.data.guesses import (
    CHOICE_COLUMNS,
    CLASS_COLUMNS,
    CONTEXT_COLUMNS,
    MEDIA_COLUMNS,
    as_yaml,
    fold,
    guess,
    mapping_hint,
)
from lit_lora.data.refused import WANTED_COLUMNS, check_wanted, preference_error
from lit_lora.data.sample import Conversation, Format, RowContext, Sample
from lit_lora.errors import InputError, UsageError
from lit_lora.tokenizer import fold_system

__all__ = ["RowReader", "choose_layout", "guess_columns", "replace_values"]

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
        self._prompt_readers: dict[tuple[str, ...], RowReader] = {}
        """See :meth:`_prompt_reader`."""

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
            _check_unread(layout, self._config, row, notice)
            detected = self._config.format == "auto" and not self._config.columns
            context = RowContext(notice, layout.columns, self._config.roles, self._config.message_keys, detected)
            values = layout.format_row(replace_values(row, self._config.values, "values"))
            sample = layout.format.read(values, context)
        except InputError as error:
            findings.bad_row(where, str(error), error.hint)
            return None
        except (ValueError, KeyError) as error:
            findings.bad_row(where, str(error.args[0]) if error.args else str(error))
            return None

        self._compare_format(layout.name, where)
        findings.formats[layout.name] = findings.formats.get(layout.name, 0) + 1
        for column in layout.unused:
            findings.unused_columns[column] = findings.unused_columns.get(column, 0) + 1
        if isinstance(sample, Conversation) and sample.messages:
            return self._with_system(sample)
        return sample

    def _with_system(self, conversation: Conversation) -> Conversation:
        """The conversation with the config's system message if it has none of its own, where the config wants it."""
        messages = conversation.messages
        if self._config.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._config.system}, *messages]
        if self._config.system_role == "fold":
            messages = fold_system(messages)
        # Messages come and go only at the beginning.
        added = len(messages) - len(conversation.messages)
        context_only = frozenset(index + added for index in conversation.context_only)
        return replace(conversation, messages=messages, context_only=context_only)

    def _compare_format(self, name: str, where: str) -> None:
        """Count a row whose format is not that of the first rows; as plain text, it would be learned as a whole."""
        first = next(iter(self._findings.formats), name)
        if name == first:
            return
        message = f"of format {name}, while the first rows are {first}"
        if "text" in (name, first):
            self._findings.warn(message, where)
        else:
            self._findings.note(message, where)

    def can_ask(self, row: Mapping[str, Any]) -> bool:
        """Whether :meth:`prompt` finds what a row asks in its columns."""
        for name in self._format_names():
            format_ = load_format(name)
            if format_.nested and _resolve(format_, self._config.columns, row) is not None:
                return True
        asked = self._asked(row)
        return asked is not None and columns_read(self._config.columns) - asked.keys() <= set(self._answer(row))

    def prompt(self, row: Mapping[str, Any], where: str) -> Sample | None:
        """What a row asks: as :meth:`sample`, but the row may lack its answer, which is left out.

        A conversation of several turns must end with a question; ``None`` if the row is bad.
        """
        asked = self._asked(row)
        if asked is None:
            sample = self.sample(row, where)
            if isinstance(sample, Conversation) and sample.messages[-1]["role"] == "assistant":
                problem = "the conversation ends with an answer, expected a user message at the end"
                self._findings.bad_row(where, problem)
                return None
            return sample
        answer = self._answer(row)
        values = tuple(column for column in self._config.values if column in asked and column not in answer)
        sample = self._prompt_reader(values).sample(asked, where)
        if isinstance(sample, Conversation):
            return replace(sample, messages=sample.messages[:-1])
        return sample

    def _prompt_reader(self, with_values: tuple[str, ...]) -> RowReader:
        """A reader that has words only for the values of these columns: the answer is a placeholder."""
        reader = self._prompt_readers.get(with_values)
        if reader is None:
            values = {column: self._config.values[column] for column in with_values}
            reader = RowReader(self._config.model_copy(update={"values": values}), self._findings)
            self._prompt_readers[with_values] = reader
        return reader

    def _asked(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """The columns of a row that say what it asks, and a placeholder as its answer; None if it has messages.

        What else a row has, such as a mark that its answer is wrong, does not matter for asking.
        """
        answer = self._answer(row)
        filled = {**row, **dict.fromkeys(answer, "…")}
        for name in self._format_names() if answer else ():
            columns = _resolve(load_format(name), self._config.columns, filled)
            if columns is not None and set(answer) <= columns_read(columns, filled):
                needed = columns_read(columns, filled)
                return {column: value for column, value in filled.items() if column in needed}
        return None

    def _answer(self, row: Mapping[str, Any]) -> list[str]:
        """The file's columns that hold the answer of such a row, which it may lack; none if it has messages."""
        mapping = self._config.columns
        for name in self._format_names():
            format_ = load_format(name)
            *others, answer = format_.required
            if not others or mapping.keys() - {*format_.required, *format_.optional}:
                continue
            if any(column not in mapping and not _first_in(row, _names(format_, column)) for column in others):
                continue
            if answer in mapping:
                asked = columns_read({column: source for column, source in mapping.items() if column != answer})
                return [column for column in columns_in(mapping[answer]) if column not in asked]
            return [_first_in(row, _names(format_, answer)) or answer]
        return []

    def _format_names(self) -> list[str]:
        return list(FORMATS) if self._config.format == "auto" else [self._config.format]

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
    if not config.columns and (error := preference_error(row)) is not None:
        raise error
    names = list(FORMATS) if config.format == "auto" else [config.format]
    for name in names:
        format_ = load_format(name)
        columns = _resolve(format_, config.columns, row)
        if columns is None:
            continue
        if config.format == "auto" and not _plausible(format_, columns, config, row):
            continue
        unused = row.keys() - columns_read(columns, row)
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
        for name in columns_in(source, row):
            if name not in row:
                raise InputError(
                    f"no column {name!r}{did_you_mean(name, row)}, found: {', '.join(row)}",
                    hint=f"name one of these: --columns {column}=…, or columns: {{{column}: …}} in the config",
                )
    for column in config.values:
        if column not in row:
            raise InputError(f"no column {column!r} for values{did_you_mean(column, row)}")


def _resolve(format_: Format, mapping: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, str] | None:
    """The source of each column; None if the row cannot fill the format, or the mapping is for another format."""
    if mapping.keys() - {*format_.required, *format_.optional}:
        return None
    columns = dict(mapping)
    prompt_is_mapped = any(column in mapping for column in format_.texts)
    for column in (*format_.required, *format_.optional):
        if column in format_.optional and column in format_.texts and prompt_is_mapped:
            continue  # the user has said what the prompt is
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
    columns = {fold(column): column for column in reversed(list(row))}
    return next((columns[fold(name)] for name in names if fold(name) in columns), None)


def _plausible(format_: Format, columns: Mapping[str, str], config: DataConfig, row: Mapping[str, Any]) -> bool:
    """Whether the row's values fit a format that was detected, not named; a wrong guess would train on the wrong text.

    A column mapped by the config is the user's choice and is not checked.
    """
    for column in format_.required:
        if column in config.columns:
            continue
        value = row[columns[column]]
        if format_.nested:
            # Under another name, such as "dialogue", a dialog may be what a summary is about.
            is_dialog = columns[column] == column and dialog_messages(str(value)) is not None
            if not isinstance(value, list) and not str(value).lstrip().startswith("[") and not is_dialog:
                return False
        # Recognized by an alias, such as "answer", it must be text: a number may be the index of an option.
        elif columns[column] != column and not (value is None or isinstance(value, str) or message_list(value)):
            return False

    if format_.required == ("text",) and "text" not in config.columns:
        # A text beside a label is a classification task; as plain text, its label would be dropped silently.
        return not {name.lower() for name in row} - {"text"} - _METADATA
    return True


def _check_unread(layout: _Layout, config: DataConfig, row: Mapping[str, Any], notice: Notice) -> None:
    """Check what a row says in columns that are not read, and an answer that is a bare number.

    Raises:
        InputError: The row has images, or an answer that is not wanted.
    """
    for column in layout.unused:
        if is_empty(row[column]):
            continue
        if fold(column) in MEDIA_COLUMNS and not config.columns:  # a mapping is the user's own choice
            # A text about a picture that is not seen teaches to make things up.
            raise InputError(f"a row with {column}, but only text can be read", hint=f"use rows without {column}")
        if fold(column) in CONTEXT_COLUMNS | MEDIA_COLUMNS:
            notice(f"with a column {column} that the model does not see; {_add_to_prompt(layout, column)}")
        if column in WANTED_COLUMNS:
            check_wanted(column, row[column], notice)

    if layout.format.nested or layout.name == "text":
        return
    answer = layout.columns[layout.format.required[-1]]
    # An index of one of the row's choices is a class, too.
    is_class = fold(answer) in CLASS_COLUMNS or any(fold(column) in CHOICE_COLUMNS for column in row)
    if is_class and answer not in config.values and re.fullmatch(r"-?\d{1,3}", as_text(row.get(answer))):
        notice(
            f"whose answer is a bare number (column {answer}); words say what it means: values: {{{answer}: "
            f"{{0: no, 1: yes}}}} in the config, or --values {answer}=0:no,1:yes"
        )


def _add_to_prompt(layout: _Layout, column: str) -> str:
    """The mapping that puts a column before the prompt."""
    if layout.format.nested or layout.name == "text":
        return "write it into the first message, if the answers need it"
    prompt, answer = layout.format.required[0], layout.format.required[-1]
    source = layout.columns[prompt]
    template = source if columns_in(source) != [source] else f"{{{source}}}"
    mapping = {prompt: f"{{{column}}}\n\n{template}", answer: layout.columns[answer]}
    return f"columns: {as_yaml(mapping)} adds it"


def guess_columns(config: DataConfig, row: Mapping[str, Any]) -> dict[str, str] | None:
    """A mapping for a row that fits no format, from usual names of questions and answers; None if a column has none."""
    if config.format not in ("auto", "prompt_completion") or preference_error(row) is not None:
        return None
    mapping = guess(row, ["prompt", "completion"])
    return mapping if len(mapping) == 2 else None


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

    return InputError(message, hint=_mapping_hint(config, row, format_))


def _mapping_hint(config: DataConfig, row: Mapping[str, Any], format_: Format) -> str:
    """The mapping to write, in the row's own columns."""
    mapping = guess(row, format_.required) | dict(config.columns)
    if all(column in mapping for column in format_.required):
        return f"map them: {mapping_hint({column: mapping[column] for column in format_.required})}"
    free = [name for name in row if name not in columns_read(mapping, row)]
    missing = [column for column in format_.required if column not in mapping]
    if len(free) < len(missing):
        return f"each row needs {' and '.join(format_.required)}; this one has no column for {', '.join(missing)}"
    example = mapping | dict(zip(missing, free, strict=False))
    chosen = {column: example[column] for column in format_.required}
    return f"say which is which, such as {mapping_hint(chosen)}"


def _nearest(row: Mapping[str, Any]) -> str:
    """The format of whose required columns the row has the largest share; prompt_completion if it has none."""
    shares = {"prompt_completion": 0.01}
    for name in FORMATS:
        if name == "text" and len(row) > 1:  # a text beside other columns is rarely plain text
            continue
        format_ = load_format(name)
        if format_.nested and format_.required[0] not in row:  # a "dialogue" that is text is a column of another format
            continue
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
        if text in words:
            replaced[column] = words[text]
        elif text not in words.values():  # the word itself may stand in another file of the same task
            raise ValueError(
                f"column {column}: no word for the value {text!r}; {setting} has words for: {', '.join(words)}"
            )
    return replaced

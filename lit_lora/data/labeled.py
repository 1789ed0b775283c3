"""Labeled rows: a text or a pair of texts, and what to predict from it: a class, a number or another text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lit_lora.config import did_you_mean
from lit_lora.data.cells import as_text, cell, columns_in, columns_read
from lit_lora.data.columns import replace_values
from lit_lora.data.config import LabeledConfig
from lit_lora.data.findings import Findings
from lit_lora.data.guesses import as_yaml, fold
from lit_lora.data.read import read_rows
from lit_lora.data.rows import Integers
from lit_lora.errors import InputError, UsageError

__all__ = ["Example", "LabeledRow", "LabeledRows", "Labels", "Tokens", "find_labels", "read_examples"]

Tokens: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Token ids (T,), and for each token which of the two texts it belongs to (T,): 0 or 1."""

# our column -> folded names under which it is recognized, the likeliest first
_NAMES = {
    "text": (
        "text", "sentence", "sentence1", "text1", "question1", "premise", "question", "review", "content", "input",
        "tweet", "comment", "message", "utterance", "query", "email", "post", "article", "document", "body",
        "reviewtext", "inputtext", "description", "title",
    ),
    "pair": ("pair", "textpair", "sentence2", "text2", "question2", "hypothesis"),
    "label": (
        "label", "labels", "target", "intent", "category", "class", "sentiment", "score", "labeltext", "emotion",
        "topic", "rating", "stars", "targettext",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """A row as read from a file."""

    text: str
    pair: str | None
    label: str | None
    """As text; ``None`` for rows without labels."""
    source: str
    """``file:line``"""


def read_examples(
    files: Sequence[Path], config: LabeledConfig, *, labeled: bool | None = True, limit: int | None = None
) -> tuple[list[Example], str]:
    """The rows of some files, and a line that says which columns were read as what.

    Args:
        files: Data files.
        config: Names the mapping, or leaves it to be detected from the first row.
        labeled: Whether rows have labels; ``None`` reads labels if the first row has one.
        limit: Number of rows to read; all if omitted.

    Raises:
        InputError: A file or row cannot be read, lacks a column or has no label, or there is no row.
        UsageError: The mapping names a column other than text, pair and label.
    """
    layouts: dict[tuple[str, ...], dict[str, str]] = {}
    mapping = ""
    examples: list[Example] = []
    findings = Findings(config.bad_rows)
    for place, row in _rows_with_place(files, findings):
        if len(examples) == limit:
            break
        names = tuple(row)
        if not layouts:
            layouts[names] = _choose(config, row, place, labeled=labeled)
            mapping = _describe(layouts[names], row)
            if labeled is None:
                labeled = "label" in layouts[names]
        elif names not in layouts:
            layouts[names] = _choose_later(config, row, place, next(iter(layouts.values())), labeled=labeled)
        try:
            examples.append(_example(config, layouts[names], row, place))
        except (ValueError, KeyError) as error:
            findings.bad_row(place, str(error.args[0]) if error.args else str(error))
    findings.check()
    findings.log_warnings()
    if not examples:
        raise InputError(f"{', '.join(map(str, files))}: no rows in it", hint="expected one row per line or a list")
    return examples, mapping


def _describe(columns: Mapping[str, str], row: Mapping[str, Any]) -> str:
    """``text: review, label: mood; not used: id``."""
    mapping = ", ".join(f"{column}: {source}" for column, source in columns.items())
    read = columns_read(columns, row)
    unused = [name for name in row if name not in read]
    return f"{mapping}; not used: {', '.join(unused)}" if unused else mapping


def _rows_with_place(files: Sequence[Path], findings: Findings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with their ``file:line``."""
    for file in files:
        for line, row in read_rows(file, findings):
            yield f"{file}:{line}", row


def _choose(config: LabeledConfig, row: Mapping[str, Any], place: str, *, labeled: bool | None) -> dict[str, str]:
    """Map our columns to the file's columns, or to templates with the file's columns in braces.

    Raises:
        InputError: The row lacks a column, or a column cannot be guessed.
        UsageError: The mapping names a column other than text, pair and label.
    """
    _check_mapping(config, row, place, labeled=labeled)
    columns = dict(config.columns)
    for column, names in _NAMES.items():
        # A mapped text says what the row is: then a second text is not guessed.
        if column in columns or (column == "pair" and "text" in config.columns):
            continue
        by_fold = {fold(name): name for name in row if name not in columns.values()}
        guess = next((by_fold[name] for name in names if name in by_fold), None)
        if guess is not None:
            columns[column] = guess

    missing = [column for column in ("text", "label") if column not in columns]
    if not labeled and "label" in missing:
        missing.remove("label")
    if missing:
        free = [name for name in row if name not in columns.values()]
        example = columns | dict(zip(missing, free, strict=False))
        raise InputError(
            f"{place}: which column is the {' and which the '.join(missing)}? found: {', '.join(row) or 'none'}",
            hint=f"map it in the section data, such as columns: {as_yaml(example)}",
        )

    row_has_label = "label" in columns and all(name in row for name in columns_in(columns["label"], row))
    if labeled is False or (labeled is None and not row_has_label):
        columns.pop("label", None)
    return {column: columns[column] for column in _NAMES if column in columns}


def _choose_later(
    config: LabeledConfig, row: Mapping[str, Any], place: str, first: dict[str, str], *, labeled: bool | None
) -> dict[str, str]:
    """The mapping of a row whose columns are not the first row's: the same if it has them, else its own.

    Where it has neither, the first row's is used, and the row is bad because it lacks a column.
    """
    if columns_read(first, row) <= row.keys():
        return first
    try:
        columns = _choose(config, row, place, labeled=labeled)
    except InputError:
        return first
    return columns if columns.keys() == first.keys() else first


def _check_mapping(config: LabeledConfig, row: Mapping[str, Any], place: str, *, labeled: bool | None) -> None:
    """Check ``columns`` and ``values`` of the config against our columns and the row.

    Raises:
        InputError: The row lacks a column.
        UsageError: The mapping names a column other than text, pair and label.
    """
    for column, source in config.columns.items():
        if column not in _NAMES:
            raise UsageError(
                f"data.columns: unknown column {column!r}{did_you_mean(column, _NAMES)}, known: {', '.join(_NAMES)}",
                hint="our column comes first, yours second: columns: {text: sentence, label: sentiment}",
            )
        if column == "label" and labeled is None:
            continue
        for name in columns_in(source, row):
            if name not in row:
                raise InputError(
                    f"{place}: no column {name!r}{did_you_mean(name, row)}, found: {', '.join(row)}",
                    hint=f"name one of these: data.columns: {{{column}: …}} in the config",
                )
    for column in config.values:
        if column not in row and labeled is not None:
            raise InputError(f"{place}: no column {column!r} for data.values{did_you_mean(column, row)}")


def _example(config: LabeledConfig, columns: Mapping[str, str], row: Mapping[str, Any], place: str) -> Example:
    """One row.

    Raises:
        ValueError: A column is missing, a value has no word or no text, or the label is empty.
    """
    row = replace_values(row, config.values, "data.values")
    texts = {column: as_text(cell(row, source)) for column, source in columns.items()}
    label = texts.get("label")
    if label is not None and not label.strip():
        raise ValueError(f"the label (column {columns['label']}) is empty")
    return Example(texts["text"], texts.get("pair"), label, place)


@dataclass(frozen=True)
class Labels:
    """The labels of a classification in the order of their ids; empty for regression and seq2seq."""

    names: tuple[str, ...]

    def id(self, example: Example) -> int:
        """The id of a row's label, which may be given by name or as the id itself.

        Raises:
            InputError: There is no such label.
        """
        label = (example.label or "").strip()
        if label in self.names:
            return self.names.index(label)
        if label.isdecimal() and int(label) < len(self.names):
            return int(label)
        shown = ", ".join(self.names[:8])
        if len(self.names) > 8:
            shown += ", …"
        raise InputError(
            f"{example.source}: label {label!r} is not one of the {len(self.names)} training labels: {shown}"
        )


def find_labels(examples: Sequence[Example], model_labels: Sequence[str] = ()) -> Labels:
    """The labels of some rows: the model's own if they include all of the rows', else the rows', sorted.

    Args:
        examples: The training rows.
        model_labels: Labels that the model was trained with, by id.

    Raises:
        InputError: There is only one label, or the labels look like numbers or texts instead of classes.
    """
    labels = {(example.label or "").strip() for example in examples}
    all_integers = all(label.lstrip("-").isdecimal() for label in labels)
    if model_labels:
        model_ids = {str(number) for number in range(len(model_labels))}
        if labels <= set(model_labels) or labels <= model_ids:
            return Labels(tuple(model_labels))

    source = examples[0].source
    if len(labels) < 2:
        raise InputError(f"{source}: every row has the label {labels.pop()!r}, expected two or more labels")
    if not all_integers and all(_is_number(label) for label in labels):
        raise InputError(
            f"{source}: the labels are numbers such as {examples[0].label}",
            hint="to predict a number, set data.task: regression",
        )
    if len(labels) > max(50, len(examples) // 2):
        raise InputError(
            f"{source}: {len(labels):,} different labels in {len(examples):,} rows; is this the label column?",
            hint="data.columns: {label: YOUR_COLUMN} names another",
        )
    if all_integers:  # in numeric order: 2 before 10
        return Labels(tuple(sorted(labels, key=lambda label: (int(label), label))))
    return Labels(tuple(sorted(labels)))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class LabeledRow:
    """One tokenized row."""

    ids: npt.NDArray[np.int32]  # (T,)
    types: npt.NDArray[np.int32]  # (T,): 1 for the tokens of the second text
    label: npt.NDArray[Any]  # () int64 or float32; (U,) int64 for a text
    source: str
    """``file:line``"""


class LabeledRows:
    """Labeled rows in memory."""

    def __init__(self, rows: Sequence[LabeledRow]) -> None:
        self._rows = list(rows)
        self.token_counts: Integers = np.array([len(row.ids) for row in rows], dtype=np.int64)
        """Number of tokens in each row."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> LabeledRow:
        return self._rows[i]

    def subset(self, positions: npt.NDArray[Any]) -> LabeledRows:
        """The rows at these positions, in this order."""
        return LabeledRows([self._rows[i] for i in positions])

    @property
    def texts(self) -> set[bytes]:
        """The tokens of every row as bytes: equal for rows with equal text, whatever their labels."""
        return {row.ids.tobytes() for row in self._rows}

    @property
    def fingerprint(self) -> str:
        """A hash of all tokens and labels, in row order."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(b"%d " % len(row.ids))  # the length, so that rows cannot run into each other
            digest.update(row.ids.tobytes())
            digest.update(row.types.tobytes())
            digest.update(row.label.tobytes())
        return digest.hexdigest()[:16]

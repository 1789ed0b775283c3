"""Rows with labels: a text or a pair of texts, and what is to be said of it: a label, a number, another text."""

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
from lit_lora.data.columns import cell, columns_in
from lit_lora.data.config import LabelledConfig
from lit_lora.data.read import read_rows
from lit_lora.data.rows import Integers
from lit_lora.data.sample import as_text
from lit_lora.errors import InputError, UsageError

__all__ = ["Example", "LabelledRow", "LabelledRows", "Labels", "Tokens", "find_labels", "read_examples"]

Tokens: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]
"""Token ids (T,), and of which of the two texts each is (T,)."""

# our column -> names under which it is recognised, the likeliest first
_NAMES = {
    "text": ("text", "sentence", "sentence1", "question1", "premise", "question", "review", "content", "input"),
    "pair": ("pair", "text_pair", "sentence2", "question2", "hypothesis"),
    "label": ("label", "labels", "target", "intent", "category", "class", "sentiment", "score"),
}
_OPTIONAL = {"pair"}


@dataclass(frozen=True, slots=True)
class Example:
    """A row as it is read."""

    text: str
    pair: str | None
    label: str | None
    """As text; ``None`` where labels were not asked for."""
    source: str
    """``file:line``"""


def read_examples(
    files: Sequence[Path], config: LabelledConfig, *, labelled: bool | None = True, limit: int | None = None
) -> tuple[list[Example], str]:
    """The rows of some files, and in words which column is what.

    Args:
        files: Data files.
        config: Says the mapping, or leaves it to be found from the first row.
        labelled: Whether rows have labels; ``None``: where the first has one.
        limit: Read only so many.

    Raises:
        InputError: A file or row cannot be read, lacks a column or has no label, or there is no row.
        UsageError: The mapping names a column that there is none of.
    """
    columns: dict[str, str] | None = None
    about, examples = "", list[Example]()
    for place, row in _placed(files):
        if len(examples) == limit:
            break
        if columns is None:
            columns = _choose(config, row, place, labelled=labelled)
            read = {part for source in columns.values() for part in columns_in(source)}
            unused = [name for name in row if name not in read]
            about = ", ".join(f"{name}: {source}" for name, source in columns.items())
            about += f"; not used: {', '.join(unused)}" if unused else ""
        examples.append(_example(config, columns, row, place))
    if not examples:
        raise InputError(f"{', '.join(map(str, files))}: no rows in it", hint="expected one row per line or a list")
    return examples, about


def _placed(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        for line, row in read_rows(file):
            yield f"{file}:{line}", row


def _choose(config: LabelledConfig, row: Mapping[str, Any], place: str, *, labelled: bool | None) -> dict[str, str]:
    """Our column -> the file's column, or a text with the file's columns in braces."""
    for column, source in config.columns.items():
        if column not in _NAMES:
            raise UsageError(
                f"data.columns: {column!r} is not a column here{did_you_mean(column, _NAMES)}, known: "
                f"{', '.join(_NAMES)}",
                hint="our column comes first, yours second: columns: {text: sentence, label: sentiment}",
            )
        for name in columns_in(source):
            if name not in row and not (column == "label" and labelled is None):
                raise InputError(
                    f"{place}: no column {name!r}{did_you_mean(name, row)}, found: {', '.join(row)}",
                    hint=f"say which it is: data.columns: {{{column}: YOUR_COLUMN}} in the config",
                )
    for column in config.values:
        if column not in row and labelled is not None:
            raise InputError(f"{place}: no column {column!r} for data.values{did_you_mean(column, row)}")
    found = dict(config.columns)
    for column, names in _NAMES.items():
        if column in found or (column == "pair" and "text" in config.columns):  # named one by one: not guessed
            continue
        guesses = [name for name in names if name in row and name not in found.values()]
        if guesses:
            found[column] = guesses[0]
    missing = [column for column in _NAMES if column not in found and column not in _OPTIONAL]
    missing = [column for column in missing if column != "label" or labelled]
    if missing:
        shown = ", ".join(f"{column}: YOUR_COLUMN" for column in missing)
        raise InputError(
            f"{place}: which column is the {' and which the '.join(missing)}? found: {', '.join(row) or 'none'}",
            hint=f"say it: data.columns: {{{shown}}}",
        )
    unlabelled = labelled is False or (
        labelled is None and any(n not in row for n in columns_in(found.get("label", "")))
    )
    return {column: found[column] for column in _NAMES if column in found and not (column == "label" and unlabelled)}


def _example(config: LabelledConfig, columns: Mapping[str, str], row: Mapping[str, Any], place: str) -> Example:
    """One row.

    Raises:
        InputError: A column is missing, a value has no word, or the label is empty.
    """
    try:
        words = {name: _word(config, name, value) if name in config.values else value for name, value in row.items()}
        values = {column: as_text(cell(words, source)) for column, source in columns.items()}
    except (ValueError, KeyError) as error:
        raise InputError(f"{place}: {error.args[0] if error.args else error}") from error
    if values.get("label", "?").strip() == "":
        raise InputError(f"{place}: the label (column {columns['label']}) is empty")
    return Example(values["text"], values.get("pair"), values.get("label"), place)


def _word(config: LabelledConfig, column: str, value: Any) -> str:
    words, text = config.values[column], as_text(value)
    if text not in words:
        raise ValueError(f"column {column}: no word for the value {text!r}, data.values has: {', '.join(words)}")
    return words[text]


@dataclass(frozen=True)
class Labels:
    """The labels of a classification in the order of their ids; none for numbers and texts."""

    names: tuple[str, ...]

    def id(self, example: Example) -> int:
        """The label's id, of a row that gives its name or the id itself.

        Raises:
            InputError: No such label.
        """
        label = (example.label or "").strip()
        if label in self.names:
            return self.names.index(label)
        if label.isdecimal() and int(label) < len(self.names):
            return int(label)
        known = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "")
        raise InputError(f"{example.source}: label {label!r} is not among the {len(self.names)} of training: {known}")


def find_labels(examples: Sequence[Example], known: Sequence[str] = ()) -> Labels:
    """The labels of some rows: those that the model has already, where it has all of them, else in their order.

    Args:
        examples: The training rows.
        known: Labels that the model was trained with, by id.

    Raises:
        InputError: There is one label only, or they look like numbers or texts rather than labels.
    """
    found = {(example.label or "").strip() for example in examples}
    whole = all(label.lstrip("-").isdecimal() for label in found)
    if known and (found <= set(known) or (whole and found <= {str(n) for n in range(len(known))})):
        return Labels(tuple(known))
    if len(found) < 2:
        raise InputError(f"{examples[0].source}: every row has the label {found.pop()!r}, expected two or more labels")
    if not whole and all(_is_number(label) for label in found):
        raise InputError(
            f"{examples[0].source}: the labels are numbers such as {examples[0].label}",
            hint="to predict a number set data.task: regression",
        )
    if len(found) > max(50, len(examples) // 2):
        raise InputError(
            f"{examples[0].source}: {len(found):,} different labels in {len(examples):,} rows: the right column?",
            hint="data.columns: {label: YOUR_COLUMN} names another",
        )
    return Labels(tuple(sorted(found, key=lambda label: (int(label), label) if whole else (0, label))))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """One row to train on."""

    ids: npt.NDArray[np.int32]  # (T,)
    types: npt.NDArray[np.int32]  # (T,): 1 for the tokens of the second text
    label: npt.NDArray[Any]  # () int64 or float32; (U,) int64 for a text
    source: str
    """``file:line``"""


class LabelledRows:
    """Rows in memory, in their order."""

    def __init__(self, rows: Sequence[LabelledRow]) -> None:
        self._rows = list(rows)
        self.token_counts: Integers = np.array([len(row.ids) for row in rows], dtype=np.int64)
        """Tokens of each row."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> LabelledRow:
        return self._rows[i]

    def subset(self, positions: npt.NDArray[Any]) -> LabelledRows:
        """The rows at these positions, in their order."""
        return LabelledRows([self._rows[i] for i in positions])

    @property
    def texts(self) -> set[bytes]:
        """What is equal for rows of equal tokens, whatever their labels."""
        return {row.ids.tobytes() for row in self._rows}

    @property
    def fingerprint(self) -> str:
        """A hash of tokens and labels in their order."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(b"%d " % len(row.ids) + row.ids.tobytes() + row.types.tobytes() + row.label.tobytes())
        return digest.hexdigest()[:16]

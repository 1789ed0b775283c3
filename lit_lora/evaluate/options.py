"""Multiple choice by likelihood: the model's answer is the option that it finds most likely."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_lora.config import did_you_mean
from lit_lora.data import Rows
from lit_lora.data.cells import as_text, cell, columns_in
from lit_lora.data.findings import Findings
from lit_lora.data.read import read_rows
from lit_lora.data.sample import Conversation
from lit_lora.errors import InputError, UsageError
from lit_lora.evaluate.likelihood import log_likelihoods
from lit_lora.evaluate.scores import Share
from lit_lora.evaluate.shots import encode_after_shots
from lit_lora.model import LanguageModel
from lit_lora.tokenizer import EncodedChat, Tokenizer, encode_completion

__all__ = ["OptionRow", "OptionScores", "evaluate_options", "has_options", "read_option_rows"]

# our column -> the file's columns that are recognized as it; commas join columns that hold one option each
_ALIASES = {
    "prompt": ("prompt", "question", "ctx", "context", "goal", "query", "sentence"),
    "options": ("options", "choices", "endings", "answers", "sol1,sol2", "option1,option2"),
    "answer": ("answer", "label", "answerKey", "gold", "target"),
}


@dataclass(frozen=True)
class OptionRow:
    """One question with its options."""

    prompt: str
    options: tuple[str, ...]
    answer: int
    """Index of the right option."""
    source: str
    """``file:line``"""


@dataclass(frozen=True)
class OptionScores:
    """How often the right option is the most likely one."""

    by_sum: Share
    """By the sum of its tokens' log-probabilities."""
    by_mean: Share
    """By that sum divided by the option's length in UTF-8 bytes, so that long options are not at a disadvantage."""
    loss: float
    """Mean negative log-likelihood of the right option in nats, which also shows changes too small for the shares."""
    chance: float
    """Expected share when guessing."""


def evaluate_options(
    model: LanguageModel,
    tokenizer: Tokenizer,
    rows: Sequence[OptionRow],
    *,
    shots: Sequence[OptionRow] = (),
    chat: bool | None = None,
    micro_batch_tokens: int = 2048,
) -> OptionScores:
    """Answer every question with the option that is most likely after its prompt.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: The questions.
        shots: Answered questions put before each one.
        chat: Whether the prompt is a user's message and the option the assistant's answer; otherwise the two are one
            plain text with a space between. By default, whether the checkpoint has a chat template.
        micro_batch_tokens: Maximum number of tokens per forward pass.
    """
    chat = tokenizer.has_own_template if chat is None else chat
    encode = _encode_chat if chat else _encode_plain
    encoded = [encode(tokenizer, row, option, shots) for row in rows for option in row.options]
    tokenized = Rows.from_tokens((each.ids, each.loss_mask) for each in encoded)
    option_counts = [len(row.options) for row in rows]
    sums = log_likelihoods(
        model, tokenized, micro_batch_tokens=micro_batch_tokens, what="options", groups=option_counts
    )

    right_by_sum = 0
    right_by_mean = 0
    loss = 0.0
    first = 0  # place of the row's first option in `sums`
    for row in rows:
        likelihoods = sums[first : first + len(row.options)]
        lengths = np.array([max(len(option.encode()), 1) for option in row.options])
        right_by_sum += int(likelihoods.argmax()) == row.answer
        right_by_mean += int((likelihoods / lengths).argmax()) == row.answer
        loss -= float(likelihoods[row.answer]) / len(rows)
        first += len(row.options)
    chance = sum(1 / count for count in option_counts) / max(len(rows), 1)
    return OptionScores(Share(right_by_sum, len(rows)), Share(right_by_mean, len(rows)), loss, chance)


def _encode_chat(tokenizer: Tokenizer, row: OptionRow, option: str, shots: Sequence[OptionRow]) -> EncodedChat:
    """The option as an answer; its end of turn counts too, because the answer has to be complete."""
    examples = [_turns(shot, shot.options[shot.answer]) for shot in shots]
    return encode_after_shots(tokenizer, _turns(row, option), examples)


def _turns(row: OptionRow, option: str) -> Conversation:
    return Conversation([{"role": "user", "content": row.prompt}, {"role": "assistant", "content": option}])


def _encode_plain(tokenizer: Tokenizer, row: OptionRow, option: str, shots: Sequence[OptionRow]) -> EncodedChat:
    """The prompt and the option as one text, which may continue after the option: the end-of-text token is dropped."""
    before = "".join(f"{shot.prompt} {shot.options[shot.answer]}\n\n" for shot in shots)
    encoded = encode_completion(tokenizer, before + row.prompt.rstrip(), f" {option.lstrip()}")
    ends_with_eos = encoded.loss_mask[-1:] == [True] and encoded.ids[-1] == tokenizer.eos_id
    if ends_with_eos:
        return EncodedChat(encoded.ids[:-1], encoded.loss_mask[:-1])
    return encoded


def has_options(row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether a row of a file looks like multiple choice."""
    return all(_find_source(name, row, columns) is not None for name in _ALIASES)


def read_option_rows(
    files: Sequence[Path],
    columns: Mapping[str, str] | None = None,
    *,
    limit: int | None = None,
    bad_rows: Literal["error", "skip"] = "error",
) -> list[OptionRow]:
    """Read multiple-choice rows: ``prompt``, ``options`` and ``answer`` (index, letter, or the option itself).

    Args:
        files: Data files.
        columns: Our column -> the file's. For the prompt also a text with columns in braces, for the options also
            several columns joined by commas. Common names are recognized without a mapping.
        limit: Maximum number of rows, counted from the first.
        bad_rows: Whether rows that cannot be read are an error, or left out with a warning.

    Raises:
        UsageError: The mapping has an unknown key.
        InputError: A row lacks a column, or its answer is not among the options.
    """
    columns = columns or {}
    for name in columns:
        if name not in _ALIASES:
            raise UsageError(
                f"columns: {name!r} is not a column of multiple choice{did_you_mean(name, _ALIASES)}",
                hint=f"expected {', '.join(_ALIASES)}",
            )
    findings = Findings(bad_rows)
    rows: list[OptionRow] = []
    for file in files:
        for line, row in read_rows(file, findings):
            if limit is not None and len(rows) == limit:
                break
            try:
                rows.append(_read_row(row, columns, f"{file}:{line}"))
            except InputError as error:
                findings.bad_row(f"{file}:{line}", str(error), error.hint)
    findings.check()
    findings.log_warnings()
    return rows


def _read_row(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> OptionRow:
    sources: dict[str, str] = {}
    for name, aliases in _ALIASES.items():
        source = _find_source(name, row, columns)
        if source is None:
            expected = columns.get(name) or " or ".join(aliases[:4])
            raise InputError(
                f"{where}: no column for {name} ({expected}), found: {', '.join(row)}",
                hint="name them: --columns prompt=question --columns options=choices --columns answer=label",
            )
        sources[name] = source

    prompt = _read_prompt(row, sources["prompt"])
    options, labels = _read_options(row, sources["options"], where)
    answer = _answer_index(row[sources["answer"]], options, labels, where)
    return OptionRow(prompt, options, answer, where)


def _find_source(name: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """Where a row has our column ``name``: as mapped, else under the first common name; ``None`` if nowhere."""
    for source in [columns[name]] if name in columns else _ALIASES[name]:
        parts = columns_in(source, row)
        if parts == [source]:
            parts = source.split(",")
        if source in row or all(part in row for part in parts):
            return source
    return None


def _read_prompt(row: Mapping[str, Any], source: str) -> str:
    """A column's text, or a text with columns in braces filled in."""
    return as_text(cell(row, source))


def _read_options(row: Mapping[str, Any], source: str, where: str) -> tuple[tuple[str, ...], list[str]]:
    """The options, and the labels by which the answer may name them."""
    values = row[source] if source in row else [row[column] for column in source.split(",")]
    labels: list[str] = []
    if isinstance(values, Mapping) and "text" in values:  # ARC as its authors publish it: {text: [...], label: [...]}
        labels = [str(label) for label in values.get("label", [])]
        values = values["text"]
    if not isinstance(values, list) or len(values) < 2:
        raise InputError(f"{where}: {source}: expected a list of at least two options")
    options = tuple(as_text(option) for option in values)
    return options, labels or list(string.ascii_uppercase[: len(options)])


def _answer_index(value: Any, options: Sequence[str], labels: Sequence[str], where: str) -> int:
    """The option that an answer names: by label, by index from 0, or by its text, in this order."""
    text = as_text(value).strip()
    if text in labels:
        return labels.index(text)
    if text.upper() in labels:
        return labels.index(text.upper())
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    if text in options:
        return options.index(text)
    raise InputError(
        f"{where}: answer {text!r} is none of the {len(options)} options",
        hint="give the index from 0, the letter from A, or the text of an option",
    )

"""Multiple choice by likelihood: the option to which the model gives the highest probability is its answer."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lit_lora.config import did_you_mean
from lit_lora.data import Rows
from lit_lora.data.read import read_rows
from lit_lora.data.sample import Conversation, as_text
from lit_lora.errors import InputError, UsageError
from lit_lora.evaluate.likelihood import log_likelihoods
from lit_lora.evaluate.scores import Share
from lit_lora.evaluate.shots import encode_after_shots
from lit_lora.model import LanguageModel
from lit_lora.tokenizer import EncodedChat, Tokenizer, encode_completion

__all__ = ["OptionRow", "OptionScores", "evaluate_options", "has_options", "read_option_rows"]

# our column -> names under which it is recognised; several columns with one option each are joined by a comma
_ALIASES = {
    "prompt": ("prompt", "question", "ctx", "context", "goal", "query", "sentence"),
    "options": ("options", "choices", "endings", "answers", "sol1,sol2", "option1,option2"),
    "answer": ("answer", "label", "answerKey", "gold", "target"),
}
_PLACE = re.compile(r"\{(\w+)\}")


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
    """How often the right option is the likeliest."""

    by_sum: Share
    """By the sum of its tokens' log-probabilities."""
    by_mean: Share
    """By that sum divided by the option's length in bytes of UTF-8, so that long options are not at a disadvantage."""
    loss: float
    """Mean of the right option's negative log-likelihood, in nats: falls with every improvement."""
    chance: float
    """What guessing gives."""


def evaluate_options(
    model: LanguageModel,
    tokenizer: Tokenizer,
    rows: Sequence[OptionRow],
    *,
    shots: Sequence[OptionRow] = (),
    chat: bool | None = None,
    micro_batch_tokens: int = 2048,
) -> OptionScores:
    """Log-likelihood of every option after its prompt.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        rows: The questions.
        shots: Answered questions that stand before each one.
        chat: The prompt is a user's message and the option the answer to it, or (false) the prompt and the option are
            one plain text, a blank between them. By default as the checkpoint has a chat template or not.
        micro_batch_tokens: The most tokens per forward pass.
    """
    chat = tokenizer.has_own_template if chat is None else chat
    encode = _encode_chat if chat else _encode_plain
    encoded = [encode(tokenizer, row, option, shots) for row in rows for option in row.options]
    tokenised = Rows.from_tokens((each.ids, each.loss_mask) for each in encoded)
    groups = [len(row.options) for row in rows]
    sums = log_likelihoods(model, tokenised, micro_batch_tokens=micro_batch_tokens, what="options", groups=groups)
    right_sum = right_mean = place = 0
    loss = 0.0
    for row in rows:
        own = sums[place : place + len(row.options)]
        lengths = np.array([max(len(option.encode()), 1) for option in row.options])
        right_sum += int(own.argmax()) == row.answer
        right_mean += int((own / lengths).argmax()) == row.answer
        loss -= float(own[row.answer]) / len(rows)
        place += len(row.options)
    chance = sum(1 / len(row.options) for row in rows) / max(len(rows), 1)
    return OptionScores(Share(right_sum, len(rows)), Share(right_mean, len(rows)), loss, chance)


def _encode_chat(tokenizer: Tokenizer, row: OptionRow, option: str, shots: Sequence[OptionRow]) -> EncodedChat:
    """Only the option counts, its end of turn included: the answer has to be complete."""
    return encode_after_shots(
        tokenizer, _turns(row, option), [_turns(shot, shot.options[shot.answer]) for shot in shots]
    )


def _turns(row: OptionRow, option: str) -> Conversation:
    return Conversation([{"role": "user", "content": row.prompt}, {"role": "assistant", "content": option}])


def _encode_plain(tokenizer: Tokenizer, row: OptionRow, option: str, shots: Sequence[OptionRow]) -> EncodedChat:
    before = "".join(f"{shot.prompt} {shot.options[shot.answer]}\n\n" for shot in shots)
    encoded = encode_completion(tokenizer, before + row.prompt.rstrip(), f" {option.lstrip()}")
    # the text may go on after the option, so its end does not count
    ended = encoded.loss_mask[-1:] == [True] and encoded.ids[-1] == tokenizer.eos_id
    return EncodedChat(encoded.ids[:-1], encoded.loss_mask[:-1]) if ended else encoded


def has_options(row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Whether a row of a file looks like multiple choice."""
    return all(_find(name, row, columns) is not None for name in _ALIASES)


def read_option_rows(
    files: Sequence[Path], columns: Mapping[str, str] | None = None, *, limit: int | None = None
) -> list[OptionRow]:
    """Read multiple-choice rows: ``prompt``, ``options`` and ``answer`` (index, letter, or the option itself).

    Args:
        files: Data files.
        columns: Our column -> the file's, a text with columns in braces for the prompt, or for the options several
            columns joined by commas. Common names are recognised without.
        limit: Only the first rows.

    Raises:
        UsageError: The mapping names a column of ours that is none.
        InputError: A row lacks a column or its answer is not among the options.
    """
    columns = columns or {}
    for name in columns:
        if name not in _ALIASES:
            raise UsageError(
                f"columns: {name!r} is no column of multiple choice{did_you_mean(name, _ALIASES)}",
                hint=f"known: {', '.join(_ALIASES)}",
            )
    rows: list[OptionRow] = []
    for file in files:
        for line, row in read_rows(file):
            if limit is not None and len(rows) == limit:
                return rows
            rows.append(_read(row, columns, f"{file}:{line}"))
    return rows


def _read(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> OptionRow:
    found: dict[str, str] = {}
    for name, aliases in _ALIASES.items():
        source = _find(name, row, columns)
        if source is None:
            wanted = columns.get(name) or " or ".join(aliases[:4])
            raise InputError(
                f"{where}: no column for {name} ({wanted}), found: {', '.join(row)}",
                hint="--columns prompt=question --columns options=choices --columns answer=label says which is which",
            )
        found[name] = source
    template = found["prompt"]
    prompt = as_text(row[template]) if template in row else _PLACE.sub(lambda m: as_text(row[m[1]]), template)
    options, labels = _options(row, found["options"], where)
    return OptionRow(prompt, options, _answer(row[found["answer"]], options, labels, where), where)


def _find(name: str, row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """The file's column for ours: as mapped, else the first that goes by a known name."""
    for source in [columns[name]] if name in columns else _ALIASES[name]:
        parts = _PLACE.findall(source) or source.split(",")
        if source in row or all(part in row for part in parts):
            return source
    return None


def _options(row: Mapping[str, Any], source: str, where: str) -> tuple[tuple[str, ...], list[str]]:
    """The options, and the labels by which the answer may name them."""
    value = row[source] if source in row else [row[part] for part in source.split(",")]
    labels: list[str] = []
    if isinstance(value, Mapping) and "text" in value:  # ARC as its authors publish it
        labels, value = [str(label) for label in value.get("label", [])], value["text"]
    if not isinstance(value, list) or len(value) < 2:
        raise InputError(f"{where}: {source}: expected a list of at least two options")
    return tuple(as_text(option) for option in value), labels or list(string.ascii_uppercase[: len(value)])


def _answer(value: Any, options: Sequence[str], labels: Sequence[str], where: str) -> int:
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
        hint="expected the index from 0, a letter from A, or the text of an option",
    )

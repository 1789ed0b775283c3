"""Rows that must not be learned as they are: preferences, unwanted answers, pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lit_lora.data.formats.messages import is_message_list
from lit_lora.errors import InputError

__all__ = ["check_preference", "check_wanted", "check_without_media"]

# The better answer and the worse, as data sets call them.
_PREFERENCES = (
    ("chosen", "rejected"),
    ("preferred", "other"),
    ("preferred", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("response_j", "response_k"),
    ("accepted", "rejected"),
    ("win", "lose"),
    ("winner", "loser"),
    ("better", "worse"),
)
# Pairs of answers without a fixed better one, if a third column says which is.
_JUDGED = (("response_0", "response_1"), ("response_a", "response_b"), ("completion_a", "completion_b"))
_WANTED = ("label", "kto_tag", "desirable")
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_PROMPTS = (
    "prompt",
    "question",
    "instruction",
    "input",
    "query",
    "x",
    "messages",
    "conversations",
    "context",
    "history",
)


def check_preference(row: Mapping[str, Any]) -> None:
    """Refuse a row with a better and a worse answer.

    Raises:
        InputError: It is one; the hint maps the better answer.
    """
    for better, worse in _PREFERENCES:
        if better in row and worse in row:
            mapping = _preference_mapping(row, better)
            raise InputError(
                f"preference rows ({better}, {worse}), expected one answer per row",
                hint=f"to train on {better}, map it: columns: {{{mapping}}}",
            )
    if "chosen" in row and "completion" not in row and "messages" not in row:
        raise InputError(
            "preference rows (chosen), expected one answer per row",
            hint=f"to train on chosen, map it: columns: {{{_preference_mapping(row, 'chosen')}}}",
        )
    for first, second in _JUDGED:
        if first in row and second in row:
            raise InputError(
                f"preference rows ({first}, {second}), expected one answer per row",
                hint=f"to train on {first} in every row, map it: columns: {{{_preference_mapping(row, first)}}}",
            )


def _preference_mapping(row: Mapping[str, Any], answer: str) -> str:
    """The mapping that trains on one of two answers: alone if it holds the whole conversation."""
    value = row[answer]
    is_dialog_text = isinstance(value, str) and "\n\nHuman:" in f"\n\n{value}" and "\n\nAssistant:" in value
    is_whole = is_message_list(value) and len(value) > 1
    if is_dialog_text or is_whole:
        return f"messages: {answer}"
    prompt = next((name for name in _PROMPTS if name in row), None)
    if prompt is None:
        others = [name for name, cell in row.items() if name != answer and isinstance(cell, str)]
        prompt = others[0] if others else answer
    return f"prompt: {prompt}, completion: {answer}"


def check_wanted(row: Mapping[str, Any], used: Collection[str]) -> None:
    """Refuse a row whose answer is marked as not wanted, as in KTO's data.

    Args:
        row: The file's columns.
        used: The columns that are read; a label that is itself the answer is no mark.

    Raises:
        InputError: It is.
    """
    for name in _WANTED:
        if row.get(name) is False and name not in used:
            raise InputError(
                f"{name}: false marks an answer that is not wanted, and it would be learned",
                hint=f"train on the rows whose {name} is true",
            )


def check_without_media(row: Mapping[str, Any]) -> None:
    """Refuse a row with pictures, sound or video.

    Raises:
        InputError: It has some.
    """
    for name in _MEDIA:
        value = row.get(name)
        if value is not None and not isinstance(value, int | float) and len(value):
            raise InputError(f"a row with {name}, but lit-lora finetunes models of text", hint="use rows without them")

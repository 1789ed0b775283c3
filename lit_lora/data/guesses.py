"""Which of a file's columns is probably which: suggestions for errors and for ``init``, never used unasked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from lit_lora.data.cells import is_empty

__all__ = [
    "CHOICE_COLUMNS",
    "CLASS_COLUMNS",
    "CONTEXT_COLUMNS",
    "MEDIA_COLUMNS",
    "METADATA_COLUMNS",
    "as_yaml",
    "fold",
    "guess",
    "mapping_hint",
]

CONTEXT_COLUMNS = frozenset(
    [
        "context", "contexts", "ctx", "schema", "dbschema", "createtable", "passage", "passages", "document",
        "documents", "background", "table", "tables", "history", "evidence", "article", "paragraph",
        "paragraphs", "choices", "options", "endings", "facts", "premise", "hypothesis",
        "sentence2", "question2", "text2", "transcript",
    ]
)  # fmt: skip
"""Folded names of columns without which an answer is often impossible."""

CHOICE_COLUMNS = frozenset(["choices", "options", "endings"])
"""Folded names of columns that hold the answers to choose from."""

MEDIA_COLUMNS = frozenset(
    [
        "image", "images", "video", "videos", "audio", "audios",
    ]
)  # fmt: skip
"""Folded names of columns of what no language model for text reads."""

CLASS_COLUMNS = frozenset(
    [
        "label", "labels", "target", "class", "category", "sentiment", "intent", "classid", "labelid",
    ]
)  # fmt: skip
"""Folded names of columns that hold a class, perhaps as a bare number."""

METADATA_COLUMNS = frozenset(
    [
        "id", "idx", "index", "uid", "uuid", "url", "link", "source", "meta", "metadata", "title",
        "questiontitle", "timestamp", "date", "created", "language", "lang", "split", "author", "user",
        "userid", "username", "score", "level", "type", "difficulty",
    ]
)  # fmt: skip

_NAMES = {
    "prompt": (
        "prompt", "question", "query", "instruction", "input", "problem", "tweet", "comment", "message", "text",
        "sentence", "sentence1", "review", "utterance", "request", "post", "email", "document", "article",
        "passage", "dialogue", "description", "goal", "task", "ctx", "premise", "content", "source", "context",
        "title", "user", "human", "en",
    ),
    "completion": (
        "completion", "answer", "answers", "response", "output", "solution", "label", "labels", "target", "reply",
        "summary", "highlights", "sentiment", "intent", "category", "class", "slots", "sql", "code", "translation",
        "result", "report", "chosen", "ending", "endings", "body", "assistant", "bot", "gpt", "fr",
        "de", "es", "data",
    ),
    "text": ("text", "content", "document", "body", "passage"),
}  # fmt: skip
"""Format column -> usual folded names of such a column, the likeliest first."""

_NAMES["instruction"] = _NAMES["prompt"]
_NAMES["output"] = _NAMES["completion"]
_NAMES["response"] = _NAMES["completion"]


def fold(name: str) -> str:
    """A column's name without case, spaces and punctuation: ``userprompt`` for ``User Prompt``."""
    return re.sub(r"[\W_]+", "", name).lower()


def guess(row: Mapping[str, Any], needed: Iterable[str]) -> dict[str, str]:
    """A column, or a template with columns in braces, for each of the format's columns that can be guessed.

    Of two columns, one that has a usual name decides what the other is.
    """
    mapping: dict[str, str] = {}
    needed = list(needed)
    for column in needed:
        source = _likeliest(row, _NAMES.get(column, ()), taken=mapping.values())
        if source is not None:
            mapping[column] = source

    remaining = [name for name in row if name not in mapping.values() and fold(name) not in METADATA_COLUMNS]
    missing = [column for column in needed if column not in mapping]
    if mapping and len(missing) == 1 and len(remaining) == 1:
        mapping[missing[0]] = remaining[0]
    elif len(needed) == 2 and missing:
        mapping |= _within(row, needed)
    return {column: _filled_in(row, mapping, column) for column in needed if column in mapping}


def _likeliest(row: Mapping[str, Any], names: Iterable[str], taken: Iterable[str]) -> str | None:
    """The column whose name is the likeliest, else one of whose words is."""
    free = [name for name in row if name not in taken]
    by_fold = {fold(name): name for name in reversed(free)}
    for name in names:
        if name in by_fold:
            return by_fold[name]
    for name in names:
        for column in free:
            if name in _words(column) and fold(column) not in METADATA_COLUMNS and len(name) > 2:
                return column
    return None


def _words(name: str) -> set[str]:
    """The words of ``questionText``, ``input_text`` or ``Target Report``."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return set(re.split(r"[\W_]+", spaced.lower()))


def _within(row: Mapping[str, Any], needed: list[str]) -> dict[str, str]:
    """The two texts within the row's only object, as in ``{"translation": {"en": …, "fr": …}}``."""
    for name, value in row.items():
        if isinstance(value, Mapping) and len(value) == 2 and all(isinstance(part, str) for part in value.values()):
            return {column: f"{{{name}.{key}}}" for column, key in zip(needed, value, strict=True)}
    return {}


def _filled_in(row: Mapping[str, Any], mapping: Mapping[str, str], column: str) -> str:
    """The guessed source as a template where it needs one: text within an object, or a context before a question."""
    source = mapping[column]
    value = row.get(source)
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):  # SQuAD's answers
        return f"{{{source}.text[0]}}"
    if column in ("prompt", "instruction") and not isinstance(value, list | Mapping):
        contexts = [
            name
            for name in row
            if fold(name) in CONTEXT_COLUMNS and name not in mapping.values() and not is_empty(row[name])
        ]
        if contexts and source in row:
            return "\n\n".join(f"{{{name}}}" for name in [*contexts, source])
    return source


def mapping_hint(mapping: Mapping[str, str]) -> str:
    """How to write a mapping in the config, and on the command line where that is possible."""
    in_config = f"columns: {as_yaml(mapping)}"
    if any("\n" in source for source in mapping.values()):
        return in_config
    flags = " ".join(f"--columns {shlex.quote(f'{column}={source}')}" for column, source in mapping.items())
    return f"{in_config} in the config, or {flags}"


def as_yaml(mapping: Mapping[str, str]) -> str:
    """``{prompt: question, completion: "{answers.text[0]}"}``."""
    entries = []
    for column, source in mapping.items():
        if not re.fullmatch(r"[^\W\d][\w .-]*", source) or source.lower() in ("null", "true", "false", "yes", "no"):
            escaped = source.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            source = f'"{escaped}"'
        entries.append(f"{column}: {source}")
    return f"{{{', '.join(entries)}}}"

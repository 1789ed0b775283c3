"""Answers compared with references: exact match, and the fields of a JSON answer.

Before anything is compared, both texts are brought to Unicode NFC, a Markdown code fence around the whole text is
taken off, and white space at the ends is cut. A reference that is a JSON object or list is compared as JSON: white
space and the order of keys do not count; types do (``"7"`` is not ``7``). Any other reference is compared as text, with
every run of white space as one blank; upper and lower case differ.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_lora.evaluate.scores import Share
from lit_lora.tokenizer import Message

__all__ = ["Answer", "Scores", "clean", "is_match", "parse_json", "score_answers"]

_FENCE = re.compile(r"\A```[\w+-]*[ \t]*\n(.*?)\n?```\Z", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """One row's answer beside its reference."""

    messages: Sequence[Message]
    """The conversation up to the answer."""
    reference: str
    answer: str
    ended: bool
    """Whether the model ended the answer itself, rather than being cut off."""

    @property
    def right(self) -> bool:
        """Whether it matches."""
        return is_match(self.answer, self.reference)


@dataclass(frozen=True)
class Scores:
    """What generation on a dataset gave."""

    exact_match: Share
    fields: dict[str, Share]
    """Per field of the references that are JSON objects: how often the answer has the same value."""
    valid_json: Share | None
    """Answers that are JSON, where all references are; ``None`` where they are not."""
    answers: list[Answer]
    """In the order of the rows."""
    seconds: float

    @property
    def rows(self) -> int:
        """Rows that were answered."""
        return len(self.answers)

    @property
    def ended(self) -> Share:
        """Answers that ended by themselves."""
        return Share(sum(answer.ended for answer in self.answers), self.rows)

    @property
    def samples(self) -> list[Answer]:
        """The first three answers, to look at."""
        return self.answers[:3]


def clean(text: str) -> str:
    """NFC, without a code fence around it and without white space at the ends."""
    text = unicodedata.normalize("NFC", text).strip()
    fenced = _FENCE.match(text)
    return fenced[1].strip() if fenced else text


def parse_json(text: str) -> Any:
    """The JSON value of a cleaned text, ``None`` where it is not JSON."""
    try:
        return json.loads(clean(text))
    except (ValueError, RecursionError):
        return None


def is_match(answer: str, reference: str) -> bool:
    """Whether the answer is the reference, after the normalisation that the module states."""
    expected = parse_json(reference)
    if isinstance(expected, dict | list):
        return _same(parse_json(answer), expected)
    return clean(answer).split() == clean(reference).split()


def score_answers(answers: Sequence[Answer], seconds: float) -> Scores:
    """Exact match of every answer, and per field where the references are JSON objects."""
    references = [parse_json(answer.reference) for answer in answers]
    given = [parse_json(answer.answer) for answer in answers]
    fields: dict[str, list[bool]] = {}
    for expected, got in zip(references, given, strict=True):
        if isinstance(expected, dict):
            for name, value in expected.items():
                right = isinstance(got, dict) and name in got and _same(got[name], value)
                fields.setdefault(name, []).append(right)
    all_json = bool(answers) and all(isinstance(expected, dict | list) for expected in references)
    return Scores(
        exact_match=Share(sum(answer.right for answer in answers), len(answers)),
        fields={name: Share(sum(right), len(right)) for name, right in fields.items()},
        valid_json=Share(sum(isinstance(got, dict | list) for got in given), len(given)) if all_json else None,
        answers=list(answers),
        seconds=seconds,
    )


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: Python's ``True == 1`` and ``1 == 1.0`` are not."""
    texts = [json.dumps(value, sort_keys=True, ensure_ascii=False) for value in (one, other)]
    return unicodedata.normalize("NFC", texts[0]) == unicodedata.normalize("NFC", texts[1])

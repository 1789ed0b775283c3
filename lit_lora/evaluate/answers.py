"""Answers compared with references: exact match, and the fields of a JSON answer.

Before they are compared, both texts are normalized to Unicode NFC and lose a Markdown code fence around the whole text
and white space at the ends. A reference that is a JSON object or list is compared as JSON: white space and the order of
keys do not matter; types do (``"7"`` is not ``7``). Any other reference is compared as text, case-sensitively, with
every run of white space as one space.
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
    """Whether the model ended the answer itself instead of being cut off."""

    @property
    def right(self) -> bool:
        """Whether the answer matches the reference."""
        return is_match(self.answer, self.reference)


@dataclass(frozen=True)
class Scores:
    """The results of generation on a dataset."""

    exact_match: Share
    fields: dict[str, Share]
    """Per field of the references that are JSON objects: how often the answer has the same value."""
    valid_json: Share | None
    """Answers that are JSON; ``None`` unless all references are."""
    answers: list[Answer]
    """In the order of the rows."""
    seconds: float

    @property
    def rows(self) -> int:
        """Rows that were answered."""
        return len(self.answers)

    @property
    def ended(self) -> Share:
        """Answers that the model ended itself."""
        return Share(sum(answer.ended for answer in self.answers), self.rows)

    @property
    def samples(self) -> list[Answer]:
        """The first three answers, to look at."""
        return self.answers[:3]


def clean(text: str) -> str:
    """The text in NFC, without a code fence around it and white space at the ends."""
    text = unicodedata.normalize("NFC", text).strip()
    fenced = _FENCE.match(text)
    return fenced[1].strip() if fenced else text


def parse_json(text: str) -> Any:
    """The JSON value of a text after :func:`clean`; ``None`` if it is not JSON."""
    try:
        return json.loads(clean(text))
    except (ValueError, RecursionError):
        return None


def is_match(answer: str, reference: str) -> bool:
    """Whether the answer equals the reference after normalization, as the module describes it."""
    expected = parse_json(reference)
    if isinstance(expected, dict | list):
        return _same_json(parse_json(answer), expected)
    return clean(answer).split() == clean(reference).split()


def score_answers(answers: Sequence[Answer], seconds: float) -> Scores:
    """Exact match of the answers, and of each field where the references are JSON objects."""
    expected_values = [parse_json(answer.reference) for answer in answers]
    answered_values = [parse_json(answer.answer) for answer in answers]

    fields: dict[str, list[bool]] = {}
    for expected, answered in zip(expected_values, answered_values, strict=True):
        if isinstance(expected, dict):
            for name, value in expected.items():
                right = isinstance(answered, dict) and name in answered and _same_json(answered[name], value)
                fields.setdefault(name, []).append(right)

    valid_json = None
    if answers and all(isinstance(expected, dict | list) for expected in expected_values):
        valid_json = Share(sum(isinstance(value, dict | list) for value in answered_values), len(answers))
    return Scores(
        exact_match=Share(sum(answer.right for answer in answers), len(answers)),
        fields={name: Share(sum(right), len(right)) for name, right in fields.items()},
        valid_json=valid_json,
        answers=list(answers),
        seconds=seconds,
    )


def _same_json(one: Any, other: Any) -> bool:
    """Whether two values are equal as JSON, compared as text because in Python ``True == 1 == 1.0``."""
    return _canonical(one) == _canonical(other)


def _canonical(value: Any) -> str:
    return unicodedata.normalize("NFC", json.dumps(value, sort_keys=True, ensure_ascii=False))

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.evaluate import Answer, Share
from lit_lora.evaluate.answers import is_match, score_answers


@pytest.mark.parametrize(
    ("answer", "reference", "match"),
    [
        ("Paris", "Paris", True),
        (" Paris \n", "Paris", True),
        ("New   York\ncity", "New York city", True),
        ("paris", "Paris", False),
        ("Paris.", "Paris", False),
        ("cafe\u0301", "caf\u00e9", True),  # NFC
        ('{"a":1,"b":"x"}', '{"b": "x", "a": 1}', True),
        ('```json\n{"a":1}\n```', '{"a":1}', True),
        ('Here you are: {"a":1}', '{"a":1}', False),
        ('{"a":1,"b":2}', '{"a":1}', False),
        ('{"a":"1"}', '{"a":1}', False),
        ('{"a":true}', '{"a":1}', False),
        ("[1, 2]", "[1,2]", True),
        ("[2, 1]", "[1,2]", False),
        ("7", "7", True),
        ("07", "7", False),
        ("", "", True),
    ],
)
def test_match_is_after_the_stated_normalization_and_no_other(answer: str, reference: str, match: bool) -> None:
    assert is_match(answer, reference) is match


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(JSON) | st.dictionaries(st.text(), JSON), st.sampled_from([None, 2]))
def test_json_matches_itself_however_it_is_written(value: object, indent: int | None) -> None:
    assert is_match(json.dumps(value, indent=indent), json.dumps(value, ensure_ascii=False))


@given(st.text())
def test_no_answer_breaks_the_comparison(text: str) -> None:
    assert is_match(text, '{"a": 1}') in (True, False)
    assert is_match(text, text)


def _answer(text: str, reference: object) -> Answer:
    return Answer([], reference if isinstance(reference, str) else json.dumps(reference), text, True)


def test_fields_are_counted_over_the_rows_that_have_them() -> None:
    scores = score_answers(
        [
            _answer('{"a": 1, "b": null}', {"a": 1, "b": None}),
            _answer('{"a": 2}', {"a": 1}),
            _answer("no idea", {"a": 1, "b": "x"}),
            _answer('[{"a": 1}]', {"a": 1}),
        ],
        seconds=1.0,
    )
    assert scores.exact_match == Share(1, 4)
    assert scores.fields == {"a": Share(1, 4), "b": Share(1, 2)}
    assert scores.valid_json == Share(3, 4)


def test_a_field_that_is_left_out_is_not_the_same_as_null() -> None:
    assert score_answers([_answer("{}", {"a": None})], 1.0).fields == {"a": Share(0, 1)}


def test_text_references_have_no_fields_and_no_json_share() -> None:
    scores = score_answers([_answer("yes", "yes"), _answer("no", "yes")], 1.0)
    assert (scores.exact_match, scores.fields, scores.valid_json) == (Share(1, 2), {}, None)


def test_deep_nesting_is_no_crash() -> None:
    assert not is_match("[" * 100_000, "[1]")

"""Columns as people have them: what is asked is in the prompt, what is answered is text, and hints work as written."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from lit_lora.data.cells import as_text, cell
from lit_lora.data.columns import RowReader, guess_columns
from lit_lora.data.config import DataConfig
from lit_lora.data.findings import Findings
from lit_lora.data.read import read_rows
from lit_lora.data.sample import Conversation
from lit_lora.errors import InputError

USER = {"role": "user", "content": "Which animal barks?"}
DOG = {"role": "assistant", "content": "A dog."}
CAT = {"role": "assistant", "content": "A cat."}


def read(row: dict[str, Any], **settings: Any) -> tuple[Conversation, Findings]:
    findings = Findings()
    sample = RowReader(DataConfig(path="rows.jsonl", **settings), findings).sample(row, "rows.jsonl:1")
    findings.check()
    assert isinstance(sample, Conversation)
    return sample, findings


def turns(row: dict[str, Any], **settings: Any) -> list[tuple[str, str | None]]:
    sample, _ = read(row, **settings)
    return [(message["role"], message["content"]) for message in sample.messages]


def warnings(row: dict[str, Any], **settings: Any) -> list[str]:
    return [finding.message for finding in read(row, **settings)[1].of_level("warning")]


def error(row: dict[str, Any], **settings: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        read(row, **settings)
    return caught.value


def mapping_in(hint: str | None) -> dict[str, str]:
    """The mapping that a hint tells to paste."""
    assert hint is not None
    text = hint[hint.index("columns: {") :]
    for end in range(len(text), 0, -1):  # the hint goes on after the mapping
        try:
            document = yaml.safe_load(text[:end])
        except yaml.YAMLError:
            continue
        if isinstance(document["columns"], dict):
            return document["columns"]
    raise AssertionError(hint)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER], "completion": [DOG]}, ["Which animal barks?", "A dog."]),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([DOG])}, ["Which animal barks?", "A dog."]),
        ({"prompt": [USER], "completion": DOG}, ["Which animal barks?", "A dog."]),
        ({"prompt": [USER], "completion": "A dog."}, ["Which animal barks?", "A dog."]),
        ({"prompt": "Which animal barks?", "completion": [DOG]}, ["Which animal barks?", "A dog."]),
        ({"question": [USER], "answer": [DOG]}, ["Which animal barks?", "A dog."]),
        ({"instruction": [USER], "output": [DOG]}, ["Which animal barks?", "A dog."]),
        ({"prompt": [USER], "completion": [USER, DOG]}, ["Which animal barks?", "A dog."]),
    ],
)
def test_messages_in_columns_of_prompt_and_completion_are_a_conversation(row, expected):
    sample, _ = read(row)
    assert [message["content"] for message in sample.messages] == expected
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    assert sample.context_only == frozenset()


def test_only_the_completion_of_a_conversation_is_learned():
    system = {"role": "system", "content": "Be brief."}
    sample, _ = read({"prompt": [system, USER, CAT, USER], "completion": [DOG], "system": "Other."})
    assert [message["content"] for message in sample.messages][::4] == ["Be brief.", "A dog."]
    assert sample.context_only == {2}
    sample, _ = read({"prompt": [USER, CAT, USER], "completion": [DOG]}, system="S")
    assert sample.context_only == {2}


def test_history_is_read_as_earlier_turns():
    expected = [("user", "Where?"), ("assistant", "Right."), ("user", "and then?"), ("assistant", "Go left.")]
    row = {"query": "and then?", "response": "Go left."}
    assert turns({**row, "history": [["Where?", "Right."]]}) == expected
    assert turns({**row, "history": [{"query": "Where?", "response": "Right."}]}) == expected
    assert turns({**row, "history": '[["Where?", "Right."]]'}) == expected
    assert turns({"instruction": "and then?", "output": "Go left.", "history": [["Where?", "Right."]]}) == expected
    assert turns({**row, "history": []}) == turns({**row, "history": None}) == expected[2:]
    assert "history: " in str(error({**row, "history": ["Where?"]}))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "How many?", "context": "CREATE TABLE t (a INT)", "answer": "1"},
        {"input": "How many?", "context": "CREATE TABLE t (a INT)", "completion": "1"},
        {"instruction": "How many?", "context": "CREATE TABLE t (a INT)", "output": "1"},
        {"instruction": "How many?", "context": "CREATE TABLE t (a INT)", "response": "1"},
    ],
)
def test_a_context_is_part_of_the_prompt(row):
    assert turns(row)[0] == ("user", "How many?\n\nCREATE TABLE t (a INT)")
    assert turns({**row, "context": None})[0] == ("user", "How many?")


@pytest.mark.parametrize("column", ["db_schema", "document", "table", "Create Table", "choices", "evidence"])
def test_a_column_without_which_the_answer_is_impossible_is_a_warning_whose_remedy_works(column):
    row = {"question": "How many?", column: "t (a INT)", "answer": "one"}
    (warning,) = warnings(row)
    assert column in warning
    mapping = mapping_in(warning)
    assert turns(row, columns=mapping) == [("user", "t (a INT)\n\nHow many?"), ("assistant", "one")]
    assert warnings(row, columns=mapping) == []
    assert warnings({**row, column: None}) == []


def test_a_context_that_the_mapping_leaves_out_is_a_warning_and_one_in_its_template_is_not_added_twice():
    row = {"q": "How many?", "context": "three", "a": "3"}
    (warning,) = warnings(row, columns={"prompt": "q", "completion": "a"})
    assert turns(row, columns=mapping_in(warning)) == [("user", "three\n\nHow many?"), ("assistant", "3")]


def test_metadata_beside_an_answer_is_no_warning():
    _, findings = read({"prompt": "a", "completion": "b", "id": 3, "source": "web"})
    assert findings.of_level("warning") == []
    assert findings.unused_columns == {"id": 1, "source": 1}


def test_images_are_refused_by_name():
    row = {"prompt": "What is it?", "completion": "A cat.", "images": ["cat.png"]}
    refused = error(row)
    assert "a row with images" in str(refused)
    assert refused.hint.startswith("use rows without images")
    assert turns({**row, "images": []}) == turns({**row, "images": None})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01 12:30:00"),
        (datetime.time(12, 30), "12:30:00"),
        (Decimal("12.50"), "12.50"),
        (Decimal("1E+2"), "100"),
        (b"caf\xc3\xa9", "café"),
        (0.10000000149011612, "0.1"),
        (np.float32(0.1), "0.1"),
        (0.1, "0.1"),
        (1 / 3, "0.3333333333333333"),
        (2.0, "2"),
        (-2.5, "-2.5"),
        (np.int64(3), "3"),
        (True, "true"),
        (None, ""),
        (float("nan"), ""),
        (np.array([1, 2]), "[1, 2]"),
        ({"when": datetime.date(2024, 5, 1), "price": Decimal("12.50"), "x": [b"a"]},
         '{"when": "2024-05-01", "price": 12.5, "x": ["a"]}'),
        ({"x": 0.10000000149011612, "y": None}, '{"x": 0.1, "y": null}'),
    ],
)  # fmt: skip
def test_a_cell_is_written_as_a_person_would(value, text):
    assert as_text(value) == text
    assert turns({"prompt": "a", "completion": value})[1] == ("assistant", text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": float("nan")}, "NaN within an object"),
        ({"x": [float("inf")]}, "infinite number"),
        (json.loads("1e400"), "infinite number"),
        (b"\xff\xfe", "not UTF-8"),
        ({1, 2}, "type set"),
    ],
)
def test_what_has_no_text_is_a_bad_row(value, message):
    refused = error({"prompt": "a", "completion": value})
    assert str(refused).startswith("rows.jsonl:1: ")
    assert message in str(refused)


@pytest.mark.parametrize("value", [{"a": "x"}, ["x", "y"]])
def test_an_object_or_a_list_in_a_prompt_is_refused_and_both_remedies_work(value):
    row = {"prompt": value, "completion": "b"}
    refused = error(row)
    assert "prompt: expected text, got" in str(refused)
    first, second = refused.hint.split(", or ")
    assert turns(row, columns=mapping_in(first))[0] == ("user", "x")
    assert turns(row, columns=mapping_in(second))[0] == ("user", json.dumps(value))
    assert "q: expected text" in str(error({"q": value, "b": "b"}, columns={"prompt": "q", "completion": "b"}))


def test_an_empty_instruction_leaves_no_blank_lines():
    row = {"instruction": "", "input": "What is it?", "output": "A tool."}
    assert turns(row)[0] == ("user", "What is it?")
    assert turns({**row, "instruction": None})[0] == ("user", "What is it?")
    assert warnings(row) == []
    assert warnings({**row, "input": " "}) == ["with an empty prompt"]


def test_templates_reach_into_values():
    row = {"answers": {"text": ["four", "4"]}, "a.b": "dotted", "n": None}
    assert cell(row, "{answers.text[0]}, {answers.text[1]}") == "four, 4"
    assert cell(row, "{a.b}") == "dotted"
    assert cell(row, "{n.text[0]}!") == "!"
    for source, message in [
        ("{answers.txt}", "answers has no .txt, found: text"),
        ("{answers.text[2]}", r"answers.text has no \[2\], it is a list of 2"),
        ("{answer.text}", "no column 'answer.text'"),
    ]:
        with pytest.raises(ValueError, match=message):
            cell(row, source)


PREFERENCES = [
    {"prompt": "Which animal barks?", "chosen": "A dog.", "rejected": "A cat."},
    {"prompt": "Which animal barks?", "chosen": [DOG], "rejected": [CAT]},
    {"prompt": "Which animal barks?", "chosen": [USER, DOG], "rejected": [USER, CAT]},
    {"prompt": [USER], "chosen": [DOG], "rejected": [CAT]},
    {"chosen": [USER, DOG], "rejected": [USER, CAT]},
    {"prompt": "Which animal barks?", "chosen": DOG, "rejected": CAT},
    {
        "conversations": [{"from": "human", "value": "Which animal barks?"}],
        "chosen": {"from": "gpt", "value": "A dog."},
        "rejected": {"from": "gpt", "value": "A cat."},
    },
    {"prompt": "Which animal barks?", "preferred": "A dog.", "other": "A cat."},
    {"question": "Which animal barks?", "response_j": "A dog.", "response_k": "A cat."},
    {"x": "Which animal barks?", "chosen": "A dog."},
    {"input": "Which animal barks?", "win": "A dog.", "lose": "A cat."},
    {"instruction": "Which animal barks?", "Chosen Response": "A dog.", "Rejected Response": "A cat."},
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_preference_rows_are_refused_and_the_remedy_learns_the_chosen_answer(row):
    refused = error(row)
    assert "preference rows (" in str(refused)
    expected = [("user", "Which animal barks?"), ("assistant", "A dog.")]
    assert turns(row, columns=mapping_in(refused.hint)) == expected
    assert guess_columns(DataConfig(path="r"), row) is None


def test_two_answers_with_a_verdict_are_preference_rows():
    refused = error({"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1})
    assert "preference rows (response_0, response_1)" in str(refused)
    assert "better_response_id" in refused.hint


@pytest.mark.parametrize("label", [False, "false", "False"])
@pytest.mark.parametrize(
    "row",
    [{"messages": [USER, DOG]}, {"prompt": "Which swims?", "completion": "fish"}, {"question": "a", "answer": "b"}],
)
def test_an_answer_that_is_not_wanted_is_refused(row, label):
    refused = error({**row, "label": label})
    assert "label: false marks" in str(refused)
    assert "keep only the rows whose label is true" in refused.hint
    assert turns({**row, "label": True})[-1][0] == "assistant"


def test_a_boolean_class_stays_usable():
    columns = {"prompt": "text", "completion": "label"}
    assert turns({"text": "great", "label": False}, columns=columns)[1] == ("assistant", "false")


HINTED = [
    {"tweet": "x", "label": "y"},
    {"input_text": "x", "target_report": "y"},
    {"description": "x", "data": "y"},
    {"questionTitle": "t", "questionText": "x", "answerText": "y"},
    {"User Prompt": "x", "Model Response": "y"},
    {"comment": "x", "sentiment": "y"},
    {"message": "x", "category": "y"},
    {"review": "x", "stars": "y"},
    {"natural_language": "x", "sql": "y"},
    {"docstring": "x", "code": "y"},
    {"problem": "x", "solution": "y"},
    {"title": "x", "body": "y"},
    {"frage": "x", "antwort": "y"},
    {"a": "x", "b": "y", "c": "z"},
    {"text": "x", "label": "y", "id": 1},
    {"sentence": "x", "label": "y", "idx": 1},
    {"article": "x", "highlights": "y", "id": "1"},
    {"dialogue": "x", "summary": "y", "id": "1"},
    {"translation": {"en": "x", "fr": "y"}},
    {"id": "1", "question": "x", "answers": {"text": ["y"], "answer_start": [0]}},
    {"en": "x", "fr": "y"},
]


@pytest.mark.parametrize("row", HINTED, ids=lambda row: ",".join(row))
def test_columns_of_other_names_are_refused_with_a_mapping_that_works(row):
    refused = error(row)
    assert "YOUR_COLUMN" not in refused.hint
    assert turns(row, columns=mapping_in(refused.hint)) == [("user", "x"), ("assistant", "y")]


def test_the_mapping_for_squad_has_the_passage_in_the_prompt():
    row = {"id": "1", "context": "p", "question": "x", "answers": {"text": ["y"], "answer_start": [0]}}
    assert turns(row, columns=mapping_in(error(row).hint)) == [("user", "p\n\nx"), ("assistant", "y")]


def test_bare_class_numbers_are_a_warning_until_they_have_words():
    row = {"tweet": "x", "label": "1"}
    columns = {"prompt": "tweet", "completion": "label"}
    (warning,) = warnings(row, columns=columns)
    assert "--values label=0:no,1:yes" in warning
    words = {"label": {"0": "no", "1": "yes"}}
    assert warnings(row, columns=columns, values=words) == []
    assert turns({**row, "label": 1.0}, columns=columns, values=words)[1] == ("assistant", "yes")
    assert warnings({"question": "1 + 1?", "answer": "2"}) == []


def test_the_index_of_a_choice_is_a_bare_number_too():
    row = {"question": "x", "choices": ["a", "b"], "answer": 1}
    mapping = mapping_in(error(row).hint)
    (warning,) = warnings(row, columns=mapping)
    assert "bare number (column answer)" in warning
    assert turns(row, columns=mapping)[0] == ("user", '["a", "b"]\n\nx')


def test_a_text_that_is_json_stays_a_text():
    for text in ['[{"x": 1}]', '[{"role": "cook", "content": "soup"}]', "[{broken"]:
        assert turns({"prompt": text, "completion": text}) == [("user", text), ("assistant", text)]


def test_columns_of_parquet_are_written_as_a_person_would(tmp_path):
    table = pa.table(
        {
            "prompt": ["a"],
            "day": pa.array([datetime.date(2024, 5, 1)]),
            "price": pa.array([Decimal("12.50")]),
            "name": pa.array([b"caf\xc3\xa9"]),
            "share": pa.array([0.1], pa.float32()),
            "count": pa.array([3.0]),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    ((_, row),) = read_rows(tmp_path / "rows.parquet", Findings())
    columns = {"prompt": "prompt", "completion": "{day} {price} {name} {share} {count}"}
    assert turns(row, columns=columns)[1] == ("assistant", "2024-05-01 12.50 café 0.1 3")


def test_each_row_is_read_by_its_own_columns():
    findings = Findings()
    reader = RowReader(DataConfig(path="r"), findings)
    rows = [
        {"instruction": "a", "input": None, "response": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"prompt": "a", "completion": None},
        {"messages": [USER, DOG]},
    ]
    for number, row in enumerate(rows, 1):
        assert reader.sample(row, f"r:{number}") is not None
    assert findings.formats == {"alpaca": 2, "prompt_completion": 1, "messages": 1}
    assert findings.of_level("warning") == []
    assert reader.sample({"text": "plain"}, "r:5") == "plain"
    assert [finding.message for finding in findings.of_level("warning")] == [
        "of format text, while the first rows are alpaca"
    ]

"""Every format gives the conversation that its rows mean, and is found by its columns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lit_lora.data.columns import RowReader
from lit_lora.data.config import DataConfig
from lit_lora.data.findings import Findings
from lit_lora.data.formats import FORMATS, load_format
from lit_lora.data.sample import Conversation, Sample
from lit_lora.errors import InputError, UsageError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]


def _sample(row: dict[str, Any], **settings: Any) -> tuple[str, Sample]:
    findings = Findings()
    sample = RowReader(DataConfig(path="rows.jsonl", **settings), findings).sample(row, "rows.jsonl:1")
    findings.check()
    assert sample is not None
    return findings.format_names, sample


def _turns(sample: Sample) -> list[tuple[str, str | None]]:
    assert isinstance(sample, Conversation)
    return [(message["role"], message["content"]) for message in sample.messages]


@pytest.mark.parametrize(
    ("format_", "row", "prompt", "answer"),
    [
        ("alpaca", {"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n\n1 2", "3"),
        ("alpaca", {"instruction": "Add", "input": "", "output": "3"}, "Add", "3"),
        ("alpaca", {"instruction": "Add", "input": None, "output": "3"}, "Add", "3"),
        ("alpaca", {"instruction": "Add", "output": "3"}, "Add", "3"),
        ("alpaca", {"instruction": "Add", "input": "1 2", "response": "3"}, "Add\n\n1 2", "3"),
        ("dolly", {"instruction": "Add", "context": "1 2", "response": "3", "category": "qa"}, "Add\n\n1 2", "3"),
        ("dolly", {"instruction": "Add", "context": None, "response": "3", "category": "qa"}, "Add", "3"),
        ("prompt_completion", {"prompt": "Add", "completion": "3"}, "Add", "3"),
        ("prompt_completion", {"question": "Add", "answer": "3"}, "Add", "3"),
        ("prompt_completion", {"input": "Add", "output": "3"}, "Add", "3"),
        ("prompt_completion", {"query": "Add", "response": "3"}, "Add", "3"),
        (
            "messages",
            {"messages": [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "3"}]},
            "Add",
            "3",
        ),
        ("messages", {"messages": '[{"role":"user","content":"Add"},{"role":"assistant","content":"3"}]'}, "Add", "3"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Add"}, {"from": "gpt", "value": "3"}]}, "Add", "3"),
        (
            "sharegpt",
            {"conversations": [{"role": "user", "content": "Add"}, {"role": "assistant", "content": "3"}]},
            "Add",
            "3",
        ),
    ],
)
def test_pain_44_the_columns_tell_the_format(format_: str, row: dict[str, Any], prompt: str, answer: str) -> None:
    name, sample = _sample(row)
    assert name == format_
    assert _turns(sample) == [("user", prompt), ("assistant", answer)]


def test_every_format_of_the_table_loads_and_reads_its_own_columns() -> None:
    for name in FORMATS:
        format_ = load_format(name)
        row = {column: CHAT if format_.nested else "some text" for column in format_.required}
        assert _sample(row)[0] == name
        assert _sample(row, format=name)[0] == name


def test_a_text_is_a_text_also_beside_columns_that_are_about_it() -> None:
    assert _sample({"text": "Once", "url": "https://…", "id": 3}) == ("text", "Once")


def test_a_text_beside_a_label_is_not_taken_for_plain_text() -> None:
    with pytest.raises(InputError, match="fit no format") as caught:
        _sample({"text": "great film", "label": "positive"})
    assert caught.value.hint is not None
    assert "columns: {prompt: text, completion: label}" in caught.value.hint


def test_roles_of_sharegpt_tool_calls_and_tools_are_carried_over() -> None:
    tools = [{"name": "search", "parameters": {}}]
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "search"}'},
            {"from": "observation", "value": "sunny"},
            {"from": "gpt", "value": "Sunny."},
        ],
        "system": "Be brief.",
        "tools": json.dumps(tools),
    }
    _, sample = _sample(row)
    assert isinstance(sample, Conversation)
    assert [role for role, _ in _turns(sample)] == ["system", "user", "assistant", "tool", "assistant"]
    assert sample.tools == tools


def test_openai_tool_calls_and_content_parts_are_carried_over() -> None:
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ]
    }
    _, sample = _sample(row)
    assert isinstance(sample, Conversation)
    assert sample.messages[0]["content"] == "Hi there"
    assert sample.messages[1] == {"role": "assistant", "content": "", "tool_calls": calls}
    assert sample.messages[2]["tool_call_id"] == "1"
    assert sample.has_answer


def test_the_system_text_of_the_config_is_for_conversations_without_one() -> None:
    assert _turns(_sample({"prompt": "a", "completion": "b"}, system="S")[1])[0] == ("system", "S")
    assert _turns(_sample({"prompt": "a", "completion": "b", "system": "own"}, system="S")[1])[0] == ("system", "own")
    assert _turns(_sample({"messages": CHAT}, system="S")[1])[0] == ("system", "Be brief.")
    assert _sample({"text": "plain"}, system="S")[1] == "plain"


def test_a_mapping_names_columns_or_writes_them_into_a_text() -> None:
    row = {"sentence": "fine film", "label": 1, "slots": {"a": "ü"}}
    text = 'Positive or negative? {sentence}\nAnswer as {"label": …} or {}'
    _, sample = _sample(row, columns={"prompt": text, "completion": "label"})
    assert _turns(sample) == [
        ("user", 'Positive or negative? fine film\nAnswer as {"label": …} or {}'),
        ("assistant", "1"),
    ]
    _, sample = _sample(row, columns={"prompt": "sentence", "completion": "slots"})
    assert _turns(sample)[1] == ("assistant", '{"a": "ü"}')


def test_values_are_replaced_by_words() -> None:
    words = {"label": {"0": "negative", "1": "positive"}}
    columns = {"prompt": "sentence", "completion": "label"}
    assert _turns(_sample({"sentence": "s", "label": 1}, columns=columns, values=words)[1])[1][1] == "positive"
    with pytest.raises(InputError, match=r"rows\.jsonl:1: column label: no word for the value '2'"):
        _sample({"sentence": "s", "label": 2}, columns=columns, values=words)


def test_pain_44_columns_of_no_format_name_file_row_columns_format_and_mapping() -> None:
    with pytest.raises(InputError) as caught:
        _sample({"frage": "a", "antwort": "b"})
    message, hint = str(caught.value), str(caught.value.hint)
    for part in ("rows.jsonl:1", "frage, antwort", "prompt_completion", "prompt, completion"):
        assert part in message
    assert "columns: {prompt: frage, completion: antwort}" in hint
    assert "--columns prompt=frage" in hint
    with pytest.raises(InputError) as caught:
        _sample({"instruction": "a", "text": "c"})
    assert "alpaca" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"a": "x"}, {"columns": {"prompt": "b", "completion": "a"}}, "no column 'b', found: a"),
        ({"text": "x", "lable": 1}, {"columns": {"prompt": "text", "completion": "label"}}, "did you mean 'lable'"),
        ({"a": "x"}, {"columns": {"prompt": "say {b}", "completion": "a"}}, "no column 'b'"),
        ({"prompt": "x", "completion": "y"}, {"format": "dolly"}, "do not fit format dolly"),
        ({"prompt": "x", "completion": "y"}, {"values": {"z": {}}}, "no column 'z' for values"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, {}, "preference rows"),
        ({"messages": "[not json"}, {}, "expected a list of messages, got text"),
        ({"messages": "hello"}, {}, 'messages: expected a list of {role, content}, got "hello"'),
        (
            {"conversations": {"from": "human"}, "id": 1},
            {},
            r'conversations: expected a list of .*, got {"from": "human"}',
        ),
        ({"messages": ["hi"]}, {}, "1 texts without roles, expected questions and answers in turn"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, {}, "unknown role 'asistant' .did you mean 'assistant'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            {},
            "content of type image_url, expected only text",
        ),
        ({"prompt": "x", "completion": "\ud83d"}, {}, "half of a surrogate pair"),
        ({}, {}, "the columns .none."),
    ],
)
def test_pain_44_wrong_rows_are_errors_that_say_where(row: dict[str, Any], settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _sample(row, **settings)
    assert str(caught.value).startswith("rows.jsonl:1: ")


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_pain_44_what_a_table_writes_for_a_missing_value_is_no_text(missing: float | None) -> None:
    assert _turns(_sample({"instruction": "a", "input": missing, "output": missing})[1]) == _turns(
        _sample({"instruction": "a", "input": "", "output": ""})[1]
    )


def test_a_mapping_for_an_unknown_format_column_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"no format has a column 'promt' \(did you mean 'prompt'\?\)"):
        _sample({"a": "x", "b": "y"}, columns={"promt": "a", "completion": "b"})


def test_a_later_row_without_a_column_is_named() -> None:
    findings = Findings()
    reader = RowReader(DataConfig(path="r", format="prompt_completion"), findings)
    assert reader.sample({"prompt": "a", "completion": "b"}, "r:1") is not None
    assert reader.sample({"prompt": "a"}, "r:7") is None
    with pytest.raises(InputError, match=r"r:7: the columns \(prompt\) do not fit format prompt_completion"):
        findings.check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "alpacca"}, "did you mean 'alpaca'"),
        ({"validation": 1.5}, "between 0 and 1"),
        ({"validation": 0.0}, "between 0 and 1"),
        ({"validation": 0}, "at least 1 row"),
        ({"validation": True}, "got true or false"),
        ({"max_seq_length": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(path="rows.jsonl", **settings)

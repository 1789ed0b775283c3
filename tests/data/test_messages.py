"""Conversations as people write them: every key is used, learned or reported; nothing unmeant is learned."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from lit_lora.cli.prepare import parse_columns
from lit_lora.data import DataConfig
from lit_lora.data.columns import RowReader
from lit_lora.data.findings import Findings
from lit_lora.data.sample import Conversation
from lit_lora.errors import InputError

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "play", "arguments": "{}"}}


def _read(row: dict[str, Any], findings: Findings | None = None, **settings: Any) -> list[str]:
    """The turns of a row, ``role: text`` with a star where the text is learned."""
    findings = findings or Findings()
    sample = RowReader(DataConfig(path="x", **settings), findings).sample(row, "x:1")
    findings.check()
    assert isinstance(sample, Conversation)
    turns = []
    for index, message in enumerate(sample.messages):
        star = "*" if message["role"] == "assistant" and index not in sample.context_only else ""
        turns.append(f"{message['role']}{star}: {message.get('content')}")
    return turns


@pytest.mark.parametrize("key", ["weight", "train", "loss", "loss_weight", "train_on_turn", "trainable"])
@pytest.mark.parametrize("no", [0, 0.0, False, "false", "0"])
def test_an_answer_that_is_marked_is_not_learned(key: str, no: Any) -> None:
    row = {"messages": [HI, {**HELLO, key: no}, HI, {**HELLO, key: 1}]}
    assert _read(row) == ["user: Hi", "assistant: Hello", "user: Hi", "assistant*: Hello"]


def test_an_answer_that_is_masked_is_not_learned() -> None:
    row = {"messages": [HI, {**HELLO, "masked": True}, HI, {**HELLO, "masked": False}]}
    assert _read(row) == ["user: Hi", "assistant: Hello", "user: Hi", "assistant*: Hello"]


@pytest.mark.parametrize("row", [{"messages": [HI, HELLO]}, {"prompt": "Hi", "completion": "Hello"}])
@pytest.mark.parametrize(("column", "no"), [("loss", 0), ("weight", 0.0), ("train", False), ("weight", "0")])
def test_a_row_says_whether_its_answers_are_learned(row: dict[str, Any], column: str, no: Any) -> None:
    findings = Findings()
    assert _read({**row, column: no}, findings) == ["user: Hi", "assistant: Hello"]
    assert not findings.unused_columns
    assert _read({**row, column: 1}) == ["user: Hi", "assistant*: Hello"]
    assert _read({**row, column: None}) == ["user: Hi", "assistant*: Hello"]


def test_a_weight_of_something_else_is_counted() -> None:
    findings = Findings()
    row = {"prompt": "Hi", "completion": "Hello", "weight": 72.5}
    assert _read(row, findings) == ["user: Hi", "assistant*: Hello"]
    assert [each.message for each in findings.of_level("warning")] == [
        "whose weight is neither 0 nor 1, and is not used"
    ]


@pytest.mark.parametrize("column", ["system", "system_prompt", "systemInstruction", "system_instruction"])
@pytest.mark.parametrize("system", ["S", {"parts": [{"text": "S"}]}, [{"type": "text", "text": "S"}]])
def test_a_system_message_may_have_a_column(column: str, system: Any) -> None:
    row = {"messages": [HI, HELLO], column: system}
    assert _read(row) == ["system: S", "user: Hi", "assistant*: Hello"]


@pytest.mark.parametrize("system", ["S", "T"])
def test_the_system_message_among_the_messages_wins(system: str) -> None:
    findings = Findings()
    row = {"messages": [{"role": "system", "content": "S"}, HI, HELLO], "system": system}
    assert _read(row, findings) == ["system: S", "user: Hi", "assistant*: Hello"]
    warnings = [each.message for each in findings.of_level("warning")]
    differs = "whose system is not used, because the messages begin with another system message"
    assert warnings == ([] if system == "S" else [differs])


@pytest.mark.parametrize("row", [{"messages": [HI, {**HELLO, "train": 0}, HI, HELLO], "system": "S"}])
def test_a_system_message_is_folded_into_the_first_question(row: dict[str, Any]) -> None:
    folded = ["user: S\n\nHi", "assistant: Hello", "user: Hi", "assistant*: Hello"]
    assert _read(row, system_role="fold") == folded
    del row["system"]
    assert _read(row, system_role="fold", system="S") == folded
    assert _read({"messages": [{"role": "system", "content": "S"}, HELLO]}, system_role="fold") == [
        "user: S",
        "assistant*: Hello",
    ]


def test_an_answer_within_an_exchange_says_whether_it_is_learned() -> None:
    first = {"system": "S", "input": "Hi", "output": "Hello", "output_with_loss": False}
    row = {"conversation": [first, {"input": "Hi", "output": "Hello", "output_with_loss": True}]}
    assert _read(row) == ["system: S", "user: Hi", "assistant: Hello", "user: Hi", "assistant*: Hello"]


@pytest.mark.parametrize("content", [{"degrees": 7}, [{"degrees": 7}], [1, 2], [{"type": "text", "text": "warm"}]])
def test_what_a_function_returns_is_written_as_json(content: Any) -> None:
    texts = _read({"messages": [HI, {"role": "tool", "content": content}, HELLO]})
    expected = "warm" if "warm" in str(content) else json.dumps(content)
    assert texts[1] == f"tool: {expected}"


@pytest.mark.parametrize(
    ("message", "warning"),
    [
        ({**HI, "reasoning": "Hm"}, "with reasoning in a message of role user, which is not used"),
        ({"role": "user", "content": ""}, "with an empty message of the user"),
        ({**HI, "from": "Ada"}, "with a key of a message that is not used, 'from'"),
        (
            {"role": "user", "content": [{"type": "text", "text": "Hi", "note": "x", "image_url": None}]},
            "with a key of a content part that is not used, 'note'",
        ),
    ],
)
def test_what_a_message_says_in_vain_is_counted(message: dict[str, Any], warning: str) -> None:
    findings = Findings()
    assert _read({"messages": [message, HELLO]}, findings)[1:] == ["assistant*: Hello"]
    assert [each.message for each in findings.of_level("warning")] == [warning]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "contents": "x"}, r"messages\[0\]: no content, found: contents \(did you mean 'content'\?\)"),
        ({"role": "user", "content": None}, r"messages\[0\]: no content, found: null"),
        ({"content": "x"}, r"messages\[0\]: no role, found: content"),
        ({"role": "user", "content": {"a": "b"}}, "expected content to be text or a list of texts"),
        ({"role": "user", "content": [{"type": "image", "url": "u"}]}, "content of type image, expected only text"),
        ({"role": "assistant", "content": "a", "thinking": "b", "reasoning": "c"}, "thinking and reasoning say diff"),
        ({"role": "user", "content": "a", "value": "b"}, "content and value say different things"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "weight is 0.5, expected 0 or 1"),
        ({"role": "assistant", "content": "a", "weight": 0, "train": True}, "train and weight say different things"),
        ({"role": "assistant", "content": None, "tool_calls": 5}, "tool_calls: expected a list of calls, got 5"),
        ({"role": "assistant", "tool_calls": [{"name": 3}]}, "expected a function with a name"),
        ({"role": "Käufer", "content": "a"}, "unknown role 'Käufer'"),
        ({"role": "user", "content": float("nan")}, r"messages\[0\]: no content, found: null"),
        ({"role": "user", "content": "a", "images": ["a.png"]}, "a message with images, expected only text"),
        ({"role": "user", "content": [{"text": "a", "inline_data": {"x": 1}}]}, "content with inline_data, expected"),
        ({"role": "user", "content": [{"type": "text", "text": "a", "image_url": "u"}]}, "content with image_url"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "content of type input_audio"),
        ({"role": "user", "content": [{"text": "a", "value": "b"}]}, "text and value of a part say different things"),
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "calls of functions in a message of role user"),
        ({"role": "assistant", "content": "a", "train_detail": [{"train": False}]}, "train_detail marks parts of a"),
    ],
)
def test_a_message_that_cannot_be_read_says_what_was_found(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        _read({"messages": [message, HELLO]})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HELLO]},
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "Hi"}]}, HELLO]},
        {"messages": [{"role": "Human", "content": ["H", "i"]}, {"role": "AI", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": None, "name": None}, HELLO]},
        {"contents": [{"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Hello"}]}]},
        {"conversation": [{"input": "Hi", "output": "Hello"}]},
        {"conversation": [{"human": "Hi", "assistant": "Hello"}]},
        {"conversations": ["Hi", "Hello"]},
        {"conversations": [["Hi", "Hello"]]},
        {"conversations": "[('Hi', 'Hello')]"},
        {"conversations": ["User: Hi", "Assistant: Hello"]},
        {"messages": "\n\nHuman: Hi\n\nAssistant: Hello"},
        {"text": "\n\nHuman: Hi\n\nAssistant: Hello"},
        {"text": "Human: Hi\n\nAssistant: Hello"},
        {"text": "### Human: Hi### Assistant: Hello"},
        {"text": "### Human: Hi\n\n### Assistant: Hello"},
        {"conversations": '[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]'},
        {"conversations": "[{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello', 'x': None}]"},
        {"messages": ['{"role": "user", "content": "Hi"}', '{"role": "assistant", "content": "Hello"}']},
        {"prompt": [HI], "completion": [HELLO]},
        {"prompt": "Hi", "completion": [HELLO]},
        {"prompt": [HI], "completion": "Hello"},
    ],
)
def test_every_known_shape_is_the_same_conversation(row: dict[str, Any]) -> None:
    assert _read(row) == ["user: Hi", "assistant*: Hello"]


def test_texts_of_which_one_has_no_speaker_take_turns() -> None:
    assert _read({"conversations": ["User: Hi", "Re: Hello"]}) == ["user: User: Hi", "assistant*: Re: Hello"]


@pytest.mark.parametrize("settings", [{"format": "text"}, {"columns": {"text": "text"}}])
def test_a_dialog_stays_a_text_where_the_user_says_so(settings: dict[str, Any]) -> None:
    text = "Human: Hi\n\nAssistant: Hello"
    findings = Findings()
    assert RowReader(DataConfig(path="x", **settings), findings).sample({"text": text}, "x:1") == text


@pytest.mark.parametrize(
    "text", ["The labels are:\n\nHuman: Hi\n\nAssistant: Hello", "Human: Hi", "Assistant: Hi\n\nHuman: Hello"]
)
def test_a_text_that_is_no_dialog_stays_a_text(text: str) -> None:
    assert RowReader(DataConfig(path="x"), Findings()).sample({"text": text}, "x:1") == text


def test_a_list_as_numpy_prints_it_is_refused_with_the_remedy() -> None:
    text = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Hello'}]"
    with pytest.raises(InputError, match="messages: a list as NumPy prints it") as caught:
        _read({"messages": text})
    assert "frame.to_json" in str(caught.value.hint)


def test_answers_within_a_prompt_are_given_not_learned() -> None:
    row = {"prompt": [HI, HELLO, HI], "completion": [HELLO]}
    assert _read(row) == ["user: Hi", "assistant: Hello", "user: Hi", "assistant*: Hello"]


@pytest.mark.parametrize(
    "history", [[["Where?", "Right."]], [{"query": "Where?", "response": "Right."}], '[["Where?", "Right."]]']
)
@pytest.mark.parametrize("keys", [("query", "response"), ("instruction", "output")])
def test_history_is_earlier_turns(history: Any, keys: tuple[str, str]) -> None:
    row = {keys[0]: "And then?", keys[1]: "Left.", "history": history, "system": "S"}
    expected = ["system: S", "user: Where?", "assistant*: Right.", "user: And then?", "assistant*: Left."]
    assert _read(row) == expected
    assert _read({**row, "history": []}) == ["system: S", "user: And then?", "assistant*: Left."]


def test_an_empty_answer_is_context_and_counted() -> None:
    findings = Findings()
    row = {"messages": [HI, {"role": "assistant", "content": " "}, HI, HELLO]}
    assert _read(row, findings) == ["user: Hi", "assistant:  ", "user: Hi", "assistant*: Hello"]
    assert [str(each) for each in findings.of_level("warning")] == [
        "1 row with an empty answer within a conversation, which is not learned: x:1"
    ]


def test_unknown_keys_are_counted_and_metadata_is_not() -> None:
    findings = Findings()
    _read({"messages": [{**HI, "id": 3, "emotion": "joy"}, HELLO]}, findings)
    assert [each.message for each in findings.of_level("warning")] == [
        "with a key of a message that is not used, 'emotion'"
    ]


def test_roles_of_ones_own_are_mapped() -> None:
    row = {"messages": [{"role": "customer", "content": "Hi"}, {"role": "agent", "content": "Hello"}]}
    with pytest.raises(InputError) as caught:
        _read(row)
    assert "messages[0]: unknown role 'customer', 'agent'" in str(caught.value)
    assert 'columns: {roles: {"customer": user, "agent": assistant}} in the config' in str(caught.value.hint)
    assert "or --columns roles.customer=user --columns roles.agent=assistant" in str(caught.value.hint)
    flags = ["roles.customer=user", "roles.agent=assistant"]
    assert _read(row, columns=parse_columns(flags)) == ["user: Hi", "assistant*: Hello"]
    assert _read(row, columns={"roles": {"customer": "user", "agent": "assistant"}}) == [
        "user: Hi",
        "assistant*: Hello",
    ]


@pytest.mark.parametrize(
    ("keys", "hint"),
    [
        (("speaker", "utterance"), "--columns role=speaker --columns content=utterance"),
        (("who", "content"), "--columns role=who"),
    ],
)
def test_keys_of_messages_are_mapped_as_the_hint_says(keys: tuple[str, str], hint: str) -> None:
    role, content = keys
    row = {"messages": [{"id": "x", role: "user", content: "Hi, you"}, {role: "assistant", content: "Hello"}]}
    with pytest.raises(InputError, match=r"messages\[0\]: no role, found: ") as caught:
        _read(row)
    assert hint in str(caught.value.hint)
    flags = hint.removeprefix("--columns ").split(" --columns ")
    assert _read(row, columns=parse_columns(flags)) == ["user: Hi, you", "assistant*: Hello"]


@pytest.mark.parametrize("tools", ["null", "[]", "", None, [], '[{"name": "play"}]'])
@pytest.mark.parametrize("calls", [[CALL], '[{"name": "play", "arguments": {}}]'])
def test_tools_and_calls_may_be_written_as_json(tools: Any, calls: Any) -> None:
    row = {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": calls}], "tools": tools}
    findings = Findings()
    sample = RowReader(DataConfig(path="x"), findings).sample(row, "x:1")
    findings.check()
    assert isinstance(sample, Conversation)
    assert sample.messages[1]["tool_calls"][0].keys() & {"name", "function"}
    assert (sample.tools or []) == ([{"name": "play"}] if tools and "play" in tools else [])


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"prompt": [HI], "chosen": [HELLO], "rejected": [HELLO]}, "{prompt: prompt, completion: chosen}"),
        ({"chosen": [HI, HELLO], "rejected": [HI, HELLO]}, "{messages: chosen}"),
        ({"conversations": [HI], "chosen": HELLO, "rejected": HELLO}, "{prompt: conversations, completion: chosen}"),
        ({"question": "Hi", "response_j": "Hello", "response_k": "x"}, "{prompt: question, completion: response_j}"),
        ({"messages": [HI, HELLO], "rejected_response": "No"}, "{messages: messages}"),
        ({"messages": [HI, HELLO], "rejected_messages": [HI, HI]}, "{messages: messages}"),
        ({"conversations": [HI, HELLO], "rejected_response": "No"}, "{messages: conversations}"),
        ({"query": "Hi", "response": "Hello", "rejected_response": "No"}, "{prompt: query, completion: response}"),
        ({"x": "Hi", "chosen": "Hello"}, "{prompt: x, completion: chosen}"),
        ({"prompt": "Hi", "preferred": "Hello", "other": "x"}, "{prompt: prompt, completion: preferred}"),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
            "{messages: chosen}",
        ),
    ],
)
def test_preferences_are_refused_with_a_mapping_that_works(row: dict[str, Any], hint: str) -> None:
    with pytest.raises(InputError, match="preference rows") as caught:
        _read(row)
    assert f"columns: {hint} in the config" in str(caught.value.hint)
    columns = dict(pair.split(": ") for pair in hint.strip("{}").split(", "))
    assert _read(row, columns=columns) == ["user: Hi", "assistant*: Hello"]


@pytest.mark.parametrize("row", [{"messages": [HI, HELLO]}, {"prompt": "Hi", "completion": "Hello"}])
def test_an_unwanted_answer_is_refused(row: dict[str, Any]) -> None:
    assert _read({**row, "label": True}) == ["user: Hi", "assistant*: Hello"]
    with pytest.raises(InputError, match="label: false marks an answer that is not wanted"):
        _read({**row, "label": False})


def test_pictures_are_refused_where_a_row_has_some() -> None:
    row = {"messages": [HI, HELLO], "images": []}
    assert _read(row) == ["user: Hi", "assistant*: Hello"]
    with pytest.raises(InputError, match="a row with images"):
        _read({**row, "images": ["a.png"]})


_KEYS = (
    "note",
    "emotion",
    "name",
    "reasoning",
    "thinking",
    "text",
    "value",
    "images",
    "file",
    "tool_call_id",
    "weight",
)
_PART_KEYS = ("note", "title", "value", "content", "image_url", "inline_data", "annotations")


class _Texts:
    """Texts that occur once each, with the keys that they are under."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.keys: dict[str, str] = {}

    def under(self, key: str) -> str:
        text = f"<{len(self.keys)}>"
        self.keys[text] = key
        return text

    def message(self, role: str) -> dict[str, Any]:
        if self._random.random() < 0.5:
            return self._extended({"role": role, "content": self.under("content")}, _KEYS)
        parts = []
        for _ in range(self._random.randint(1, 3)):
            parts.append(self._extended({"type": "text", "text": self.under("text")}, _PART_KEYS))
        return self._extended({"role": role, "content": parts}, _KEYS)

    def _extended(self, item: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
        for key in self._random.sample(keys, self._random.choice([0, 0, 0, 0, 0, 0, 1, 2])):
            item[key] = self.under(key)
        return item


def test_everything_in_a_message_is_read_or_reported_or_its_row_is_refused() -> None:
    random = Random(0)
    read = 0
    for _ in range(2000):
        texts = _Texts(random)
        findings = Findings("skip")
        row = {"messages": [texts.message(role) for role in ("system", "user", "assistant", "tool", "assistant")]}
        sample = RowReader(DataConfig(path="x"), findings).sample(row, "x:1")
        if sample is None:
            assert findings.bad_count == 1
            continue
        read += 1
        assert isinstance(sample, Conversation)
        written = json.dumps(sample.messages)
        reported = " ".join(finding.message for finding in findings.of_level("warning"))
        for text, key in texts.keys.items():
            assert text in written or key in reported, (row, sample, reported)
    assert read > 200

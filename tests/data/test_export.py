"""What ``prepare --out`` writes is read back as the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_lora.data import DataConfig, Prepared, prepare
from lit_lora.data.export import export
from lit_lora.data.rows import Rows
from lit_lora.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] %}{{ message['content'] }}{% endif %}"
    "{% if message['tool_calls'] %}{{ message['tool_calls'] | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "Hi", "completion": "Hello"}, {"system": "Be brief."}),
        ({"prompt": "Hi", "completion": "Hello"}, {"system": "Be brief.", "system_role": "fold"}),
        ({"review": "fine", "label": 1}, {"columns": {"prompt": "Good? {review}", "completion": "label"}}),
        (
            {"review": "fine", "label": 1},
            {"columns": {"prompt": "{review}", "completion": "label"}, "values": {"label": {"1": "yes"}}},
        ),
        (
            {
                "messages": [
                    _turn("user", "one"),
                    _turn("assistant", "eleven", weight=0),
                    _turn("user", "two"),
                    _turn("assistant", "twelve"),
                ]
            },
            {"system": "Be brief."},
        ),
        ({"query": "and then?", "response": "Go left.", "history": [["Where?", "Right."]]}, {}),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, {}),
        (
            {
                "messages": [_turn("user", "Oslo?"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
                "tools": [TOOL],
            },
            {},
        ),
        (
            {"messages": [_turn("customer", "Hi"), _turn("agent", "Hello")]},
            {"roles": {"customer": "user", "agent": "assistant"}},
        ),
        ({"text": "The quick brown fox"}, {}),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, {"learn": "all"}),
        (
            {"messages": [_turn("user", "a"), _turn("assistant", "b"), _turn("user", "c"), _turn("assistant", "d")]},
            {"learn": "last"},
        ),
    ],
    ids=str,
)
def test_exported_rows_have_the_ids_and_masks_of_the_original(
    row: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path / "model", template=TOOLS_TEMPLATE))
    original = _prepare(file, tokenizer, **settings)

    export(original, tmp_path / "out")

    learn = {"learn": settings["learn"]} if "learn" in settings else {}  # it is no property of a row
    again = _prepare(tmp_path / "out" / "train.jsonl", tokenizer, **learn)
    assert _tokens(again.train) == _tokens(original.train)


def test_a_text_with_pieces_in_both_splits_is_not_exported_to_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"The quick brown fox {n}. " * 30}) + "\n" for n in range(3)))
    tokenizer = Tokenizer.load(tiny_tokenizer(tmp_path / "model"))
    export(_prepare(file, tokenizer, validation=4, max_seq_length=32), tmp_path / "out")
    train, validation = ((tmp_path / "out" / name).read_text() for name in ("train.jsonl", "validation.jsonl"))
    assert len(train.splitlines()) == 3
    assert not set(train.splitlines()) & set(validation.splitlines())
    assert "texts of which other pieces are in train.jsonl" in " ".join(capsys.readouterr().err.split())


def _prepare(path: Path, tokenizer: Tokenizer, **settings: Any) -> Prepared:
    config = DataConfig.model_validate({"path": str(path), **settings})
    return prepare(config, tokenizer, cache=path.parent / "cache", seed=0)


def _tokens(rows: Rows) -> list[tuple[list[int], list[bool]]]:
    return [(row.input_ids.tolist(), row.loss_mask.tolist()) for row in rows]

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from lit_lora.errors import InputError, UsageError
from lit_lora.evaluate import OptionRow, Share, evaluate_options
from lit_lora.evaluate.options import read_option_rows
from lit_lora.model import CausalLM
from lit_lora.tokenizer import Tokenizer, encode_chat


def write(path: Path, *rows: dict[str, Any]) -> list[Path]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "Sky?", "options": ["red", "blue"], "answer": 1}, {}),
        ({"prompt": "Sky?", "options": ["red", "blue"], "answer": "B"}, {}),
        ({"prompt": "Sky?", "options": ["red", "blue"], "answer": "b"}, {}),
        ({"prompt": "Sky?", "options": ["red", "blue"], "answer": "1"}, {}),
        ({"prompt": "Sky?", "options": ["red", "blue"], "answer": "blue"}, {}),
        ({"question": "Sky?", "choices": ["red", "blue"], "answer": 1}, {}),
        ({"ctx": "Sky?", "endings": ["red", "blue"], "label": 1}, {}),
        ({"goal": "Sky?", "sol1": "red", "sol2": "blue", "label": 1}, {}),
        ({"question": "Sky?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}, "answerKey": "2"}, {}),
        ({"q": "Sky", "x": "red", "y": "blue", "z": 1}, {"prompt": "{q}?", "options": "x,y", "answer": "z"}),
    ],
)
def test_options_are_read_under_their_usual_names(row: dict[str, Any], columns: dict[str, str], tmp_path: Path) -> None:
    rows = read_option_rows(write(tmp_path / "a.jsonl", row), columns)
    assert rows == [OptionRow("Sky?", ("red", "blue"), 1, f"{tmp_path / 'a.jsonl'}:1")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Sky?", "options": ["red", "blue"], "answer": 2}, "answer '2' is none of the 2 options"),
        ({"prompt": "Sky?", "options": ["red", "blue"], "answer": "C"}, "answer 'C' is none of the 2 options"),
        ({"prompt": "Sky?", "options": ["red"], "answer": 0}, "expected a list of at least two options"),
        ({"prompt": "Sky?", "options": "red", "answer": 0}, "expected a list of at least two options"),
        ({"prompt": "Sky?", "answer": 0}, "no column for options"),
    ],
)
def test_a_bad_row_is_named(row: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = {"prompt": "Sky?", "options": ["red", "blue"], "answer": 1}
    files = write(tmp_path / "a.jsonl", good, row)
    with pytest.raises(InputError, match=f"a.jsonl:2: .*{said}"):
        read_option_rows(files)


def test_an_unknown_column_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'option' is not a column of multiple choice \(did you mean 'options'\?\)"):
        read_option_rows([tmp_path / "a.jsonl"], {"option": "x"})


def chances(model: CausalLM, ids: list[int], learn: list[bool]) -> float:
    with torch.no_grad():
        logs = functional.log_softmax(model(torch.tensor([ids]))[0].double(), dim=-1)
    return sum(float(logs[t - 1, ids[t]]) for t in range(1, len(ids)) if learn[t])


QUESTIONS = [
    OptionRow("What is the sky?", ("blue", "a very long answer indeed", "red"), 0, "a:1"),
    OptionRow("And the sea, my friend?", ("wet", "dry"), 1, "a:2"),
    OptionRow("Yes or no?", ("yes", "no", "hello world, hello there"), 2, "a:3"),
]


@pytest.mark.parametrize("chat", [True, False])
def test_the_likeliest_option_is_the_answer(model: CausalLM, tokenizer: Tokenizer, chat: bool) -> None:
    by_sum = by_mean = 0
    loss = 0.0
    for row in QUESTIONS:
        sums = []
        for option in row.options:
            if chat:
                encoded = encode_chat(
                    tokenizer, [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": option}]
                )
                sums.append(chances(model, encoded.ids, encoded.loss_mask))
            else:
                start, end = tokenizer.encode(row.prompt), tokenizer.encode(" " + option)
                sums.append(chances(model, start + end, [False] * len(start) + [True] * len(end)))
        means = [value / len(option) for value, option in zip(sums, row.options, strict=True)]
        loss -= sums[row.answer] / 3
        by_sum += sums.index(max(sums)) == row.answer
        by_mean += means.index(max(means)) == row.answer
    scores = evaluate_options(model, tokenizer, QUESTIONS, chat=chat, micro_batch_tokens=50)
    assert (scores.by_sum, scores.by_mean) == (Share(by_sum, 3), Share(by_mean, 3))
    assert scores.loss == pytest.approx(loss, rel=1e-5)
    assert scores.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize("chat", [True, False])
def test_shots_stand_before_the_question_with_their_answers(
    model: CausalLM, tokenizer: Tokenizer, chat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    learned: list[str] = []

    def look(model: object, rows: Any, **_: object) -> Any:
        for row in rows:
            seen.append(tokenizer.decode(row.input_ids.tolist()))
            learned.append(tokenizer.decode(row.input_ids[row.loss_mask].tolist()))
        return torch.zeros(len(rows)).numpy()

    monkeypatch.setattr("lit_lora.evaluate.options.log_likelihoods", look)
    evaluate_options(model, tokenizer, QUESTIONS[:1], shots=QUESTIONS[1:], chat=chat)
    assert [text.strip() for text in learned] == list(QUESTIONS[0].options)
    for text, option in zip(seen, QUESTIONS[0].options, strict=True):
        order = ["And the sea", "dry", "Yes or no?", "hello world", "What is the sky?", option]
        places = [text.find(part) for part in order]
        assert places == sorted(places)
        assert -1 not in places

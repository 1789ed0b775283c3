"""Rows with labels: columns, labels, micro-batches without much padding, and what is said of bad rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_lora.data.config import LabeledConfig
from lit_lora.data.labeled import Example, LabeledRow, LabeledRows, Labels, find_labels, read_examples
from lit_lora.data.padded import CALL, Layout, PaddedBatches, by_length, padded_tokens, split_by_length
from lit_lora.errors import InputError, UsageError


def written(tmp_path: Path, text: str, name: str = "rows.jsonl") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def read(path: Path, **settings: object) -> list[Example]:
    return read_examples([path], LabeledConfig(path=str(path), **settings))[0]


def test_glue_like_rows_of_every_kind_of_file_are_found_by_their_columns(tmp_path):
    rows = [{"sentence1": "It rained.", "sentence2": "It was wet.", "label": 1, "idx": 0}]
    pair = read(written(tmp_path, json.dumps(rows[0])))
    assert [(e.text, e.pair, e.label) for e in pair] == [("It rained.", "It was wet.", "1")]
    tsv = read(written(tmp_path, "sentence\tlabel\ngood film\tpos\nbad film\tneg\n", "a.tsv"))
    assert [(e.text, e.pair, e.label) for e in tsv] == [("good film", None, "pos"), ("bad film", None, "neg")]
    assert tsv[1].source.endswith("a.tsv:3")
    csv = read(written(tmp_path, 'question,intent\n"what, now?",ask\n', "a.csv"))
    assert (csv[0].text, csv[0].label) == ("what, now?", "ask")


def test_columns_are_named_filled_in_and_their_values_replaced(tmp_path):
    path = written(tmp_path, '{"s": "good", "y": 1}\n{"s": "bad", "y": 0}\n')
    settings = {"columns": {"text": "sst2: {s}", "label": "y"}, "values": {"y": {"0": "no", "1": "yes"}}}
    assert [(e.text, e.label) for e in read(path, **settings)] == [("sst2: good", "yes"), ("sst2: bad", "no")]
    _, about = read_examples([path], LabeledConfig(path=str(path), columns={"text": "s", "label": "y"}))
    assert about == "text: s, label: y"


@pytest.mark.parametrize(
    ("rows", "settings", "error", "message"),
    [
        ('{"sentence": "a", "label": 1}', {"columns": {"text": "sentense"}}, InputError,
         r"rows.jsonl:1: no column 'sentense' \(did you mean 'sentence'\?\), found: sentence, label"),
        ('{"sentence": "a", "label": 1}', {"columns": {"txt": "sentence"}}, UsageError,
         r"data.columns: unknown column 'txt' \(did you mean 'text'\?\), known: text, pair, label"),
        ('{"x": "a", "y": 1}', {}, InputError, r"rows.jsonl:1: which column is the text and which the label\?"),
        ('{"text": "a", "label": null}', {}, InputError, r"rows.jsonl:1: the label \(column label\) is empty"),
        ('{"text": "a", "label": 1}\n{"text": "b"}', {}, InputError, r"rows.jsonl:2: no column 'label', found: text"),
        ('{"text": "a", "label": 2}', {"values": {"label": {"0": "no"}}}, InputError,
         r"rows.jsonl:1: column label: no word for the value '2'; data.values has words for: 0"),
        ("", {}, InputError, r"rows.jsonl: no rows in it"),
    ],
)  # fmt: skip
def test_a_bad_row_or_mapping_is_one_line_with_its_place(tmp_path, rows, settings, error, message):
    with pytest.raises(error, match=message):
        read(written(tmp_path, rows), **settings)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"tweet": "x", "label": 1}, ("x", None, "1")),
        ({"Review Text": "x", "Sentiment": "good"}, ("x", None, "good")),
        ({"comment": "x", "category": "y"}, ("x", None, "y")),
        ({"text": "x", "label": 1.0}, ("x", None, "1")),
        ({"text": "x", "label": True}, ("x", None, "true")),
    ],
)
def test_usual_names_need_no_mapping(tmp_path, row, expected):
    (example,) = read(written(tmp_path, json.dumps(row)))
    assert (example.text, example.pair, example.label) == expected


def test_columns_that_cannot_be_guessed_are_named_in_a_mapping_that_works(tmp_path):
    path = written(tmp_path, '{"x": "a", "y": 1}')
    with pytest.raises(InputError) as caught:
        read(path)
    assert "columns: {text: x, label: y}" in str(caught.value.hint)
    assert read(path, columns={"text": "x", "label": "y"})[0].text == "a"


def test_all_bad_rows_are_named_at_once_and_can_be_left_out(tmp_path):
    rows = '{"text": "a", "label": 1}\n{"text": "b", "label": null}\n{"text": "c"}\n{"text": "d", "label": ""}'
    path = written(tmp_path, rows)
    with pytest.raises(InputError, match=r"(?s)rows.jsonl:2, 4: the label .*rows.jsonl:3: no column 'label'"):
        read(path)
    assert [example.text for example in read(path, bad_rows="skip")] == ["a"]


def test_a_later_row_is_read_by_its_own_columns(tmp_path):
    path = written(tmp_path, '{"text": "a", "label": 1}\n{"sentence": "b", "category": 2}\n{"label": 3, "text": "c"}')
    assert [(example.text, example.label) for example in read(path)] == [("a", "1"), ("b", "2"), ("c", "3")]


def examples(*labels: str) -> list[Example]:
    return [Example("text", None, label, f"f:{line}") for line, label in enumerate(labels, 1)]


def test_labels_are_found_in_a_stable_order_and_a_trained_model_keeps_its_own():
    assert find_labels(examples("10", "2", "1")).names == ("1", "2", "10")
    assert find_labels(examples("neg", "pos", "neg")).names == ("neg", "pos")
    own = ("positive", "negative", "neutral")
    assert find_labels(examples("negative", "positive"), own).names == own
    assert find_labels(examples("0", "2"), own).names == own
    assert find_labels(examples("bad", "negative"), own).names == ("bad", "negative")
    assert [Labels(own).id(example) for example in examples("negative", "2")] == [1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("yes", "yes"), "every row has the label 'yes', expected two or more"),
        (("1.5", "2"), "the labels are numbers such as 1.5"),
        (tuple(f"text {n}" for n in range(60)), "60 different labels in 60 rows"),
    ],
)
def test_what_is_no_label_is_refused(labels, message):
    with pytest.raises(InputError, match=message):
        find_labels(examples(*labels))


def test_a_label_that_training_has_not_seen_is_named_with_its_place():
    with pytest.raises(InputError, match=r"f:1: label 'maybe' is not one of the 2 training labels: no, yes"):
        Labels(("no", "yes")).id(examples("maybe")[0])


def make_rows(lengths: list[int]) -> LabeledRows:
    rows = [
        LabeledRow(np.arange(1, n + 1, dtype=np.int32), np.zeros(n, np.int32), np.array(n % 2), f"f:{n}")
        for n in lengths
    ]
    return LabeledRows(rows)


def test_micro_batches_cost_as_little_as_the_best_of_all_cuts():
    lengths = np.array([3, 60, 5, 58, 4, 30, 6, 31])
    micro_batches = split_by_length(lengths, 10_000)
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(8))
    order = sorted(range(8), key=lambda i: -lengths[i])

    def cost(cuts: list[list[int]]) -> int:
        return padded_tokens(cuts, lengths) + CALL * len(cuts)

    every = []
    for bits in range(2**7):
        ends = [i + 1 for i in range(7) if bits >> i & 1]
        every.append([order[a:b] for a, b in zip([0, *ends], [*ends, 8], strict=True)])
    assert cost(micro_batches) == min(map(cost, every))


def test_no_micro_batch_is_larger_than_the_budget_but_for_a_single_row():
    micro_batches = split_by_length(np.array([100, 40, 40, 40, 10]), 80)
    lengths = np.array([100, 40, 40, 40, 10])
    assert all(len(p) == 1 or padded_tokens([p], lengths) <= 80 for p in micro_batches)


def test_an_epoch_visits_every_row_once_and_is_a_function_of_the_step():
    rows = make_rows(list(range(4, 41)))
    batches = PaddedBatches(rows, Layout(0), batch_size=8, micro_batch_tokens=200, seed=3)
    seen = [row for step in range(batches.steps_per_epoch) for batch in batches.step(step) for row in batch.rows]
    assert sorted(seen) == list(range(37))
    again = PaddedBatches(rows, Layout(0), batch_size=8, micro_batch_tokens=200, seed=3)
    assert again.places(11) == batches.places(11) != batches.places(11 + batches.steps_per_epoch)


def test_rows_lie_side_by_side_with_their_mask_and_labels():
    rows = make_rows([2, 4])
    (batch,) = by_length(rows, Layout(9, token_types=True), 100)
    assert batch.rows == [1, 0]
    assert batch.lengths == [4, 2]
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 9, 9]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.inputs["token_type_ids"].tolist() == [[0] * 4, [0] * 4]
    assert batch.labels.tolist() == [0, 0]


def test_a_decoder_is_given_its_targets_one_place_later():
    rows = LabeledRows(
        [
            LabeledRow(np.array([5, 6], np.int32), np.zeros(2, np.int32), np.array(target, np.int64), "f:1")
            for target in ([7, 8, 1], [9, 1])
        ]
    )
    (batch,) = by_length(rows, Layout(0, decoder_start=2), 100)
    assert batch.labels.tolist() == [[7, 8, 1], [9, 1, -100]]
    assert torch.equal(batch.inputs["decoder_input_ids"], torch.tensor([[2, 7, 8], [2, 9, 1]]))


def test_the_fingerprint_knows_tokens_labels_and_order():
    rows = make_rows([3, 4])
    assert rows.fingerprint == make_rows([3, 4]).fingerprint
    changed = [make_rows([4, 3]), LabeledRows([rows[0]])]
    other = LabeledRow(rows[1].ids, rows[1].types, np.array(1), rows[1].source)
    assert len({r.fingerprint for r in [rows, *changed, LabeledRows([rows[0], other])]}) == 4

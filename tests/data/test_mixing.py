"""Several data sets in one run: each read by its own settings, drawn by weight, split alike, and named in errors."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_lora.config import load_config, validate
from lit_lora.data import DataConfig, Prepared, prepare
from lit_lora.data.batches import Batches
from lit_lora.data.export import export
from lit_lora.data.mixing import Mixture, apportion
from lit_lora.data.trained import TRAINED_FILE, save_reading
from lit_lora.errors import InputError, UsageError
from lit_lora.tokenizer import Tokenizer
from tests.data.conftest import WriteRows, question


@pytest.fixture
def mixed(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """Prepare a data section given as plain data."""

    def mixed(section: Any, seed: int = 0) -> Prepared:
        config = validate(section, DataConfig)
        return prepare(config, tokenizer, cache=tmp_path / "cache", seed=seed)

    return mixed


@pytest.fixture
def two(write_rows: WriteRows) -> tuple[str, str]:
    """Files of 30 and of 10 rows."""
    first = write_rows([question(n) for n in range(30)], name="a.jsonl")
    second = write_rows([question(n) for n in range(100, 110)], name="b.jsonl")
    return str(first), str(second)


def _batches(prepared: Prepared, batch_size: int = 8, seed: int = 0) -> Batches:
    return Batches(prepared.train, batch_size=batch_size, micro_batch_tokens=2048, seed=seed, mixture=prepared.mixture)


def _files(prepared: Prepared, indices: Any) -> Counter[str]:
    return Counter(prepared.train[int(index)].source.partition(":")[0] for index in indices)


@pytest.mark.parametrize("as_list", [True, False])
def test_without_weights_every_row_of_every_set_is_visited_once_per_epoch(
    mixed: Any, two: tuple[str, str], as_list: bool
) -> None:
    entries = [{"path": two[0]}, two[1]]  # a path alone is an entry too
    prepared = mixed(entries if as_list else {"mix": entries})
    batches = _batches(prepared)
    assert batches.steps_per_epoch == 5
    visited = np.concatenate([batches.row_indices(step) for step in range(5)])
    assert sorted(visited) == list(range(40))
    assert [share.rows for share in prepared.report.data_sets] == [30, 10]
    assert sum(share.token_share for share in prepared.report.data_sets) == pytest.approx(1)


def test_each_set_is_read_by_its_own_settings_and_else_by_the_sections(mixed: Any, write_rows: WriteRows) -> None:
    chats = [{"chat": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}]
    rows = write_rows([{"q": "One?", "a": "1"}, {"q": "Two?", "a": "2"}], name="a.jsonl")
    prepared = mixed(
        {
            "system": "Be brief.",
            "mix": [
                {"path": str(rows), "columns": {"prompt": "q", "completion": "a"}, "limit": 1},
                {"path": str(write_rows(chats, name="b.jsonl")), "columns": {"messages": "chat"}, "system": "Be kind."},
                {"path": str(write_rows([question(1)], name="c.jsonl")), "system": None},
            ],
        }
    )
    configs = [part.config for part in prepared.train_parts]
    assert [config.system for config in configs] == ["Be brief.", "Be kind.", None]
    assert [len(part.rows) for part in prepared.train_parts] == [1, 1, 1]
    assert [report.format for report in prepared.report.files] == ["prompt_completion", "messages", "prompt_completion"]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.1, 0.9), (2, 5)])
def test_each_step_draws_in_proportion_to_the_weights(
    mixed: Any, two: tuple[str, str], weights: tuple[float, float]
) -> None:
    prepared = mixed([{"path": path, "weight": weight} for path, weight in zip(two, weights, strict=True)])
    batches = _batches(prepared)
    share = weights[0] / sum(weights)
    for step in range(12):
        drawn = _files(prepared, batches.row_indices(step))
        assert sum(drawn.values()) == 8
        assert abs(drawn["a.jsonl"] - 8 * share) <= 1
    in_epoch = [_files(prepared, batches.row_indices(step))["a.jsonl"] for step in range(5)]
    assert sum(in_epoch) == round(40 * share)


def test_a_set_that_is_used_up_starts_over_and_a_larger_one_goes_on(mixed: Any, two: tuple[str, str]) -> None:
    prepared = mixed([{"path": two[0], "weight": 1}, {"path": two[1], "weight": 1}])
    batches = _batches(prepared)
    drawn = np.concatenate([batches.row_indices(step) for step in range(15)])  # three epochs of 40 rows
    large = [int(row) for row in drawn if row < 30]
    small = [int(row) for row in drawn if row >= 30]
    assert (len(large), len(small)) == (60, 60)
    assert sorted(large[:30]) == sorted(large[30:]) == list(range(30))
    for number in range(6):
        assert sorted(small[10 * number : 10 * number + 10]) == list(range(30, 40))
    assert small[:10] != small[10:20]
    first, second = prepared.report.data_sets
    assert (first.passes, second.passes) == (20 / 30, 2)
    assert "weight 1, read 2 times per epoch" in "\n".join(prepared.report.lines())


def test_draws_are_the_same_whichever_step_is_asked_for_first(mixed: Any, two: tuple[str, str]) -> None:
    prepared = mixed([{"path": two[0], "weight": 5}, {"path": two[1], "weight": 2}])
    in_order = [_batches(prepared, seed=3).row_indices(step).tolist() for step in range(20)]
    resumed = _batches(prepared, seed=3)
    assert [resumed.row_indices(step).tolist() for step in reversed(range(20))] == in_order[::-1]
    assert [_batches(prepared, seed=4).row_indices(step).tolist() for step in range(20)] != in_order


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (10, [1, 1], [5, 5]),
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [0.7, 0.2, 0.1], [7, 2, 1]),
        (10, [1000, 1], [9, 1]),
        (1, [1, 2], [0, 1]),
        (3, [1e9, 1, 1], [1, 1, 1]),
    ],
)
def test_shares_are_whole_numbers_and_no_set_is_forgotten(
    total: int, weights: list[float], expected: list[int]
) -> None:
    assert apportion(total, weights) == expected


def test_a_set_of_one_row_can_have_nearly_all_the_weight() -> None:
    order = Mixture([1, 99], [99, 1]).order(0, 0)
    assert Counter(order.tolist())[0] == 99


@pytest.mark.parametrize(("amount", "counts"), [(0.2, [6, 2]), ("10%", [3, 1]), (8, [6, 2]), (2, [1, 1])])
def test_every_set_is_represented_in_the_held_out_rows(
    mixed: Any, two: tuple[str, str], amount: Any, counts: list[int]
) -> None:
    prepared = mixed({"mix": [*two], "validation": amount})
    assert [len(part.rows) for part in prepared.validation_parts] == counts
    assert len(prepared.validation or ()) == sum(counts)
    assert not set(map(int, prepared.train.hashes)) & set(map(int, prepared.validation.hashes))  # type: ignore[union-attr]


def test_a_set_may_have_its_own_validation(mixed: Any, two: tuple[str, str], write_rows: WriteRows) -> None:
    held_out = write_rows([question(n) for n in range(200, 205)], name="held.jsonl")
    prepared = mixed({"validation": 0.1, "mix": [two[0], {"path": two[1], "validation": str(held_out)}]})
    assert [len(part.rows) for part in prepared.validation_parts] == [3, 5]
    assert len(prepared.train) == 37
    prepared = mixed({"validation": str(held_out), "mix": [*two]})
    assert (len(prepared.train), len(prepared.validation or ())) == (40, 5)


def test_rows_that_several_sets_contain_are_counted_and_removed_when_asked_for(
    mixed: Any, write_rows: WriteRows
) -> None:
    first = write_rows([question(n) for n in range(5)], name="a.jsonl")
    second = write_rows([question(n) for n in range(3, 9)], name="b.jsonl")
    prepared = mixed([str(first), str(second)])
    assert [share.repeated for share in prepared.report.data_sets] == [0, 2]
    assert "2 rows are also in a data set before it" in "\n".join(prepared.report.lines())
    prepared = mixed({"mix": [str(first), str(second)], "deduplicate": True})
    assert [len(part.rows) for part in prepared.train_parts] == [5, 4]
    assert prepared.report.deduplicated == 2


def test_sets_with_files_of_the_same_name_are_kept_apart_when_exported(
    mixed: Any, write_rows: WriteRows, tmp_path: Path
) -> None:
    first = write_rows([question(n) for n in range(4)], name="a/rows.jsonl")
    second = write_rows([question(n) for n in range(10, 16)], name="b/rows.jsonl")
    prepared = mixed({"mix": [str(first), str(second)], "validation": 0.5})
    export(prepared, tmp_path / "out")
    written = [(tmp_path / "out" / f"{split}.jsonl").read_text().splitlines() for split in ("train", "validation")]
    assert [len(lines) for lines in written] == [5, 5]
    prompts = {json.loads(line)["messages"][0]["content"] for lines in written for line in lines}
    assert prompts == {f"Question {n}?" for n in [*range(4), *range(10, 16)]}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "path is missing"),
        ({"path": "a.jsonl", "mix": ["b.jsonl"]}, "path and mix are both given"),
        ([{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}], r"mix\[1\] has no weight, but others have"),
        ([{"path": "a.jsonl", "weight": 0}], "weight"),
        ([{"pth": "a.jsonl"}], "unknown key"),
    ],
)
def test_a_wrong_mix_is_an_error(section: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        validate(section, DataConfig)


def test_errors_name_the_entry(mixed: Any, two: tuple[str, str], write_rows: WriteRows) -> None:
    with pytest.raises(InputError, match=r"^data\.mix\[1\]\.path: nowhere\.jsonl: no such file") as error:
        mixed([two[0], "nowhere.jsonl"])
    assert error.value.hint
    bad = write_rows([{"prompt": "x", "verdict": "y"}], name="bad.jsonl")
    with pytest.raises(InputError, match=r"^data\.mix\[1\]: .*bad\.jsonl:1"):
        mixed([two[0], str(bad)])


def test_the_saved_section_reads_the_same(two: tuple[str, str]) -> None:
    section = {"system": "Be brief.", "mix": [{"path": two[0], "system": None}, {"path": two[1], "limit": 3}]}
    config = validate(section, DataConfig)
    again = validate(config.model_dump(), DataConfig)
    assert again == config
    assert [part.system for part in again.data_sets] == [None, "Be brief."]


def test_a_wrong_key_of_an_entry_is_named_with_its_line(tmp_path: Path) -> None:
    from finetune.lora import Config

    path = tmp_path / "run.yaml"
    path.write_text("recipe: lora\nmodel: {path: base}\nout: out\ndata:\n  - path: a.jsonl\n  - pth: b.jsonl\n")
    with pytest.raises(UsageError, match=r"run\.yaml:6: unknown key 'data\.1\.pth'"):
        load_config(path, Config)


def test_what_all_sets_have_in_common_goes_with_the_model(two: tuple[str, str], tmp_path: Path) -> None:
    entries = [{"path": two[0], "format": "prompt_completion"}, {"path": two[1]}]
    config = validate({"system": "Be brief.", "mix": entries}, DataConfig)
    save_reading(config, tmp_path)
    assert json.loads((tmp_path / TRAINED_FILE).read_text()) == {"system": "Be brief.", "differing": ["format"]}

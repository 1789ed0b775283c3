"""A comparison's file: how runs expand, and what is wrong with it, all at once and by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_lora.compare import CompareConfig, Variant, load_comparison
from lit_lora.errors import UsageError

BASE = """\
base:
  model: {path: base}
  data: {path: rows.jsonl, validation: 4}
  peft: {name: lora, rank: 4}
  train: {max_steps: 8}
"""


@pytest.fixture
def load(tmp_path: Path):
    def read(text: str, *overrides: str) -> tuple[CompareConfig, list[Variant]]:
        path = tmp_path / "compare.yaml"
        path.write_text(BASE + text)
        return load_comparison(path, overrides)

    return read


def test_a_run_is_the_base_with_its_own_sections(load) -> None:
    _, (lora, houlsby, tuned) = load(
        "runs:\n"
        "- {name: plain}\n"
        "- {name: houlsby, peft: {name: houlsby}, train: {batch_size: 2}}\n"
        "- {name: tuned, peft: {rank: 16}, optimizer: {lr: 1e-3}}\n"
    )
    assert (lora.config.recipe, lora.config.peft.rank) == ("lora", 4)
    assert (houlsby.config.recipe, houlsby.config.peft.about) == ("adapter", "houlsby adapter, bottleneck 64")
    assert (houlsby.config.train.max_steps, houlsby.config.train.batch_size) == (8, 2)
    assert (tuned.config.peft.rank, tuned.rates) == (16, (1e-3,))


def test_sweeps_multiply_and_name_their_runs(load) -> None:
    sweep = "{peft.rank: [2, 4], peft.target_modules: [all-linear, [q_proj, v_proj]]}"
    _, variants = load(f"runs:\n- {{name: lora, sweep: {sweep}}}\n")
    assert [variant.name for variant in variants] == [
        "lora rank=2 target_modules=all-linear",
        "lora rank=2 target_modules=q_proj+v_proj",
        "lora rank=4 target_modules=all-linear",
        "lora rank=4 target_modules=q_proj+v_proj",
    ]
    assert [variant.config.peft.rank for variant in variants] == [2, 2, 4, 4]
    assert variants[1].config.peft.target_modules == ["q_proj", "v_proj"]


def test_the_grid_multiplies_each_methods_own_rate(load) -> None:
    _, (lora, ia3, full, given, fixed) = load(
        "runs:\n"
        "- {name: lora}\n"
        "- {name: ia3, peft: {name: ia3}}\n"
        "- {name: full, peft: {name: full}}\n"
        "- {name: given, optimizer: {lr: 0.1}}\n"
        "- {name: fixed, lr: [0.5, 0.25, 0.5]}\n"
        "grid: [3, 1]\n"
    )
    assert lora.rates == (2e-4, 6e-4)
    assert ia3.rates == (3e-3, 9e-3)
    assert full.rates == (2e-5, 6e-5)
    assert given.rates == (0.1, 0.3)
    assert fixed.rates == (0.25, 0.5)


def test_overrides_reach_every_part(load) -> None:
    config, (variant,) = load("runs: [{name: a}]\n", "base.train.max_steps=3", "grid=[1, 2]", "out=elsewhere")
    assert (variant.config.train.max_steps, len(variant.rates), config.out) == (3, 2, Path("elsewhere"))


def test_all_problems_are_told_at_once_by_file_and_line(load) -> None:
    with pytest.raises(UsageError) as caught:
        load(
            "runs:\n"
            "- {name: a, peft: {name: lora, rnak: 3}}\n"
            "- name: b\n"
            "  peft: {name: lorra}\n"
            "- {name: c, sweep: {peft.rank: [2, 0]}}\n"
            "- {name: d, sweep: {peft.rank: 2}}\n"
            "- {name: e, trian: {max_steps: 1}}\n"
            "- {name: f, seed: 1}\n"
            "- {name: g, data: {validation: null}}\n"
            "- {name: h, recipe: loara}\n"
            "- {name: i, lrs: [1], peft: {name: houlsy}}\n"
            "grid: [-1]\n"
            "speed: 3\n"
        )
    lines = [line.partition("compare.yaml:")[2] for line in str(caught.value).splitlines()]
    found = {line.partition(":")[0]: line.partition(": ")[2] for line in lines}
    assert found["7"].startswith("unknown key 'peft.rnak' (did you mean 'rank'?)")
    assert "unknown name 'lorra' (did you mean 'lora'?)" in found["9"]
    assert found["10"].startswith("peft.rank: input should be greater than or equal to 1, got 0")
    assert found["11"].startswith("runs.3.sweep.peft.rank: input should be a valid list, got 2")
    assert found["12"].startswith("unknown key 'trian' (did you mean 'train'?)")
    assert found["13"] == "seed: set seeds of the comparison instead"
    assert found["14"].startswith("data.validation: is missing")
    assert found["15"] == "recipe 'loara' is not known (did you mean 'lora'?)"
    of_one_run = [line for line in lines if line.startswith("16:")]
    assert of_one_run[0].startswith("16: unknown key 'lrs' (did you mean 'lr'?), known: name, lr, sweep, recipe")
    assert "unknown name 'houlsy' (did you mean 'houlsby'?)" in of_one_run[1]
    assert found["17"].startswith("grid.0: input should be greater than 0")
    assert found["18"].startswith("unknown key 'speed'")
    assert len(lines) == 12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'runs' is missing"),
        ("runs: []\n", "at least 1 item"),
        ("runs: lora\n", "valid list"),
        ("runs: [lora]\n", "runs.0"),
        ("runs: [{name: a}, {name: A}]\n", "two are called 'A'"),
        ("runs: [{name: a, out: x}]\n", "out: set out of the comparison instead"),
        ("runs: [{name: a}]\nevaluate: {limit: 3}\n", "'evaluate.data' is missing"),
        ("runs: [{name: a}]\nseeds: []\n", "seeds"),
    ],
)
def test_what_is_missing_or_of_another_kind_is_told(load, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(text)

"""What the recipes share: configs, samples, the plan and its warnings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from lit_lora.finetune import full, lora

from lit_lora.checkpoint.load import load_model
from lit_lora.config import dump_yaml, load_config, shipped_configs
from lit_lora.errors import UsageError
from lit_lora.recipe import RECIPES, Options, load_data, load_recipe, show_plan, start, step_duration
from lit_lora.tokenizer import Tokenizer
from tests.finetune.tiny_task import make_base, write_config, write_rows

CHANGED = {
    lora: {
        "seed": 3,
        "out": "out/other",
        "model": {"path": "base", "dtype": "fp16", "device": "cpu"},
        "data": {
            "path": "rows.jsonl",
            "columns": {"prompt": "{a}: {b}", "completion": "c"},
            "values": {"c": {"0": "no", "1": "yes"}},
            "validation": "held_out.jsonl",
            "system": "Übung: #1 — 'quoted' \"words\"\nand a second line",
        },
        "peft": {
            "target_modules": ["q_proj", "mlp.up_proj"],
            "rank_pattern": {"q_proj": 2},
            "alpha": 1.5,
            "trainable_tokens": ["<a>", "no", "1e3"],
        },
        "train": {"epochs": 0.5, "patience": 2},
        "optimizer": {"name": "adamw8bit", "lr": 1e-05, "betas": [0.5, 0.25]},
        "schedule": {"name": "linear", "warmup": 10},
    },
    full: {
        "model": {"path": "base"},
        "data": {"path": "rows.jsonl", "validation": 0.25},
        "peft": {"train": ["mlp", "model.layers.1.*"]},
        "train": {"max_steps": 7},
    },
}


@pytest.mark.parametrize("recipe", CHANGED)
def test_a_config_survives_being_written_and_read(tmp_path, recipe):
    config = recipe.Config.model_validate(CHANGED[recipe])
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path, recipe.Config) == config
    assert load_recipe(path, []) == (recipe.finetune, config)


@example("\x85")  # a line break of YAML 1.1
@given(st.text(st.characters(codec="utf-8"), min_size=1) | st.from_regex(r"[-+.0-9eE_~a-z:#]{1,6}", fullmatch=True))
def test_any_text_survives_being_written_and_read(tmp_path_factory, text):
    config = lora.Config.model_validate({"model": {"path": "b"}, "data": {"path": text, "values": {"c": {"k": text}}}})
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(path, lora.Config) == config


@pytest.mark.parametrize("name", [name for name in shipped_configs() if name != "compare"])
def test_every_shipped_config_loads_and_survives(tmp_path, name):
    recipe, config = load_recipe(name, [])
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_recipe(path, []) == (recipe, config)


@pytest.mark.parametrize(
    ("settings", "lr"),
    [
        ("{name: lora}", 2e-4),
        ("{name: dora}", 2e-4),
        ("{name: lora, loraplus_lr_ratio: 16}", 1e-4),
        ("{name: lora, init: pissa}", 1e-4),
        ("{name: lora, freeze_A: true}", 6e-4),
        ("{name: multilora}", 6e-4),
        ("{name: tied-lora}", 6e-4),
        ("{name: vera}", 6e-3),
        ("{name: ia3}", 3e-3),
        ("{name: bitfit}", 1e-3),
    ],
)
def test_a_low_rank_method_brings_its_learning_rate_which_a_given_one_overrides(tmp_path, settings, lr):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{path: b}}\ndata: {{path: d}}\npeft: {settings}\n")
    assert load_recipe(path, [])[1].optimizer.lr == lr
    assert load_recipe(path, ["optimizer.weight_decay=0.1"])[1].optimizer.lr == lr
    assert load_recipe(path, ["recipe=qlora"])[1].optimizer.lr == lr
    assert load_recipe(path, ["optimizer.lr=0.5"])[1].optimizer.lr == 0.5


def test_every_recipe_is_found_by_its_name(tmp_path):
    for name in RECIPES:
        recipe, config = load_recipe(write_config(tmp_path), [f"recipe={name}"])
        assert recipe.__module__ == RECIPES[name]
        assert config.recipe == name


def test_an_unknown_recipe_is_named_with_those_that_there_are(tmp_path):
    path = write_config(tmp_path, recipe="qlorra")
    with pytest.raises(UsageError, match=r"unknown recipe 'qlorra'.*known: lora, qlora, adapter, full, classify"):
        load_recipe(path, [])


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def loaded(task: Path, *overrides: str, **sections: object):
    """Run, tokenizer and data of a config."""
    config = load_recipe(write_config(task, **sections), overrides)[1]
    run, tokenizer = start(config, Options(dry_run=True)), Tokenizer.load(config.model.path)
    return run, tokenizer, load_data(config, tokenizer)


def test_samples_are_the_prompts_and_answers_of_held_out_rows(task):
    _, tokenizer, data = loaded(task, train={"samples": 3})
    assert len(data.samples) == 3
    for (prompt, answer), row in zip(data.samples, data.prepared.validation, strict=False):
        assert prompt + answer == row.input_ids.tolist()[: len(prompt) + len(answer)]
        assert tokenizer.decode(prompt, skip_special=False).endswith("?<|im_end|>\n<|im_start|>assistant\n")
        assert tokenizer.decode(answer, skip_special=False).endswith("<|im_end|>")
    assert len(loaded(task, train={"samples": 99})[2].samples) == 4
    assert loaded(task, train={"samples": 0})[2].samples == []
    assert loaded(task, "data.validation=null", train={"samples": 3})[2].samples == []


def test_samples_of_plain_text_are_continued_after_a_few_words(task):
    write_rows(task / "rows.jsonl", [{"text": f"{n} the quick brown fox jumps over the lazy dog"} for n in range(9)])
    _, _, data = loaded(task, train={"samples": 1})
    (prompt, answer), row = data.samples[0], data.prepared.validation[0]
    assert prompt + answer == row.input_ids.tolist()
    assert len(prompt) == len(row.input_ids) // 2


def test_samples_of_a_conversation_stop_at_its_first_answer(task):
    turns = [("user", "one?"), ("assistant", "first"), ("user", "two?"), ("assistant", "second")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 6
    write_rows(task / "rows.jsonl", rows)
    _, tokenizer, data = loaded(task, train={"samples": 1})
    assert tokenizer.decode(data.samples[0][1]) == "first"


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["schedule.warmup=7"], "schedule.warmup: 7 steps are more than half of all 8, so the warm-up is cut to 4"),
        (["schedule.warmup=0.9"], "schedule.warmup: 7 steps are more than half of all 8, so the warm-up is cut to 4"),
        (["data.validation=null"], "no validation rows: overfitting will not show"),
        (["data.validation=null", "train.patience=3"], "train.patience has no effect without validation rows"),
        (
            ["data.path=long.jsonl"],
            "the longest row has 335 tokens, more than the model's context of 128; data.max_seq_length=128",
        ),
    ],
)
def test_pain_42_the_plan_warns_of_what_a_user_would_change(task, capsys, overrides, warning):
    long = write_rows(task / "long.jsonl", [{"prompt": "?", "completion": "a" * 40 * n} for n in range(1, 9)])
    model = load_model(task / "base")

    def warnings(*overrides: str) -> list[str]:
        run, _, data = loaded(task, *(override.replace("long.jsonl", str(long)) for override in overrides))
        capsys.readouterr()
        show_plan(run, model, data)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    assert any(line.startswith(f"warning: {warning}") for line in warnings(*overrides))
    assert warnings() == []


def test_a_former_key_is_accepted_with_a_line_that_names_the_present_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: base}\ndata: {path: rows.jsonl}\ntrain: {best_by: accuracy}\n")
    assert load_config(path, lora.Config, []).train.best_metric == "accuracy"
    assert capsys.readouterr().err == "config: best_by is now called best_metric\n"
    path.write_text("model: {path: base}\ndata: {path: rows.jsonl}\ntrain: {best_by: f1, best_metric: loss}\n")
    with pytest.raises(UsageError, match=r"config.yaml:3: train: best_by is the former name of best_metric; give only"):
        load_config(path, lora.Config, [])


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.00004, "1 ms"),
        (0.034, "34 ms"),
        (0.1234, "0.12 s"),
        (1.0, "1 s"),
        (1.62, "1.6 s"),
        (9.99, "10 s"),
        (75.2, "1 min 15 s"),
    ],
)
def test_the_time_of_a_step_has_two_digits(seconds, shown):
    assert step_duration(seconds) == shown

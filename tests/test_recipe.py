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
            "the longest row has 335 tokens, more than the model's context of 128 (",
        ),
        (
            ["data.path=short.jsonl", "data.validation=long.jsonl"],
            "the longest row has 335 tokens, more than the model's context of 128 (too long: 6 validation rows)",
        ),
        (
            ["data.path=short.jsonl", "data.validation=long.jsonl", "data.max_seq_length=60"],
            "long.jsonl: 7 of 8 rows are longer than data.max_seq_length 60 and are dropped; "
            "data.max_seq_length=128 keeps more (the model's context is 128)",
        ),
        (
            ["data.path=long.jsonl", "data.max_seq_length=128", "data.validation=1"],
            "long.jsonl: 6 of 8 rows are longer than data.max_seq_length 128 and are dropped; "
            "data.too_long=truncate_prompt cuts prompts instead",
        ),
    ],
)
def test_pain_42_the_plan_warns_of_what_a_user_would_change(task, capsys, overrides, warning):
    long = write_rows(task / "long.jsonl", [{"prompt": "?", "completion": "a" * 40 * n} for n in range(1, 9)])
    short = write_rows(task / "short.jsonl", 12)
    model = load_model(task / "base")

    def warnings(*overrides: str) -> list[str]:
        run, _, data = loaded(
            task,
            *(
                override.replace("=long.jsonl", f"={long}").replace("=short.jsonl", f"={short}")
                for override in overrides
            ),
        )
        capsys.readouterr()
        show_plan(run, model, data)
        printed = capsys.readouterr().err.replace(f"{task}/", "")
        return [line for line in printed.splitlines() if line.startswith("warning: ")]

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


def test_validation_rows_have_columns_values_and_a_limit_of_their_own(task: Path) -> None:
    rows = [{"q": f"colour {n}?", "a": str(n % 2)} for n in range(6)]
    held_out = write_rows(task / "held_out.jsonl", rows)
    section = "{columns: {prompt: q, completion: a}, values: {a: {0: no, 1: yes}}, limit: 4}"
    _, tokenizer, data = loaded(task, f"data.validation={section[:-1]}, path: {held_out}}}", "data.limit=10")
    assert data.prepared.validation is not None
    assert (len(data.prepared.train), len(data.prepared.validation)) == (10, 4)
    ids = data.prepared.validation[1].input_ids
    assert "colour 1?" in tokenizer.decode(ids.tolist())
    assert "yes" in tokenizer.decode(ids.tolist())


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("{pth: x}", "unknown key 'data.validation.pth' (did you mean 'path'?)"),
        ("{path: x, limit: 0}", "data.validation.limit: input should be greater than or equal to 1, got 0"),
        ("{columns: {a: b}}", "'data.validation.path' is missing"),
    ],
)
def test_a_mistake_in_the_validation_section_is_named(task: Path, section: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(write_config(task), lora.Config, [f"data.validation={section}"])
    assert problem in str(caught.value)


def test_a_part_of_the_validation_rows_is_measured(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _, whole = loaded(task, "data.validation=8")
    run, _, data = loaded(task, "data.validation=8", "train.eval_rows=3")
    again = loaded(task, "data.validation=8", "train.eval_rows=3")[2]
    other = loaded(task, "data.validation=8", "train.eval_rows=3", "seed=1")[2]
    assert data.prepared.validation is not None
    assert len(data.prepared.validation) == sum(len(batch.rows) for batch in data.validation) == 3
    assert {row.source for row in data.prepared.validation} <= {row.source for row in whole.prepared.validation}
    assert data.validation_fingerprint == again.validation_fingerprint != other.validation_fingerprint
    assert data.batches.rows.fingerprint == whole.batches.rows.fingerprint
    show_plan(run, load_model(task / "base"), data)
    assert "validation rows\t3 of 8, every 3 steps" in capsys.readouterr().out
    assert len(loaded(task, "data.validation=8", "train.eval_rows=30")[2].prepared.validation) == 8

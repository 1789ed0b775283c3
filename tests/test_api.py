"""``import lit_lora``: the steps of the command line from Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lit_lora
from lit_lora.errors import InputError, UsageError
from tests.finetune.tiny_task import contents, make_base, write_rows

ROWS = [{"prompt": f"Colour {n}?", "completion": "red" if n % 2 else "blue"} for n in range(24)]
FAST = {"max_steps": 4, "batch_size": 4, "samples": 0}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path / "base"


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, lit_lora; dir(lit_lora); print(sorted({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_name_that_it_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'lit_lora' has no attribute 'tune'"):
        _ = lit_lora.tune


def test_from_rows_to_a_merged_model(base: Path) -> None:
    model = lit_lora.load(base, dtype="fp32")
    prepared = lit_lora.prepare(ROWS, model, validation=4)
    assert (len(prepared.train), len(prepared.validation or ())) == (20, 4)
    assert any("24 rows" in line for line in prepared.report.lines())

    run = model.finetune(
        {"path": "rows.jsonl", "validation": 4},
        model={"dtype": "fp32"},
        peft={"rank": 2},
        train={**FAST, "max_steps": 20},
        optimizer={"lr": 0.02},
        out="out",
    )
    assert run.folder == Path("out")
    assert run.result["steps"] == 20
    assert [record["step"] for record in run.metrics if "loss" in record] == list(range(1, 21))
    scores = run.evaluate("rows.jsonl", limit=6)
    assert set(scores) == {"base", "out/adapter"}
    assert scores["out/adapter"]["loss"] < scores["base"]["loss"]

    merged = run.merge(dtype="fp32")
    assert merged.folder == Path("out/merged")
    question = "Is it red?"
    assert merged.generate(question, max_new_tokens=8) == run.generate(question, max_new_tokens=8)
    assert merged.evaluate("rows.jsonl", limit=6)["out/merged"]["loss"] == pytest.approx(
        scores["out/adapter"]["loss"], abs=0.01
    )


def test_a_run_from_python_is_the_run_of_the_command(base: Path) -> None:
    config = Path("config.yaml")
    config.write_text(
        f"model: {{path: {base}}}\ndata: {{path: rows.jsonl}}\npeft: {{rank: 2}}\ntrain: {json.dumps(FAST)}\nout: a\n"
    )
    with pytest.raises(SystemExit) as done:
        __import__("lit_lora.cli", fromlist=["main"]).main(["finetune", "--config", str(config)])
    assert not done.value.code
    lit_lora.run(config, out="b")
    lit_lora.load(base).finetune("rows.jsonl", peft={"rank": 2}, train=FAST, out="c")
    weights = [contents(Path(name) / "adapter")["adapter_model.safetensors"] for name in "abc"]
    assert weights[0] == weights[1] == weights[2]


def test_a_section_extends_that_of_the_config(base: Path) -> None:
    Path("config.yaml").write_text(
        f"model: {{path: {base}}}\ndata: {{path: rows.jsonl}}\npeft: {{rank: 2, alpha: 3}}\nout: a\n"
    )
    lit_lora.run("config.yaml", peft={"rank": 1}, train=FAST)
    settings = json.loads(Path("a/adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (1, 3)


def test_a_dry_run_writes_nothing_and_has_no_result(base: Path) -> None:
    before = contents(Path())
    run = lit_lora.load(base).finetune(ROWS[:4], train=FAST, out="out", dry_run=True)
    kept = {name: content for name, content in contents(Path()).items() if not name.startswith("cache/")}
    assert kept == before
    with pytest.raises(UsageError, match="out: this run has no result yet"):
        _ = run.result


def test_rows_given_as_dicts_are_found_again_by_a_resumed_run(base: Path) -> None:
    model = lit_lora.load(base)
    settings = {"peft": {"rank": 2}, "train": {**FAST, "save_every": 2}, "out": "out"}
    first = model.finetune(ROWS, **settings)
    again = model.finetune(ROWS, **settings, resume=True)
    assert again.result["steps"] == first.result["steps"] == 4


def test_prompts_are_texts_conversations_or_lists_of_them(base: Path) -> None:
    model = lit_lora.load(base, dtype="fp32")
    text = model.generate("Colour 3?", max_new_tokens=4)
    conversation = [{"role": "user", "content": "Colour 3?"}]
    assert model.generate(conversation, max_new_tokens=4) == text
    assert model.generate(["Colour 3?", conversation], max_new_tokens=4) == [text, text]
    with_system = [{"role": "system", "content": "Be brief."}, *conversation]
    assert model.generate("Colour 3?", system="Be brief.", max_new_tokens=4) == model.generate(
        with_system, max_new_tokens=4
    )
    assert isinstance(model.generate("Colour", raw=True, max_new_tokens=4), str)
    assert model.opened is model.opened


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda base: lit_lora.load("nowhere"), InputError, "nowhere: no such folder"),
        (lambda base: lit_lora.run(recipe="lorra"), UsageError, "recipe 'lorra' is unknown (did you mean 'lora'?)"),
        (lambda base: lit_lora.load(base).finetune(ROWS, peft={"rnk": 2}), UsageError, "did you mean 'rank'"),
        (lambda base: lit_lora.load(base).generate("x", temperatur=1), UsageError, "did you mean 'temperature'"),
        (
            lambda base: lit_lora.load(base).generate([{"role": "user", "content": "x"}], raw=True),
            UsageError,
            "raw=True",
        ),
        (lambda base: lit_lora.load(base).generate(""), UsageError, "the prompt is empty"),
        (lambda base: lit_lora.prepare([{"a": "b"}], base), InputError, "a"),
        (lambda base: lit_lora.prepare(ROWS, base, validaton=1), UsageError, "did you mean 'validation'"),
        (lambda base: lit_lora.load(base).evaluate(ROWS, tasks=["los"]), UsageError, "did you mean 'loss'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_clear_line(base: Path, call, error, message: str) -> None:
    with pytest.raises(error) as raised:
        call(base)
    assert message in str(raised.value)


def test_a_model_with_an_adapter_is_not_finetuned_by_mistake(base: Path) -> None:
    run = lit_lora.load(base).finetune(ROWS, peft={"rank": 2}, train=FAST, out="out")
    with pytest.raises(UsageError, match="out: has an adapter, expected a checkpoint to finetune"):
        run.finetune(ROWS)
    with pytest.raises(UsageError, match="dtype 'int7' is unknown, expected one of: bf16, fp16, fp32"):
        run.merge(dtype="int7")
    assert isinstance(lit_lora.load("out"), lit_lora.Run)
    assert torch.is_grad_enabled()


def test_a_run_is_asked_and_measured_as_it_was_trained(base: Path) -> None:
    rows = [{"q": f"Colour {n}?", "a": "red" if n % 2 else "blue"} for n in range(24)]
    run = lit_lora.load(base, dtype="fp32").finetune(
        {
            "path": lit_lora.api._data_path(rows),
            "columns": {"prompt": "Name it. {q}", "completion": "a"},
            "system": "Be brief.",
            "validation": 5,
        },
        model={"dtype": "fp32"},
        peft={"rank": 2},
        train={**FAST, "max_steps": 8},
        optimizer={"lr": 0.02},
        out="out",
    )
    moved = (run.folder / "adapter").rename(Path("moved"))
    adapter = lit_lora.load(base, adapter=moved, dtype="fp32")
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name it. Colour 3?"}]
    asked = adapter.generate("Colour 3?", max_new_tokens=8)
    assert asked == adapter.generate(conversation, max_new_tokens=8)
    assert asked == adapter.generate(conversation[1:], max_new_tokens=8)
    moved.rename("out/adapter")
    scores = lit_lora.load(run.folder, dtype="fp32").evaluate(tasks=["loss"])
    assert scores["out/adapter"]["loss"] == pytest.approx(run.result["validation_loss"], rel=1e-4)
    assert scores["base"]["loss"] == pytest.approx(run.result["untrained_validation_loss"], rel=1e-4)

"""Finetuning over a quantized base, as functions and from the command line."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint import load_model
from lit_lora.cli import main
from lit_lora.open.decoder import OpenedModel, open_model
from lit_lora.quantize import QuantizeConfig, found_config
from lit_lora.recipe import Options, load_recipe
from tests.finetune.tiny_task import contents, make_base, write_config, write_rows
from tests.train.tiny_run import losses, metrics

Call = Callable[..., tuple[int, str, str]]
NF4 = {"name": "nf4", "block_size": 32}


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model that blocks of 32 fit, rows and a config."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base", intermediate_size=64)
    write_rows(tmp_path / "rows.jsonl")
    write_config(tmp_path, recipe="qlora", quantize=NF4)
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main([*map(str, arguments)])
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return run


def finetuned(config: Path, *overrides: str, **options: bool) -> Path:
    recipe, settings = load_recipe(config, overrides)
    return recipe(settings, Options(**options))


def test_a_run_learns_and_says_what_the_base_takes(task: Path, call: Call) -> None:
    before = contents(task / "base")
    code, out, _ = call("finetune", "--config", task / "config.yaml", "train.max_steps=12")
    assert code == 0
    weights = 2 * (32 * 32 * 2 + 2 * 16 * 32 + 3 * 32 * 64)
    (row,) = re.findall(r"^base\t(.+)$", out, re.MULTILINE)
    assert row.startswith(f"nf4-dq, blocks of 32: {weights:,} weights in ")
    assert re.search(r"gate_proj\t2\t64×32 nf4-dq, blocks of 32, rank 8", out)
    assert losses(task / "run")[-1] < losses(task / "run")[0]
    assert contents(task / "base") == before
    assert "| Base quantized as | nf4-dq, blocks of 32 |" in (task / "run" / "adapter" / "README.md").read_text()


def test_a_run_opens_over_the_base_that_it_was_trained_on_unless_told_otherwise(task: Path) -> None:
    run = finetuned(task / "config.yaml")
    ids = torch.arange(3, 20)[None]
    opened = open_model(run, dtype="fp32")
    assert found_config(opened.model) == QuantizeConfig.model_validate(NF4)
    assert "nf4-dq, blocks of 32, float32 on cpu" in opened.description
    by_hand = load_model(task / "base", quantize=QuantizeConfig.model_validate(NF4))
    peft.load_adapter(by_hand, run / "adapter")
    plain = open_model(run, dtype="fp32", quantize="none").model
    with torch.no_grad():
        assert torch.equal(opened.model(ids), by_hand.eval()(ids))
        assert (plain(ids) - opened.model(ids)).abs().max() > 1e-4
    assert found_config(plain) is None
    assert found_config(open_model(task / "base", dtype="fp32", quantize="int8").model) == QuantizeConfig(name="int8")


def test_evaluate_holds_the_base_as_it_was_trained_on(task: Path, call: Call) -> None:
    run = finetuned(task / "config.yaml", "optimizer.lr=1e-30")  # an adapter that changes nothing
    code, _, err = call("evaluate", run, "--data", task / "rows.jsonl", "--task", "loss", "--out", task / "one.json")
    assert code == 0, err
    assert "run/adapter has exactly the scores of base in nf4-dq, blocks of 32" in err
    trained = finetuned(task / "config.yaml", "optimizer.lr=1e-2", f"out={task / 'trained'}")
    assert call("evaluate", trained, task / "base", "--data", task / "rows.jsonl", "--out", task / "two.json")[0] == 0
    columns = {model["label"]: model for model in json.loads((task / "two.json").read_text())["models"]}
    assert list(columns) == ["base in nf4-dq, blocks of 32", "trained/adapter", "base"]
    assert "nf4-dq, blocks of 32, " in columns["trained/adapter"]["opened"]
    losses = [column["scores"]["loss"]["value"] for column in columns.values()]
    assert losses[1] < losses[0] != losses[2]
    assert call("evaluate", run, "--data", task / "rows.jsonl", "--quantize", "none", "--out", task / "3.json")[0] == 0
    assert [m["label"] for m in json.loads((task / "3.json").read_text())["models"]] == ["base", "run/adapter"]


def test_generate_and_chat_run_over_the_quantized_base(task: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finetuned(task / "config.yaml", "train.max_steps=12")
    opened: list[OpenedModel] = []

    def noted(*arguments: Any, **options: Any) -> OpenedModel:
        opened.append(open_model(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr("lit_lora.open.decoder.open_model", noted)
    monkeypatch.setattr("sys.stdin", io.StringIO("colour 3?\n/adapter off\ncolour 3?\n"))
    code, out, err = call("chat", run, "--max-new-tokens", 4)
    assert code == 0, err
    assert len(out.splitlines()) == 2
    assert [model.adapter is None for model in opened] == [False, True]
    assert all("nf4-dq, blocks of 32, " in model.description for model in opened), "the base stays as it was trained on"
    code, answer, err = call("generate", run, "colour 3?", "--max-new-tokens", 4, "--temperature", 0)
    assert code == 0, err
    kept = call("generate", run, "colour 3?", "--max-new-tokens", 4, "--temperature", 0, "--quantize", "nf4-dq")
    assert kept[0] == 2  # its blocks are of 64, which do not fit
    assert call("generate", run, "colour 3?", "--max-new-tokens", 4, "--temperature", 0)[1] == answer


@pytest.mark.parametrize("quantize", [NF4, {"name": "int8"}], ids=str)
def test_resuming_continues_bit_for_bit(task: Path, quantize: dict[str, object]) -> None:
    whole = finetuned(write_config(task, recipe="qlora", quantize=quantize, train={"save_every": 4}))
    kept = task / "run" / "checkpoints"
    reference = metrics(whole), (whole / "adapter" / "adapter_model.safetensors").read_bytes()
    for later in sorted(kept.glob("step-*"))[1:]:
        shutil.rmtree(later)
    (whole / "adapter" / "adapter_model.safetensors").unlink()
    finetuned(whole / "config.yaml", resume=True)
    assert (metrics(whole), (whole / "adapter" / "adapter_model.safetensors").read_bytes()) == reference


def test_a_prequantized_folder_trains_as_the_original_does(task: Path, call: Call) -> None:
    first = finetuned(task / "config.yaml")
    packed = task / "packed"
    assert call("convert", task / "base", "--quantize", "nf4-dq", "--block-size", 32, "--out", packed)[0] == 0
    again = finetuned(task / "config.yaml", f"model.path={packed}", f"out={task / 'again'}")
    assert metrics(again) == metrics(first)
    lora = finetuned(write_config(task, recipe="lora"), f"model.path={packed}", f"out={task / 'lora'}")
    assert metrics(lora) == metrics(first)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["quantize.name=nf5"], 2, r"quantize\.name: .*'nf4', 'fp4', .* or 'int8'"),
        (["quantize.block_size=48"], 2, r"quantize\.block_size: .*32, 64"),
        (["quantize.block_size=64"], 2, r"64 does not divide the 32 columns of .*q_proj.weight, those that do: 32"),
        (["quantize.name=int8"], 2, r"int8 has one scale per row: block_size has no effect"),
        (["quantize.double=true"], 2, r"quantize\.double"),
        (["recipe=lora"], 2, r"quantize"),
        (["peft.modules_to_save=[mlp]"], 2, r"peft.modules_to_save: .* is quantized"),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_one_line(task: Path, call: Call, arguments: list[str], code: int, message: str) -> None:
    found, out, err = call("finetune", "--config", task / "config.yaml", *arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (found, len(errors)) == (code, 1), err
    assert re.search(message, errors[0])
    assert "Traceback" not in err + out
    assert not (task / "run").exists()


def test_what_is_quantized_is_not_quantized_again_nor_trained_in_full(task: Path, call: Call) -> None:
    packed = task / "packed"
    assert call("convert", task / "base", "--quantize", "fp4", "--block-size", 32, "--out", packed)[0] == 0
    for code, arguments, message in [
        (3, ["convert", packed, "--quantize", "nf4", "--out", task / "x"], "already quantized"),
        (2, ["finetune", "--config", task / "config.yaml", f"model.path={packed}"], "cannot become nf4-dq"),
        (2, ["generate", packed, "hello", "--quantize", "nf4-dq"], "cannot become nf4-dq"),
        (
            2,
            ["generate", task / "base", "hello", "--quantize", "nf5"],
            "expected one of nf4, nf4-dq, fp4, fp4-dq, nf3",
        ),
        (2, ["convert", task / "base", "--quantize", "nf5"], "--quantize nf5: not known (did you mean 'nf4'?)"),
        (2, ["convert", task / "base", "--quantize", "nf4", "--block-size", 48], "--block-size 48: expected one of 32"),
        (2, ["convert", task / "base", "--quantize", "nf4"], "64 does not divide the 32 columns"),
        (2, ["convert", task / "base", "--block-size", 64], "--block-size needs --quantize"),
    ]:
        found, out, err = call(*arguments)
        assert (found, err.count("error: ")) == (code, 1), (arguments, err)
        assert message in err, err
        assert "Traceback" not in err + out
    assert not (task / "x").exists()
    full = write_config(task, recipe="full", model={"path": str(packed)})
    found, _, err = call("finetune", "--config", full)
    assert (found, err.count("error: ")) == (2, 1)
    assert "the base is quantized (fp4, blocks of 32)" in err

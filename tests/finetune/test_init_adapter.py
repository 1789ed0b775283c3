"""A run that starts from the adapter of another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_lora.checkpoint import load_model
from lit_lora.errors import InputError, LitLoraError, UsageError
from lit_lora.peft import load_adapter
from tests.finetune.test_qlora import finetuned
from tests.finetune.tiny_task import make_base, write_config, write_rows
from tests.train.tiny_run import metrics

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 4, "target_modules": "q,v", "bias": "none"},
    "lora by pattern": {"name": "lora", "rank": 2, "rank_pattern": {"q_proj": 3}, "use_rslora": True},
    "pissa": {"name": "lora", "rank": 2, "init": "pissa"},
    "dora": {"rank": 2, "layers": [1]},
    "vera": {"rank": 4},
    "ia3": {},
    "houlsby": {"bottleneck": 4},
    "prefix": {"num_virtual_tokens": 3},
    "composed": {"methods": [{"name": "lora", "rank": 2}, {"name": "prefix", "num_virtual_tokens": 2}]},
}
ADDED = ("houlsby", "prefix", "composed")


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base model and rows."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    return tmp_path


def first_run(task: Path, case: str = "lora") -> tuple[Path, Path]:
    """The adapter of a short run, and a config of another that starts from it without any of its settings."""
    recipe = "adapter" if case in ADDED else "lora"
    name = METHODS[case].get("name", case)
    folder = finetuned(write_config(task, recipe=recipe, peft={"name": name, **METHODS[case]}, train={"max_steps": 4}))
    second = write_config(task, recipe=recipe, peft={"init_adapter": str(folder / "adapter")}, out=str(task / "second"))
    return folder / "adapter", second


def losses_of_validation(folder: Path) -> dict[int, float]:
    return {record["step"]: record["validation_loss"] for record in metrics(folder) if "validation_loss" in record}


@pytest.mark.parametrize("case", METHODS)
def test_a_run_starts_where_the_adapter_ends(task: Path, case: str) -> None:
    adapter, config = first_run(task, case)
    reached = min(loss for step, loss in losses_of_validation(adapter.parent).items() if step)
    second = finetuned(config)
    losses = losses_of_validation(second)
    assert losses[0] == pytest.approx(reached, rel=1e-4)
    assert min(loss for step, loss in losses.items() if step) < losses[0]

    model = load_model(task / "base")
    load_adapter(model, second / "adapter")


def test_the_settings_of_the_file_are_in_the_config_of_the_run(task: Path) -> None:
    adapter, config = first_run(task)
    peft = yaml.safe_load((finetuned(config) / "config.yaml").read_text())["peft"]
    assert (peft["name"], peft["rank"], peft["alpha"], peft["init_adapter"]) == ("lora", 4, 4, str(adapter))
    assert len(peft["target_modules"]) == 4


def test_the_run_can_be_opened_and_resumed_without_the_adapter(task: Path) -> None:
    adapter, config = first_run(task)
    whole = finetuned(config, f"out={task / 'whole'}")
    second = finetuned(config, "train.save_every=4")
    shutil.rmtree(adapter.parent)
    for name in ("checkpoints", "adapter"):  # as if it was killed before the first checkpoint
        shutil.rmtree(second / name)
    (second / "metrics.jsonl").unlink()
    finetuned(second / "config.yaml", resume=True)
    weights = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        ({"rank": 8}, "peft.rank: 8, but the adapter .* has 4"),
        ({"alpha": 8}, "peft.alpha: 8.0, but the adapter .* has 4.0"),
        ({"use_rslora": True}, "peft.use_rslora: True, but the adapter .* has False"),
        ({"name": "dora"}, "peft.name: dora, but .* is loaded as lora"),
        ({"init": "pissa"}, "peft.init: pissa has no effect"),
        ({"target_modules": ["q_proj"]}, "not expected for this model"),
    ],
)
def test_settings_that_are_not_those_of_the_adapter_are_refused(task: Path, peft: dict, message: str) -> None:
    adapter, _ = first_run(task)
    config = write_config(task, peft={"init_adapter": str(adapter), **peft}, out=str(task / "second"))
    with pytest.raises(LitLoraError, match=message):
        finetuned(config)
    assert not (task / "second").exists()


def test_an_adapter_that_is_not_there_or_of_another_base_is_refused(task: Path) -> None:
    _, config = first_run(task)
    with pytest.raises(InputError, match="no such file, expected an adapter folder"):
        finetuned(config, f"peft.init_adapter={task / 'nothing'}")
    make_base(task / "wide", intermediate_size=64)
    with pytest.raises(InputError, match="trained on another base model"):
        finetuned(config, f"model.path={task / 'wide'}")


def test_the_same_base_under_another_name_is_warned_about(task: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, config = first_run(task)
    shutil.copytree(task / "base", task / "copy")
    finetuned(config, f"model.path={task / 'copy'}")
    assert f"was trained on {task / 'base'}, and this run trains it on {task / 'copy'}" in capsys.readouterr().err


def test_a_quantized_base_goes_on_from_an_adapter(task: Path) -> None:
    sections: dict[str, Any] = {"recipe": "qlora", "quantize": {"name": "int8"}}
    first = finetuned(write_config(task, **sections))
    config = write_config(task, **sections, peft={"init_adapter": str(first / "adapter")}, out=str(task / "second"))
    reached = min(loss for step, loss in losses_of_validation(first).items() if step)
    assert losses_of_validation(finetuned(config))[0] == pytest.approx(reached, rel=1e-4)


def test_added_tokens_are_named_again(task: Path) -> None:
    first = finetuned(write_config(task, peft={"trainable_tokens": ["<ticket>"]}))
    peft = {"init_adapter": str(first / "adapter")}
    with pytest.raises(UsageError, match=r"trains tokens that .* lacks"):
        finetuned(write_config(task, peft=peft, out=str(task / "second")))
    again = finetuned(write_config(task, peft={**peft, "trainable_tokens": ["<ticket>"]}, out=str(task / "second")))
    reached = min(loss for step, loss in losses_of_validation(first).items() if step)
    assert losses_of_validation(again)[0] == pytest.approx(reached, rel=1e-4)


def test_full_is_sent_to_the_model(task: Path) -> None:
    with pytest.raises(UsageError, match=r"peft.init_adapter: full starts from model.path"):
        finetuned(write_config(task, recipe="full", peft={"init_adapter": "out/adapter"}))


def test_more_epochs_of_a_finished_run_are_refused_with_the_way_to_them(task: Path) -> None:
    first = finetuned(write_config(task, train={"max_steps": 4}))
    config = task / "config.yaml"
    with pytest.raises(UsageError) as caught:
        finetuned(config, "train.max_steps=8", resume=True)
    assert caught.value.hint
    override = f"peft.init_adapter={first / 'adapter'}"
    assert override in caught.value.hint
    reached = min(loss for step, loss in losses_of_validation(first).items() if step)
    more = finetuned(config, "train.max_steps=8", f"out={task / 'more'}", override)
    assert losses_of_validation(more)[0] == pytest.approx(reached, rel=1e-4)


def test_the_adapter_does_not_name_what_it_started_from(task: Path) -> None:
    _, config = first_run(task)
    saved = json.loads((finetuned(config) / "adapter" / "lit_lora.json").read_text())
    assert saved["method"]["init_adapter"] is None

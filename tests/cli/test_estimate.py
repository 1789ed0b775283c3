"""``lit-lora estimate``: parts, methods, what would make it fit, and what to type next."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.finetune.test_qlora import Call, call, task  # noqa: F401 - fixtures
from tests.finetune.tiny_task import write_config


def size(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]


def rows(out: str) -> dict[str, list[str]]:
    """The lines of all tables by their first cell."""
    return {cells[0]: cells[1:] for line in out.splitlines() if len(cells := line.split("\t")) > 1}


def test_parts_add_up_and_what_comes_next_has_the_same_settings(task: Path, call: Call) -> None:  # noqa: F811
    code, out, err = call("estimate", "--config", task / "config.yaml", "train.max_steps=5", "peft.rank=2")
    assert code == 0, err
    table = rows(out)
    parts = ["weights", "trained", "optimizer", "gradients", "activations", "logits", "workspace", "process"]
    assert sum(size(table[part][0]) for part in parts) == pytest.approx(size(table["total"][0]), rel=0.01)
    assert table["weights"][1] == "the model in nf4-dq, blocks of 32 and float32"
    assert [name for name in table if name in ("full", "lora", "lora, base in nf4-dq, blocks of 32")] == [
        "full", "lora", "lora, base in nf4-dq, blocks of 32"
    ]  # fmt: skip
    assert out.splitlines()[-1] == (
        f"next: lit-lora finetune --config {task / 'config.yaml'} train.max_steps=5 peft.rank=2 --dry-run"
    )


def test_the_change_that_makes_it_fit_comes_after_those_that_were_given(task: Path, call: Call) -> None:  # noqa: F811
    arguments = ["--config", "qlora", "--shape", "smollm2-135m", "--memory", "1GB", "peft.rank=8"]
    code, out, err = call("estimate", *arguments)
    assert code == 0, err
    assert "warning: does not fit" in err
    (command,) = re.findall(r"^next: lit-lora finetune (.*) --dry-run$", out, re.MULTILINE)
    given = "--config qlora peft.rank=8 model.path=CHECKPOINT_OF_THAT_SHAPE "  # not the model of the config
    assert command.startswith(given)
    code, out, _ = call("estimate", *arguments, *command.removeprefix(given).split())
    assert code == 0
    assert "\nfits: " in out


@pytest.mark.parametrize(("bits", "total"), [(2.5, 2.5), (3.5, 3.5)])
def test_lq_lora_counts_its_budget(task: Path, call: Call, bits: float, total: float) -> None:  # noqa: F811
    path = write_config(task, recipe="qlora", peft={"name": "lq-lora", "bits": bits, "rank": 2})
    code, out, err = call("estimate", "--config", path, "--shape", "llama-7b", "--device", "cuda", "model.dtype=bf16")
    assert code == 0, err
    assert "estimated time per step: unknown, device 'cuda' is not available" in out
    table = rows(out)
    held = 6_476_005_376 * total / 8 + 2 * (2 * 32_000 * 4096 + 65 * 4096)
    assert size(table["weights"][0]) == pytest.approx(held, rel=0.02)
    assert table["weights"][1] == "the model in one type per layer and bfloat16"
    assert "lq-lora, base in one type per layer" in table


def test_rows_that_weigh_errors_take_the_model_in_full_once(task: Path, call: Call) -> None:  # noqa: F811
    path = write_config(task, recipe="qlora", peft={"name": "lq-lora", "rank": 2, "fisher_rows": 3})
    given = ("estimate", "--config", path, "--shape", "smollm2-135m", "model.dtype=bf16")
    code, out, err = call(*given, "--memory", "9GB")
    assert code == 0, err
    table = rows(out)
    weighing, step = size(table["calibration"][0]), size(table["total"][0])
    assert weighing > step
    assert table["calibration"][1] == "once, before the first step: 3 rows through the unquantized model"
    assert f"fits: {table['calibration'][0]} of 9.0 GB" in out
    _, without, _ = call(*given, "peft.fisher_rows=0", "--memory", "9GB")
    assert "calibration" not in rows(without)
    assert size(rows(without)["total"][0]) == step
    _, out, err = call(*given, "--memory", f"{(weighing + step) / 2:.0f}")
    assert "does not fit" in err
    assert out.splitlines()[-1].endswith("peft.fisher_rows=0 --dry-run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "lots"], "--memory lots: expected a size such as 24GB"),
        (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
        (["--shape", "llama-8t"], "llama-8t"),
        (["quantize.block_size=4096"], "4096 does not divide the 32 columns"),
        (["quantize.name=nf5"], "quantize.name"),
        (["peft.name=lq-lora", "peft.bits=1", "quantize.block_size=64"], "a budget of 1 bits per weight is too small"),
        (["peft.name=qa-lora"], "qa-lora needs a base in int4 or int2, got nf4-dq, blocks of 32"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(task: Path, call: Call, arguments: list[str], message: str) -> None:  # noqa: F811
    code, out, err = call("estimate", "--config", task / "config.yaml", *arguments)
    assert (code, err.count("error: ")) == (2, 1), err
    assert message in err
    assert "Traceback" not in err + out

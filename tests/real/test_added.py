"""Every added method lowers the loss of SmolLM2-135M on held-out Dolly rows: half a minute each, so slow."""

from __future__ import annotations

from typing import Any

import pytest

from lit_lora.peft import METHODS
from lit_lora.train.run_log import read_metrics
from tests.real.test_learning import finetuned

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "houlsby": {},
    "houlsby random": {"drop_layers": "random", "train_norms": False},
    "lin": {},
    "parallel": {},
    "prefix": {},
    "prefix projection": {"prefix_projection": True},
    "prompt": {},
    "p-tuning": {},
    "llama-adapter": {},
    "llama-adapter-v2": {},
    "composed": {"methods": [{"name": "lora", "rank": 8}, {"name": "prefix"}]},
}


def test_every_method_for_decoders_is_tried():
    names = {case.split()[0] for case in SETTINGS}
    assert names | {"residual"} == {name for name, (kind, _) in METHODS.items() if kind == "added"}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_loss_falls_on_held_out_rows_at_the_methods_own_learning_rate(tmp_path, smollm2, real_data, case):
    run = finetuned(
        tmp_path,
        smollm2,
        real_data / "train" / "dolly_15k.jsonl.gz",
        recipe="adapter",
        peft={"name": case.split()[0], **SETTINGS[case]},
        optimizer={},
        data={"limit": 300, "max_seq_length": 256, "validation": 24},
        train={"max_steps": 16, "batch_size": 8, "eval_every": 16, "samples": 0},
    )
    records = read_metrics(run / "metrics.jsonl")
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    print(case, "validation losses", losses)
    assert losses[-1] < losses[0] - 0.03

"""Every low-rank method lowers SmolLM2-135M's loss on held-out Dolly rows, and merges to the same loss: slow."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.data.batches import validation_batches
from lit_lora.merge import Places, merge, plan_merge
from lit_lora.model import CausalLM
from lit_lora.peft import METHODS
from lit_lora.recipe import load_data, load_recipe
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.run_log import read_metrics
from lit_lora.train.validation import validation_loss
from tests.real.test_learning import finetuned

pytestmark = pytest.mark.slow

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora q,v": {"target_modules": "q,v"},
    "lora rslora": {"use_rslora": True},
    "lora lora+": {"loraplus_lr_ratio": 16.0},
    "lora lora-fa": {"freeze_A": True},
    "lora pissa": {"init": "pissa"},
    "lora olora": {"init": "olora"},
    "lora eva": {"init": "eva"},
    "lora lora-ga": {"init": "lora-ga"},
    "dora": {},
    "multilora": {},
    "longlora": {"factor": 1, "group": 128},  # half of the rows are longer
    "vera": {},
    "tied-lora": {},
    "glora": {},
    "ia3": {},
}
LR = {"lora lora+": 2e-4, "lora pissa": 2e-4, "lora olora": 2e-4, "lora lora-ga": 2e-4}


def test_every_method_that_this_model_can_take_is_tried():
    names = {case.split()[0] for case in SETTINGS}
    assert names | {"bitfit"} == {
        name for name, (kind, _) in METHODS.items() if kind == "mergeable"
    }  # it has no biases


def held_out_loss(folder: Path, model: CausalLM) -> float:
    """On the rows that the run held out."""
    _, settings = load_recipe(folder / "config.yaml", [])
    data = load_data(settings, Tokenizer.load(settings.model.path))
    assert data.prepared.validation is not None
    return validation_loss(model, list(validation_batches(data.prepared.validation, 1024)))


@pytest.mark.parametrize("case", SETTINGS)
def test_the_loss_falls_and_the_merged_model_has_it(tmp_path, smollm2, real_data, case):
    name = case.split()[0]
    own = getattr(peft.methods()[name].model_validate({"name": name, **SETTINGS[case]}), "lr", None)
    run = finetuned(
        tmp_path,
        smollm2,
        real_data / "train" / "dolly_15k.jsonl.gz",
        peft={"name": name, **SETTINGS[case]},
        optimizer={} if own else {"lr": LR.get(case, 1e-3)},
        data={"limit": 200, "max_seq_length": 256, "validation": 12},
        train={"max_steps": 10, "batch_size": 8, "eval_every": 10, "samples": 0},
    )
    records = read_metrics(run / "metrics.jsonl")
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    merge(plan_merge(Places(run / "adapter", smollm2, tmp_path / "merged"), dtype=torch.float32), tmp_path / "merged")
    model = load_model(smollm2, dtype=torch.float32)
    peft.load_adapter(model, run / "adapter")
    beside, merged = (held_out_loss(tmp_path, each) for each in (model, load_model(tmp_path / "merged")))
    shutil.rmtree(tmp_path / "merged")
    print(f"| {case} | {losses[0]:.4f} | {losses[-1]:.4f} | {beside:.5f} | {merged:.5f} |")
    assert losses[-1] < losses[0] - 0.02
    assert merged == pytest.approx(beside, abs=2e-4)
    assert beside == pytest.approx(losses[-1], abs=0.02)  # trained in bfloat16

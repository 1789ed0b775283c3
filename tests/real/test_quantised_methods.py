"""Where methods over a quantised SmolLM2-135M start, on real rows: slow. ``-s`` shows the figures."""

from __future__ import annotations

import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_lora.model import CausalLM
from lit_lora.peft import base_tensors
from lit_lora.peft.base import model_updates, own_modules
from lit_lora.qbase import load_base
from lit_lora.quantize import Quantized, QuantizedLinear, count_quantized, stored_bytes
from lit_lora.recipe import Options, load_data, load_recipe, start
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.loop import validation_loss
from tests.peft.tiny import shake

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenise anew."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def gsm8k(tmp_path: Path, real_data: Path) -> Path:
    """200 questions with their answers."""
    with (real_data / "train" / "gsm8k_test.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 200)]
    pairs = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def started(folder: Path, base: Path, rows: Path, peft: dict[str, Any], **sections: Any) -> tuple[CausalLM, float]:
    """The model as a run starts with it, and its loss on held-out rows."""
    config = {
        "recipe": "qlora",
        "model": {"path": str(base), **sections.pop("model", {})},
        "data": {"path": str(rows), "validation": 16},
        "peft": {"rank": 16, **peft},
        "out": str(folder / "run"),
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    _, settings = load_recipe(path, [])
    run = start(settings, Options(dry_run=True))
    data = load_data(run, Tokenizer.load(settings.model.path))
    began = time.perf_counter()
    made, _ = load_base(run, settings, settings.peft.over(settings.quantize), data)
    seconds = time.perf_counter() - began
    held = sum(stored_bytes(module) for module in made.modules() if isinstance(module, Quantized))
    loss = validation_loss(made, data.validation)
    bits = 8 * held / count_quantized(made)
    print(
        f"\n| {peft['name']} | {sections.get('quantize', '')} | {bits:.3f} | {loss:.4f} | {seconds:.0f} s |", flush=True
    )
    return made, loss


@pytest.mark.parametrize(("name", "bits"), [("nf3", 3.127), ("nf4", 4.127)])
def test_loftq_and_lq_lora_start_below_qlora_at_the_same_bits(
    tmp_path: Path, smollm2: Path, gsm8k: Path, name: str, bits: float
) -> None:
    folders, type_ = (tmp_path, smollm2, gsm8k), {"name": name, "block_size": 64}
    _, qlora = started(*folders, {"name": "lora"}, quantize=type_)
    _, loftq = started(*folders, {"name": "loftq"}, quantize=type_)
    _, lq_lora = started(*folders, {"name": "lq-lora", "iterations": 5, "bits": bits})
    assert loftq < qlora
    assert lq_lora < qlora


def test_weights_from_the_rows_lower_the_start_at_three_bits(tmp_path: Path, smollm2: Path, gsm8k: Path) -> None:
    folders, method = (tmp_path, smollm2, gsm8k), {"name": "lq-lora", "iterations": 2, "bits": 3.127}
    _, plain = started(*folders, method)
    _, weighed = started(*folders, {**method, "fisher_rows": 16})
    assert weighed < plain


def test_qa_lora_merged_gives_the_logits_of_unmerged(tmp_path: Path, smollm2: Path, gsm8k: Path) -> None:
    int4 = {"name": "int4", "block_size": 32}
    model, _ = started(tmp_path, smollm2, gsm8k, {"name": "qa-lora", "rank": 2}, quantize=int4, model={"dtype": "fp32"})
    shake(model, 0.003)
    ids = torch.arange(1000, 1064)[None]
    with torch.no_grad():
        before = model.eval()(ids)
        for name, update in model_updates(model).items():
            layer = model.get_submodule(name.removesuffix(".weight")).base_layer
            assert isinstance(layer, QuantizedLinear)
            merged = layer.quantized.plus(update.left * update.scaling, update.right)
            assert torch.equal(merged.codes, layer.quantized.codes)
            layer.quantized = merged
        for module in own_modules(model).values():
            module.lora_B.zero_()
        after = model(ids)
    most, size = (after - before).abs().max(), before.abs().max()
    print(f"\nQA-LoRA, merged against unmerged: {most:.1e} of logits up to {size:.0f}")
    assert (after - before).abs().max() <= 1e-4
    assert len(base_tensors(model))

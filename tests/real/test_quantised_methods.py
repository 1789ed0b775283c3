"""Where methods over a quantized SmolLM2-135M start, on real rows: slow. ``-s`` shows the figures."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lit_lora.finetune.qlora import Config

from lit_lora.checkpoint import load_model
from lit_lora.data.batches import Batches
from lit_lora.model import CausalLM
from lit_lora.peft import base_tensors, freeze, methods, remove, trainable_state
from lit_lora.peft.core.modules import model_updates, own_modules
from lit_lora.quantize import Quantized, QuantizedLinear, count_quantized, stored_bytes
from lit_lora.recipe import Options, Run, RunData, load_data, load_recipe, start
from lit_lora.recipe.quantized_base import for_quantized_base, load_base
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.config import TrainConfig
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken
from lit_lora.train.optim.build import AdamWConfig
from lit_lora.train.run import TrainingRun
from lit_lora.train.schedule import ScheduleConfig
from lit_lora.train.validation import validation_loss
from tests.peft.tiny import shake

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenize anew."""
    monkeypatch.setenv("LIT_LORA_CACHE", str(tmp_path / "cache"))


def pairs(source: Path, out: Path, count: int) -> Path:
    """The first questions of a file with their answers, as rows."""
    with (gzip.open if source.suffix == ".gz" else open)(source, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, count)]
    found = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    out.write_text("".join(json.dumps(pair) + "\n" for pair in found), encoding="utf-8")
    return out


@pytest.fixture
def gsm8k(tmp_path: Path, real_data: Path) -> Path:
    """200 questions with their answers."""
    return pairs(real_data / "train" / "gsm8k_test.jsonl", tmp_path / "gsm8k.jsonl", 200)


def opened(folder: Path, base: Path, rows: Path, peft: dict[str, Any], **sections: Any) -> tuple[Run, RunData]:
    """A run that writes nothing, and its data."""
    config = {
        "recipe": "qlora",
        "model": {"path": str(base), **sections.pop("model", {})},
        "data": {"path": str(rows), "validation": 16, **sections.pop("data", {})},
        "peft": {"rank": 16, **peft},
        "out": str(folder / "run"),
        **sections,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    config = load_recipe(path, [])[1]
    return start(config, Options(dry_run=True)), load_data(config, Tokenizer.load(base))


def started(*where: Path, peft: dict[str, Any], **sections: Any) -> tuple[CausalLM, RunData, float]:
    """The model as a run starts with it, its data, and its loss on held-out rows."""
    run, data = opened(*where, peft, **sections)
    settings = run.config
    assert isinstance(settings, Config)
    began = time.perf_counter()
    made, _ = load_base(run, settings.quantize, for_quantized_base(settings.peft, settings.quantize), data)
    seconds = time.perf_counter() - began
    held = sum(stored_bytes(module) for module in made.modules() if isinstance(module, Quantized))
    loss = validation_loss(made, data.validation)
    bits = 8 * held / count_quantized(made)
    print(
        f"\n| {peft['name']} | {sections.get('quantize', '')} | {bits:.3f} | {loss:.4f} | {seconds:.0f} s |", flush=True
    )
    return made, data, loss


@pytest.mark.parametrize(("name", "bits"), [("nf3", 3.127), ("nf4", 4.127)])
def test_loftq_and_lq_lora_start_below_qlora_at_the_same_bits(
    tmp_path: Path, smollm2: Path, gsm8k: Path, name: str, bits: float
) -> None:
    folders, type_ = (tmp_path, smollm2, gsm8k), {"name": name, "block_size": 64}
    _, _, qlora = started(*folders, peft={"name": "lora"}, quantize=type_)
    _, _, loftq = started(*folders, peft={"name": "loftq"}, quantize=type_)
    _, _, lq_lora = started(*folders, peft={"name": "lq-lora", "iterations": 5, "bits": bits})
    assert loftq < qlora
    assert lq_lora < qlora


def test_weights_from_the_rows_lower_the_start_at_three_bits(tmp_path: Path, smollm2: Path, gsm8k: Path) -> None:
    folders, method = (tmp_path, smollm2, gsm8k), {"name": "lq-lora", "iterations": 2, "bits": 3.127}
    _, _, plain = started(*folders, peft=method)
    _, _, weighed = started(*folders, peft={**method, "fisher_rows": 16})
    assert weighed < plain


def test_qa_lora_merged_gives_the_logits_of_unmerged(tmp_path: Path, smollm2: Path, gsm8k: Path) -> None:
    int4 = {"name": "int4", "block_size": 32}
    model, _, _ = started(
        tmp_path, smollm2, gsm8k, peft={"name": "qa-lora", "rank": 2}, quantize=int4, model={"dtype": "fp32"}
    )
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


SEEDS, STEPS, ROWS, LONGEST = 3, 12, 4, 160
FINALS: dict[float, dict[str, dict[str, Any]]] = {
    4.127: {
        "LoRA in bf16": {"peft": {"name": "lora"}},
        "QLoRA": {"peft": {"name": "lora"}, "quantize": "nf4-dq"},
        "LoftQ": {"peft": {"name": "loftq"}, "quantize": "nf4-dq"},
        "LQ-LoRA": {"peft": {"name": "lq-lora", "iterations": 5, "bits": 4.127}},
        "LQ-LoRA, fisher_rows 16": {"peft": {"name": "lq-lora", "iterations": 5, "bits": 4.127, "fisher_rows": 16}},
        "QA-LoRA": {"peft": {"name": "qa-lora"}, "quantize": {"name": "int4", "block_size": 32}},
    },
    3.127: {
        "QLoRA": {"peft": {"name": "lora"}, "quantize": "nf3-dq"},
        "LoftQ": {"peft": {"name": "loftq"}, "quantize": "nf3-dq"},
        "LQ-LoRA": {"peft": {"name": "lq-lora", "iterations": 5, "bits": 3.127}},
    },
}


class Trained:
    """One method, trained again and again from its start.

    ``A`` is drawn anew for each seed where it is random; LoftQ's and LQ-LoRA's start is that of the weights.
    """

    def __init__(self, *where: Path, dev: Path, **sections: Any) -> None:
        self.folder, name = where[0], sections["peft"]["name"]
        self.folder.mkdir()
        self.random = name in ("lora", "qa-lora")
        self.method = methods()[name].model_validate({"rank": 16, **sections["peft"]})
        data = {"validation": str(dev), "max_seq_length": LONGEST}
        if name == "lora" and "quantize" not in sections:
            self.data = opened(*where, sections["peft"], data=data)[1]
            self.model = load_model(where[1], dtype=torch.bfloat16)
            self.before = validation_loss(self.model, self.data.validation)
        else:
            self.model, self.data, self.before = started(*where, data=data, **sections)
            self.start = {name: value.clone() for name, value in trainable_state(self.model).items()}

    def final(self, seed: int) -> float:
        """The validation loss after ``STEPS`` steps."""
        torch.manual_seed(seed)
        if self.random:
            remove(self.model)
            freeze(self.model)
            self.method.apply(self.model)
        else:
            with torch.no_grad():
                for name, value in trainable_state(self.model).items():
                    value.copy_(self.start[name])
        batches = Batches(self.data.prepared.train, batch_size=ROWS, micro_batch_tokens=1024, seed=seed)
        run = TrainingRun(
            TrainConfig(max_steps=STEPS, batch_size=ROWS),
            AdamWConfig(lr=4e-4),
            ScheduleConfig(),
            folder=self.folder / f"seed{seed}",
            seed=seed,
        )
        # Without validation rows, the model keeps the weights of the last step.
        fit(run, self.model, replace(self.data, batches=batches, validation=[]), NextToken())
        return validation_loss(self.model, self.data.validation)


@pytest.mark.parametrize("bits", FINALS)
def test_methods_that_start_nearer_end_nearer_over_three_seeds(
    tmp_path: Path, smollm2: Path, real_data: Path, bits: float
) -> None:
    rows = pairs(real_data / "train" / "gsm8k_train.jsonl.gz", tmp_path / "rows.jsonl", 2000)
    dev = pairs(real_data / "train" / "gsm8k_test.jsonl", tmp_path / "dev.jsonl", 96)
    runs = {
        name: Trained(tmp_path / str(place), smollm2, rows, dev=dev, **sections)
        for place, (name, sections) in enumerate(FINALS[bits].items())
    }
    finals: dict[str, list[float]] = {name: [] for name in runs}
    for seed in range(SEEDS):
        for name, run in runs.items():
            finals[name].append(run.final(seed))
            print(f"\n| {bits} | seed {seed} | {name} | {run.before:.4f} | {finals[name][-1]:.4f} |", flush=True)
    means = {name: sum(losses) / SEEDS for name, losses in finals.items()}
    assert means["LoftQ"] < means["QLoRA"]
    assert means["LQ-LoRA"] < means["QLoRA"]

"""A tiny model, tiny rows and one call of the loop, for all tests of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from lit_lora import peft
from lit_lora.data.batches import Batches, MicroBatch, validation_batches
from lit_lora.data.rows import Rows
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.train.config import TrainConfig
from lit_lora.train.loop import FitResult, fit
from lit_lora.train.objectives.base import Objective
from lit_lora.train.objectives.next_token import NextToken
from lit_lora.train.optim import optimizers
from lit_lora.train.optim.base import OptimizerConfig
from lit_lora.train.run import TrainingRun
from lit_lora.train.schedule import ScheduleConfig
from tests.tiny import random_model

VOCABULARY = 61


def tiny_model(dtype: torch.dtype = torch.float32, *, std: float = 0.2, layers: int = 2, wide: int = 1) -> CausalLM:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16 * wide,
        intermediate_size=24 * wide,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4 * wide,
        tie_word_embeddings=True,
    )
    return random_model(config, std=std, seed=1).to(dtype)


def adapted(
    dtype: torch.dtype = torch.float32, *, shaken: bool = False, std: float = 0.2, wide: int = 1, **settings: Any
) -> CausalLM:
    """The model with a LoRA; a shaken one has no zeros in it, so that every tensor has a gradient at once."""
    model = tiny_model(dtype, std=std, wide=wide)
    peft.freeze(model)
    torch.manual_seed(2)
    peft.methods()["lora"].model_validate({"rank": 4, **settings}).apply(model)
    if shaken:
        with torch.no_grad():
            for parameter in peft.trainable_state(model).values():
                parameter.normal_(std=0.1)
    return model


def unfrozen(dtype: torch.dtype = torch.float32, *, wide: int = 1) -> CausalLM:
    """The model for full finetuning."""
    return tiny_model(dtype, std=0.2 / wide**0.5, wide=wide).requires_grad_(True)


def make_rows(count: int = 8, *, seed: int = 0, stride: int = 7, without_targets: tuple[int, ...] = ()) -> Rows:
    """Rows of 4 to 21 tokens of which each follows from the one before; the first third is prompt.

    Who learns the rows of one stride does worse on those of another.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length, start = int(draw.integers(4, 22)), int(draw.integers(VOCABULARY))
        ids = [(start + stride * place) % VOCABULARY for place in range(length)]
        rows.append((ids, [place >= length // 3 and number not in without_targets for place in range(length)]))
    return Rows.from_tokens(rows)


def with_beginning(rows: Rows, beginning: list[int]) -> Rows:
    """The rows behind tokens that all of them begin with."""
    documents = [
        (beginning + row.input_ids.tolist(), [False] * len(beginning) + row.loss_mask.tolist()) for row in rows
    ]
    return Rows.from_tokens(documents)


@dataclass(frozen=True)
class TinyData:
    """Rows as the loop takes them."""

    batches: Batches
    validation: Sequence[MicroBatch]
    validation_fingerprint: str | None


def train(
    model: CausalLM,
    folder: Path,
    *,
    rows: Rows | None = None,
    batches: Batches | None = None,
    validation: Rows | None = None,
    sample: Callable[[int], None] = lambda _: None,
    optimizer: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    resume: bool = False,
    seed: int = 0,
    lr_factors: dict[str, float] | None = None,
    objective: Objective | None = None,
    **settings: Any,
) -> FitResult:
    """One call of the loop in ``folder``; ``settings`` are those of the ``train`` section."""
    config = TrainConfig(**{"batch_size": 4, "micro_batch_tokens": 48, **settings})
    portions = batches or Batches(
        rows or make_rows(), batch_size=config.batch_size, micro_batch_tokens=config.micro_batch_tokens, seed=0
    )
    run = TrainingRun(
        config,
        optimizer_config(**{"lr": 1e-2, **(optimizer or {})}),
        ScheduleConfig(**(schedule or {})),
        folder,
        seed,
        resume,
    )
    held_out = list(validation_batches(validation, config.micro_batch_tokens)) if validation else []
    data = TinyData(portions, held_out, validation.fingerprint if validation else None)
    return fit(run, model, data, objective or NextToken(), lr_factors=lr_factors, sample=sample)


def optimizer_config(name: str = "adamw", **settings: Any) -> OptimizerConfig:
    """The settings of one optimizer of the table."""
    return optimizers()[name](name=name, **settings)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without what the clock says."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: v for key, v in json.loads(line).items() if key != "tokens_per_second"} for line in lines]


def losses(folder: Path) -> list[float]:
    """The training losses of a run."""
    return [record["loss"] for record in metrics(folder) if "loss" in record]


def checkpoints(folder: Path) -> list[int]:
    """The steps of which a run keeps a checkpoint."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def stored(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint: masters and moments."""
    place = folder / "checkpoints" / f"step-{step:08d}"
    return load_file(place / "trainable.safetensors") | load_file(place / "optimizer.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

"""Step time of the low-rank methods over plain LoRA's on SmolLM2-135M: slow; ``-s`` shows it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.data.batches import MicroBatch
from lit_lora.recipe.method import passes
from lit_lora.train.device import reuse_memory
from lit_lora.train.loss import backward
from lit_lora.train.optim.build import AdamWConfig, build_optimizer
from lit_lora.train.optim.master_weights import MasterWeights
from tests.peft.tiny import put_on

pytestmark = pytest.mark.slow

# Settings, and the most that a step may take of plain LoRA's.
METHODS: dict[str, tuple[dict[str, Any], float | None]] = {
    "lora": ({"name": "lora"}, None),
    "rslora": ({"name": "lora", "use_rslora": True}, 1.1),
    "lora-fa": ({"name": "lora", "freeze_A": True}, 1.1),
    "pissa": ({"name": "lora", "init": "pissa"}, 1.1),
    "olora": ({"name": "lora", "init": "olora"}, 1.1),
    "eva": ({"name": "lora", "init": "eva"}, 1.1),
    "multilora, n = 1": ({"name": "multilora", "updates": 1}, 1.1),
    "multilora": ({"name": "multilora"}, None),
    "dora": ({"name": "dora"}, 1.5),
    "tied-lora": ({"name": "tied-lora"}, None),
    "vera": ({"name": "vera"}, None),
    "ia3": ({"name": "ia3"}, None),
    "glora": ({"name": "glora"}, None),
}
ROUNDS, LENGTHS = 7, [216] * 4


def batch() -> MicroBatch:
    """864 tokens in four documents, the second half of each learned."""
    ids = torch.randint(0, 49_152, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    place = torch.arange(sum(LENGTHS)) % LENGTHS[0]
    labels = torch.where((place >= LENGTHS[0] // 2) & (place < LENGTHS[0] - 1), ids.roll(-1, 1), -100)
    return MicroBatch(ids, labels, LENGTHS, [0, 1, 2, 3])


class Trained:
    """A model that makes whole steps by a method."""

    def __init__(self, folder: Any, settings: dict[str, Any]) -> None:
        self.model = load_model(folder, dtype=torch.bfloat16)
        peft.freeze(self.model)
        method = peft.methods()[settings["name"]].model_validate(settings)
        put_on(self.model, method, passes(self.model, [batch()]))
        self.model.train()
        self.master_weights = MasterWeights(self.model)
        self.optimizer = build_optimizer(AdamWConfig(lr=1e-6), self.master_weights)

    def step(self, rows: MicroBatch) -> float:
        began = time.perf_counter()
        backward(self.model, rows, 1 / rows.target_count)
        self.optimizer.step()
        self.master_weights.copy_to_model()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began


def test_step_times_stay_near_that_of_plain_lora(smollm2):
    reuse_memory()
    rows = batch()
    trained = {name: Trained(smollm2, settings) for name, (settings, _) in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for number in range(ROUNDS + 1):
        for name, one in trained.items():
            took = one.step(rows)
            if number:  # the first compiles products
                seconds[name].append(took)
    # Methods take turns, so that what else the machine does falls on all: a round's ratio, and the median of rounds.
    ratios = {
        name: statistics.median(mine / lora for mine, lora in zip(times, seconds["lora"], strict=True))
        for name, times in seconds.items()
    }
    for name, ratio in ratios.items():
        most = METHODS[name][1]
        print(
            f"\n| {name} | {min(seconds[name]):.3f} | {ratio:.2f} | {'' if most is None else f'{most:.2f}'} |", end=""
        )
    slow = {name: round(ratio, 3) for name, ratio in ratios.items() if ratio > (METHODS[name][1] or 99)}
    assert not slow

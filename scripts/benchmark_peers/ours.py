"""lit-lora: its model, its LoRA and its training loop, as the recipe joins them.

Variants: ``dtype`` of the base weights; ``micro_batch_tokens``; ``activation_checkpointing``; ``quantize``, such as
nf4-dq.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from harness import Clock, Orders, Recorder, Row, lora_a_start, read_orders

from lit_lora.checkpoint.load import load_model
from lit_lora.data.batches import Batches, MicroBatch, validation_batches
from lit_lora.data.rows import EncodedRow, Rows, Status, TokenTable, record_batch
from lit_lora.peft import freeze
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.quantize.config import parse
from lit_lora.train.config import TrainConfig
from lit_lora.train.device import choose_device
from lit_lora.train.loop import fit
from lit_lora.train.objectives.next_token import NextToken
from lit_lora.train.optim.build import AdamWConfig
from lit_lora.train.run import TrainingRun
from lit_lora.train.schedule import ScheduleConfig
from lit_lora.train.validation import validation_loss

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class OrderedBatches(Batches):
    """The rows of the orders, step by step; notes the time at which the loop asks for each step.

    Args:
        orders: The orders.
        after: Called when all steps of the orders are done.
    """

    def __init__(self, orders: Orders, after: Callable[[], None]) -> None:
        self.sizes, self.after = [len(step) for step in orders.steps], after
        rows = kept_rows([row for step in orders.steps for row in step])
        budget = orders.variant["micro_batch_tokens"]
        super().__init__(
            rows, batch_size=max(self.sizes), micro_batch_tokens=budget, seed=0, shared_prefix=rows.shared_prefix
        )
        self.clocks: list[Clock] = []

    def row_indices(self, step: int) -> np.ndarray:
        """The rows of ``step``, in the order of the orders; the step after the last repeats the first."""
        step %= len(self.sizes)
        start = sum(self.sizes[:step])
        return np.arange(start, start + self.sizes[step])

    def step(self, step: int) -> list[MicroBatch]:
        """Note the time, then portion the rows of ``step``."""
        self.clocks.append(Clock())
        if step == len(self.sizes):
            self.after()
        return super().step(step)


@dataclass(frozen=True)
class OrderedData:
    """The rows as the loop takes them; it is not to validate, which would be timed with the steps."""

    batches: OrderedBatches
    validation: tuple[MicroBatch, ...] = ()
    validation_fingerprint: None = None


def kept_rows(rows: list[Row]) -> Rows:
    """Rows as prepared data."""
    encoded = [
        EncodedRow(
            ids=row.ids,
            loss_mask=[position >= row.prompt for position in range(len(row.ids))],
            status=Status.KEPT,
            length=len(row.ids),
            file="benchmark",
            line=number,
        )
        for number, row in enumerate(rows, start=1)
    ]
    return TokenTable([record_batch(encoded)]).kept()


def main() -> None:
    """Train as ordered and write the record."""
    orders = read_orders()
    name = orders.variant.get("quantize")
    quantize = parse(name, option="quantize") if name else None
    model = load_model(
        orders.model, dtype=DTYPES[orders.variant["dtype"]], quantize=quantize, device=choose_device(orders.device)
    )
    freeze(model)
    method = LoRAConfig(rank=orders.rank, alpha=orders.alpha, target_modules="all-linear")
    method.apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".lora_A"):
            parameter.data.copy_(lora_a_start(name.removesuffix(".lora_A"), *parameter.shape))
    model.checkpoint_activations(orders.variant["activation_checkpointing"])
    recorder = Recorder(orders, packages=("lit-lora",))

    def validate() -> None:
        if orders.validation:
            held_out = list(validation_batches(kept_rows(orders.validation), batches.micro_batch_tokens))
            recorder.extra["validation_loss"] = validation_loss(model, held_out)

    batches = OrderedBatches(orders, validate)
    # One step more than ordered: a step ends where the loop asks for the next one, all bookkeeping included.
    steps = len(orders.steps) + 1
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(
            TrainConfig(
                max_steps=steps,
                save_every=steps,
                micro_batch_tokens=batches.micro_batch_tokens,
                max_grad_norm=1e9,  # no contender clips
            ),
            AdamWConfig(lr=orders.learning_rate),
            ScheduleConfig(name="constant", warmup=0),
            Path(folder),
        )
        fit(run, model, OrderedData(batches), NextToken(graph_safe=method.graph_safe))
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    recorder.extra["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for rows, start, end, loss in zip(orders.steps, batches.clocks, batches.clocks[1:], losses, strict=False):
        recorder.add(
            seconds=end.wall - start.wall,
            cpu_seconds=end.cpu - start.cpu,
            tokens=sum(len(row.ids) for row in rows),
            targets=sum(row.targets for row in rows),
            loss=loss,
        )
    recorder.finish()


if __name__ == "__main__":
    main()

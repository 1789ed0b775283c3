"""What every contender of the benchmark shares: its orders, the rows, the LoRA start values, the clock.

The runners beside this file are executed by path, each by the Python of its contender's own virtual environment, so
this module needs nothing but PyTorch and the standard library.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["IGNORE_INDEX", "Clock", "Orders", "Recorder", "Row", "lora_a_start", "micro_batches", "pad", "read_orders"]

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Row:
    """One training row: its token ids, of which the first ``prompt`` are not learned."""

    ids: list[int]
    prompt: int

    @property
    def labels(self) -> list[int]:
        """The ids with ``IGNORE_INDEX`` over the prompt; not shifted."""
        return [IGNORE_INDEX] * self.prompt + self.ids[self.prompt :]

    @property
    def targets(self) -> int:
        """How many tokens of the row are learned."""
        return len(self.ids) - self.prompt


@dataclass(frozen=True)
class Orders:
    """What one run has to do, as the benchmark wrote it."""

    variant: dict[str, Any]
    model: Path
    steps: list[list[Row]]
    validation: list[Row]
    warmup: int
    rank: int
    alpha: int
    learning_rate: float
    device: str
    """cpu or cuda."""
    out: Path


class Clock:
    """Wall time and the process's processor time (which a busy machine disturbs less) since it was made.

    A GPU has then done all that it was given.
    """

    def __init__(self) -> None:
        wait()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """``seconds`` and ``cpu_seconds``."""
        wait()
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def wait() -> None:
    """For a GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass
class Recorder:
    """Collects what a run reports; ``finish`` writes it."""

    orders: Orders
    packages: Sequence[str]
    steps: list[dict[str, float]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def add(self, *, seconds: float, cpu_seconds: float, tokens: int, targets: int, loss: float) -> None:
        """Add one step: ``tokens`` counts prompt and answer without padding, ``loss`` is per target token."""
        self.steps.append(
            {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens, "targets": targets, "loss": loss}
        )

    def run(self, train_step: Callable[[list[Row]], float]) -> None:
        """Do every step of the orders by ``train_step``, which returns the step's loss per target token."""
        for rows in self.orders.steps:
            clock = Clock()
            loss = train_step(rows)
            self.add(
                **clock.read(),
                tokens=sum(len(row.ids) for row in rows),
                targets=sum(row.targets for row in rows),
                loss=loss,
            )

    def finish(self) -> None:
        """Write the record to the file that the orders name."""
        record = {
            "versions": {name: metadata.version(name) for name in ("torch", *self.packages)},
            "threads": torch.get_num_threads(),
            "steps": self.steps,
            **self.extra,
        }
        if torch.cuda.is_initialized():
            record["gpu_allocated_bytes"] = torch.cuda.max_memory_allocated()
            record["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved()
        self.orders.out.write_text(json.dumps(record), encoding="utf-8")


def read_orders() -> Orders:
    """The orders in the JSON file that the first argument names; sets the number of threads and the seed."""
    orders = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(orders["threads"])
    torch.manual_seed(0)
    rows = json.loads(Path(orders["rows"]).read_text(encoding="utf-8"))
    steps = [[Row(**row) for row in step] for step in rows["steps"]]
    if orders["variant"].get("group") == "length":
        steps = grouped(steps, orders["warmup"])
    return Orders(
        variant=orders["variant"],
        model=Path(orders["model"]),
        steps=steps,
        validation=[Row(**row) for row in rows["validation"]],
        warmup=orders["warmup"],
        rank=orders["rank"],
        alpha=orders["alpha"],
        learning_rate=orders["learning_rate"],
        device=orders["device"],
        out=Path(orders["out"]),
    )


def grouped(steps: list[list[Row]], warmup: int) -> list[list[Row]]:
    """The same rows in steps of like lengths (within the warm-up and within the timed steps), to spare padding."""
    result: list[list[Row]] = []
    for part in (steps[:warmup], steps[warmup:]):
        rows = sorted((row for step in part for row in step), key=lambda row: -len(row.ids))
        for step in part:
            result.append([rows.pop(0) for _ in step])
    return result


def micro_batches(rows: list[Row], size: int) -> list[list[Row]]:
    """A step's rows in micro-batches of ``size``, the longest rows together, so that little is padded."""
    rows = sorted(rows, key=lambda row: -len(row.ids))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def pad(rows: list[Row], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Rows as one padded batch on the CPU: ``input_ids``, ``attention_mask`` and ``labels``, each (B, T) int64."""
    width = max(len(row.ids) for row in rows)
    fill = [width - len(row.ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.ids + [pad_id] * n for row, n in zip(rows, fill, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(row.ids) + [0] * n for row, n in zip(rows, fill, strict=True)]),
        "labels": torch.tensor([row.labels + [IGNORE_INDEX] * n for row, n in zip(rows, fill, strict=True)]),
    }


def lora_a_start(name: str, rank: int, in_features: int) -> torch.Tensor:
    """LoRA's A of one linear layer, (R, D) float32: the same in every contender, so that their losses can be compared.

    Args:
        name: The layer's Hugging Face name, such as ``model.layers.0.mlp.up_proj``.
        rank: R.
        in_features: D. The values are uniform within plus or minus ``1 / sqrt(D)``, as all contenders draw them.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.rand(rank, in_features, generator=generator) * 2 - 1).div(in_features**0.5)

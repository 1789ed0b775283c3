"""What the loop is told: the settings of a run with its folder, and its rows in micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lit_lora.train.config import TrainConfig
from lit_lora.train.objectives.base import Batch, Batches
from lit_lora.train.optim.base import OptimizerConfig
from lit_lora.train.schedule import ScheduleConfig

__all__ = ["TrainingData", "TrainingRun"]


@dataclass(frozen=True)
class TrainingRun:
    """How a run trains, and where it writes."""

    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    folder: Path
    """The run folder: checkpoints, ``metrics.jsonl`` and ``loss.png`` are written into it."""
    seed: int = 0
    """Seeds dropout."""
    resume: bool = False
    """Continue after the newest checkpoint in ``folder``."""


class TrainingData(Protocol):
    """The rows of a run."""

    @property
    def batches(self) -> Batches:
        """Micro-batches of the training rows, step by step."""

    @property
    def validation(self) -> Sequence[Batch]:
        """Micro-batches of the validation rows; empty without such rows."""

    @property
    def validation_fingerprint(self) -> str | None:
        """Equal for equal validation rows in the same order; ``None`` without such rows."""

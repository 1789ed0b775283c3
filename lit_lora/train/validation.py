"""The loss and metrics of validation rows, with the model's mode left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_lora import log
from lit_lora.errors import UsageError
from lit_lora.train.config import TrainConfig
from lit_lora.train.objectives.base import Batch, Objective
from lit_lora.train.objectives.next_token import NextToken

__all__ = ["check_best_metric", "validate", "validation_loss"]


def check_best_metric(config: TrainConfig, objective: Objective) -> None:
    """Check that the run measures the metric which selects the best weights.

    Raises:
        UsageError: It does not.
    """
    measured = ("loss", *objective.metrics)
    if config.best_metric not in measured:
        expected = ", ".join(measured)
        raise UsageError(f"train.best_metric: {config.best_metric!r} is not measured in this run, expected: {expected}")


def validate(model: Any, batches: Sequence[Batch], objective: Objective) -> dict[str, float]:
    """The mean ``loss`` and the objective's metrics over all ``batches``; leaves the model's mode as it was."""
    training = model.training
    model.eval()
    metrics = objective.validate(model, log.progress(batches, what="validating", unit="batch"))
    model.train(training)
    return metrics


def validation_loss(model: Any, batches: Sequence[Batch]) -> float:
    """Mean loss per target token over all ``batches``, however they are split; leaves the model's mode as it was."""
    return validate(model, batches, NextToken())["loss"]

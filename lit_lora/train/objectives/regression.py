"""Regression: a number for each row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from lit_lora.train.objectives.labeled import LabeledBatch, logits_of
from lit_lora.train.objectives.metrics import pearson, spearman

__all__ = ["Regression"]


class Regression:
    """Squared error of a number, averaged over rows; the number is the model's only logit."""

    unit: ClassVar[str] = "row"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")

    def count(self, batch: LabeledBatch) -> int:
        """Rows."""
        return len(batch.labels)

    def backward(self, model: Any, batch: LabeledBatch, scale: float) -> float:
        """Add the gradients of ``scale * sum of losses``; returns the sum."""
        logits, numbers = logits_of(model, batch)
        loss = F.mse_loss(logits[:, 0].float(), numbers, reduction="sum")
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, model: Any, batches: Iterable[LabeledBatch]) -> dict[str, float]:
        """Mean loss; correlation of the numbers, and of their ranks."""
        parts = [logits_of(model, batch) for batch in batches]
        logits, numbers = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        predicted = logits[:, 0].float()

        return {
            "loss": float(F.mse_loss(predicted, numbers)),
            "pearson": pearson(predicted.numpy(), numbers.numpy()),
            "spearman": spearman(predicted.numpy(), numbers.numpy()),
        }

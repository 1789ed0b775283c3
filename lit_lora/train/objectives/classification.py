"""Classification of rows: one of some names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from lit_lora.train.objectives.labeled import LabeledBatch, logits_of
from lit_lora.train.objectives.metrics import accuracy, f1, matthews

__all__ = ["Classification"]


class Classification:
    """Cross entropy of the right label, averaged over rows; the labels are as many as the model's logits."""

    unit: ClassVar[str] = "row"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "matthews")

    def count(self, batch: LabeledBatch) -> int:
        """Rows."""
        return len(batch.labels)

    def backward(self, model: Any, batch: LabeledBatch, scale: float) -> float:
        """Add the gradients of ``scale * sum of losses``; returns the sum."""
        logits, labels = logits_of(model, batch)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, model: Any, batches: Iterable[LabeledBatch]) -> dict[str, float]:
        """Mean loss; share of right rows, F1 and Matthews' correlation."""
        parts = [logits_of(model, batch) for batch in batches]
        logits, labels = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        predicted, true = logits.argmax(1).numpy(), labels.numpy()
        label_count = logits.shape[1]

        return {
            "loss": float(F.cross_entropy(logits.float(), labels)),
            "accuracy": accuracy(predicted, true),
            "f1": f1(predicted, true, label_count),
            "matthews": matthews(predicted, true, label_count),
        }

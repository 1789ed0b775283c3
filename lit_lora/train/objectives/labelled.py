"""Objectives of rows with labels: one of some names, a number, or a text to write.

Their models are called with a batch's ``inputs`` and give ``logits``: (B, labels), or (B, U, V) of a decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora import IGNORE_INDEX
from lit_lora.train.loss import cross_entropy_backward, cross_entropy_sum
from lit_lora.train.objectives.metrics import accuracy, f1, matthews, pearson, spearman

__all__ = ["Classification", "Inputs", "Regression", "Seq2Seq", "logits_of"]


class Inputs(Protocol):
    """A batch of such rows."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What the model is called with."""

    @property
    def labels(self) -> Tensor:
        """(B,) ids or numbers; (B, U) token ids or ``IGNORE_INDEX`` of texts."""


def logits_of(model: Any, batch: Inputs) -> tuple[Tensor, Tensor]:
    """The model's logits and the labels, on its device."""
    device = next(iter(model.parameters())).device
    logits: Tensor = model(**{name: value.to(device) for name, value in batch.inputs.items()}).logits
    return logits, batch.labels.to(device)


class Classification:
    """Cross entropy of the right label, averaged over rows.

    Args:
        labels: How many there are.
    """

    unit: ClassVar[str] = "row"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1", "matthews")

    def __init__(self, labels: int) -> None:
        self.labels = labels

    def count(self, batch: Inputs) -> int:
        """Rows."""
        return len(batch.labels)

    def backward(self, model: Any, batch: Inputs, scale: float) -> float:
        """Add the gradients of ``scale * sum of losses``; returns the sum."""
        logits, labels = logits_of(model, batch)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, model: Any, batches: Iterable[Inputs]) -> dict[str, float]:
        """Mean loss; share of right rows, F1 and Matthews' correlation."""
        parts = [logits_of(model, batch) for batch in batches]
        logits, labels = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        predicted, true = logits.argmax(1).numpy(), labels.numpy()
        return {
            "loss": float(F.cross_entropy(logits.float(), labels)),
            "accuracy": accuracy(predicted, true),
            "f1": f1(predicted, true, self.labels),
            "matthews": matthews(predicted, true, self.labels),
        }


class Regression:
    """Squared error of a number, averaged over rows."""

    unit: ClassVar[str] = "row"
    metrics: ClassVar[tuple[str, ...]] = ("pearson", "spearman")

    def count(self, batch: Inputs) -> int:
        """Rows."""
        return len(batch.labels)

    def backward(self, model: Any, batch: Inputs, scale: float) -> float:
        """Add the gradients of ``scale * sum of losses``; returns the sum."""
        logits, numbers = logits_of(model, batch)
        loss = F.mse_loss(logits[:, 0].float(), numbers, reduction="sum")
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, model: Any, batches: Iterable[Inputs]) -> dict[str, float]:
        """Mean loss; correlation of the numbers, and of their ranks."""
        parts = [logits_of(model, batch) for batch in batches]
        logits, numbers = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        predicted = logits[:, 0].float()
        return {
            "loss": float(F.mse_loss(predicted, numbers)),
            "pearson": pearson(predicted.numpy(), numbers.numpy()),
            "spearman": spearman(predicted.numpy(), numbers.numpy()),
        }


class Seq2Seq:
    """Cross entropy of a text's tokens, each from the input and the tokens before it, averaged over tokens.

    A row is exactly right when every token is the likeliest: then greedy decoding writes this very text.
    """

    unit: ClassVar[str] = "target token"
    metrics: ClassVar[tuple[str, ...]] = ("exact_match",)

    def count(self, batch: Inputs) -> int:
        """Target tokens."""
        return int((batch.labels != IGNORE_INDEX).sum())

    def backward(self, model: Any, batch: Inputs, scale: float) -> float:
        """Add the gradients of ``scale * sum of losses``; returns the sum."""
        logits, labels = logits_of(model, batch)
        return float(cross_entropy_backward(logits.flatten(0, 1), labels.flatten(), scale))

    @torch.no_grad()
    def validate(self, model: Any, batches: Iterable[Inputs]) -> dict[str, float]:
        """Mean loss; share of rows that are exactly right."""
        total, count, right, rows = 0.0, 0, 0, 0
        for batch in batches:
            logits, labels = logits_of(model, batch)
            wrong = (logits.argmax(-1) != labels) & (labels != IGNORE_INDEX)
            right, rows = right + int((~wrong.any(1)).sum()), rows + len(labels)
            total += float(cross_entropy_sum(logits.flatten(0, 1), labels.flatten()))
            count += self.count(batch)
        return {"loss": total / max(count, 1), "exact_match": right / max(rows, 1)}

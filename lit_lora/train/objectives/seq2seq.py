"""Texts to write, by an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from lit_lora import IGNORE_INDEX
from lit_lora.train.loss import cross_entropy_backward, cross_entropy_sum
from lit_lora.train.objectives.labeled import LabeledBatch, logits_of

__all__ = ["Seq2Seq"]


class Seq2Seq:
    """Cross entropy of a text's tokens, each from the input and the tokens before it, averaged over tokens.

    A row is exactly right when every token is the likeliest: then greedy decoding writes this very text.
    """

    unit: ClassVar[str] = "target token"
    metrics: ClassVar[tuple[str, ...]] = ("exact_match",)

    def count(self, batch: LabeledBatch) -> int:
        """Target tokens."""
        return int((batch.labels != IGNORE_INDEX).sum())

    def backward(self, model: Any, batch: LabeledBatch, scale: float) -> float:
        """Add the gradients of ``scale * sum of losses``; returns the sum."""
        logits, labels = logits_of(model, batch)
        return float(cross_entropy_backward(logits.flatten(0, 1), labels.flatten(), scale))

    @torch.no_grad()
    def validate(self, model: Any, batches: Iterable[LabeledBatch]) -> dict[str, float]:
        """Mean loss; share of rows that are exactly right."""
        loss, targets = 0.0, 0
        exact_rows, rows = 0, 0
        for batch in batches:
            logits, labels = logits_of(model, batch)
            wrong = (logits.argmax(-1) != labels) & (labels != IGNORE_INDEX)
            exact_rows += int((~wrong.any(1)).sum())
            rows += len(labels)

            # Last, because the loss uses the logits up.
            loss += float(cross_entropy_sum(logits.flatten(0, 1), labels.flatten()))
            targets += self.count(batch)
        return {"loss": loss / max(targets, 1), "exact_match": exact_rows / max(rows, 1)}

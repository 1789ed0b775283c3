"""Rows with labels, as their objectives see them: one of some names, a number, or a text to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["LabeledBatch", "logits_of"]


class LabeledBatch(Protocol):
    """Rows with labels that are computed at once."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What the model is called with."""

    @property
    def labels(self) -> Tensor:
        """(B,) ids or numbers; (B, U) token ids or ``IGNORE_INDEX`` of texts."""


def logits_of(model: Any, batch: LabeledBatch) -> tuple[Tensor, Tensor]:
    """The model's logits, (B, labels) or (B, U, V) of a decoder, and the batch's labels on the model's device."""
    device = next(iter(model.parameters())).device
    inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
    logits: Tensor = model(**inputs).logits
    return logits, batch.labels.to(device)

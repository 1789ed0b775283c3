"""Next-token prediction, the objective of decoders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from lit_lora import IGNORE_INDEX
from lit_lora.train.cuda_graphs import GraphRunner
from lit_lora.train.loss import backward, evaluate

__all__ = ["NextToken"]


class NextToken:
    """Every target token is predicted from those before it; batches are those of :mod:`lit_lora.train.loss`.

    Args:
        graph_safe: Every step does the same operations on the model, so that a GPU may replay them as a CUDA graph.
    """

    unit: ClassVar[str] = "target token"
    metrics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, graph_safe: bool = False) -> None:
        self._backward = GraphRunner().backward if graph_safe else backward

    def count(self, batch: Any) -> int:
        """Target tokens."""
        return int((batch.labels != IGNORE_INDEX).sum())

    def backward(self, model: Any, batch: Any, scale: float) -> Tensor | float:
        """See :func:`lit_lora.train.loss.backward`."""
        return self._backward(model, batch, scale)

    def validate(self, model: Any, batches: Iterable[Any]) -> dict[str, float]:
        """The mean loss per target token, as ``loss``."""
        results = [evaluate(model, batch) for batch in batches]
        total = sum(loss for loss, _ in results)
        targets = sum(count for _, count in results)
        return {"loss": total / max(targets, 1)}

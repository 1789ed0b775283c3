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
    """Every learned token is predicted from those before it; the batches are those of :mod:`lit_lora.train.loss`.

    Args:
        graph_safe: Every step does the same operations on the model, so that a GPU's may be recorded and repeated.
    """

    unit: ClassVar[str] = "learned token"
    metrics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *, graph_safe: bool = False) -> None:
        self._backward = GraphRunner().backward if graph_safe else backward

    def count(self, batch: Any) -> int:
        """Learned tokens."""
        return int((batch.labels != IGNORE_INDEX).sum())

    def backward(self, model: Any, batch: Any, scale: float) -> Tensor | float:
        """See :func:`lit_lora.train.loss.backward`."""
        return self._backward(model, batch, scale)

    def validate(self, model: Any, batches: Iterable[Any]) -> dict[str, float]:
        """The mean loss per learned token, as ``loss``."""
        losses = [evaluate(model, batch) for batch in batches]
        return {"loss": sum(loss for loss, _ in losses) / max(sum(count for _, count in losses), 1)}

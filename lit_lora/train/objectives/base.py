"""What a run minimizes and measures: the seam between the loop and what a model's outputs mean.

The loop knows steps, gradients and checkpoints; an objective knows what is in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

__all__ = ["Batch", "Batches", "Objective", "Row", "Rows"]


class Row(Protocol):
    """A training row, as far as the loop is concerned."""

    @property
    def source(self) -> str:
        """Where it was read, such as ``file:line``."""


class Rows(Protocol):
    """The training rows."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal rows in the same order."""

    def __getitem__(self, i: int) -> Row:
        """Row ``i``."""


class Batch(Protocol):
    """A micro-batch, as far as the loop is concerned."""

    @property
    def lengths(self) -> list[int]:
        """Tokens per row, without padding."""

    @property
    def rows(self) -> list[int]:
        """Index in the dataset of each row."""


class Batches(Protocol):
    """The training rows in micro-batches, which are a pure function of the step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit each row once."""

    @property
    def rows(self) -> Rows:
        """All training rows."""

    def step(self, step: int) -> Sequence[Batch]:
        """The micro-batches of one optimizer step."""


class Objective(Protocol):
    """A loss that is a sum over units (tokens, rows), and the metrics of a validation."""

    unit: ClassVar[str]
    """What the loss is a mean over, such as ``target token`` or ``row``."""
    metrics: ClassVar[tuple[str, ...]]
    """What :meth:`validate` measures beside the loss; of each, more is better."""

    def count(self, batch: Any) -> int:
        """Units in a micro-batch."""

    def backward(self, model: Any, batch: Any, scale: float) -> Tensor | float:
        """Add the gradients of ``scale * sum of losses`` to the parameters' ``.grad``; returns the unscaled sum.

        The sum is a scalar tensor where reading the number would make the CPU wait for a GPU.
        """

    def validate(self, model: Any, batches: Iterable[Any]) -> dict[str, float]:
        """The mean loss per unit as ``loss``, and the metrics, over all ``batches``, however they are split."""

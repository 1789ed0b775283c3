"""What a run minimises and measures: the seam between the loop and what a model's outputs mean.

The loop knows steps, gradients and checkpoints; an objective knows what is in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

__all__ = ["Batch", "Batches", "Objective", "Row", "Rows"]


class Row(Protocol):
    """A training row, as far as the loop looks into it."""

    @property
    def source(self) -> str:
        """Where it came from, such as ``file:line``."""


class Rows(Protocol):
    """The training rows."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal rows in the same order."""

    def __getitem__(self, i: int) -> Row:
        """Row ``i``."""


class Batch(Protocol):
    """Rows that are computed at once, as far as the loop looks into them."""

    @property
    def lengths(self) -> list[int]:
        """Tokens per row, without padding."""

    @property
    def rows(self) -> list[int]:
        """Position in the dataset of each."""


class Batches(Protocol):
    """The training rows, portioned: a pure function of the step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit each row once."""

    @property
    def rows(self) -> Rows:
        """What is portioned."""

    def step(self, step: int) -> Sequence[Batch]:
        """The micro-batches of one optimizer step."""


class Objective(Protocol):
    """A loss that is a sum over units (tokens, rows), and the figures of a validation."""

    unit: ClassVar[str]
    """What the loss is divided by the number of, in one word or two."""
    metrics: ClassVar[tuple[str, ...]]
    """What :meth:`validate` measures beside the loss; of each, more is better."""

    def count(self, batch: Any) -> int:
        """Units in a micro-batch."""

    def backward(self, model: Any, batch: Any, scale: float) -> Tensor | float:
        """Add the gradients of ``scale * sum of losses`` to the parameters' ``.grad``; returns the unscaled sum.

        A scalar tensor where reading the number would make the CPU wait for a GPU.
        """

    def validate(self, model: Any, batches: Iterable[Any]) -> dict[str, float]:
        """The mean loss per unit as ``loss``, and the figures, over all ``batches``, however rows are portioned."""

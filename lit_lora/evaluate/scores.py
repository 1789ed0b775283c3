"""What a task measures: a number, and how certain it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LossScore", "Metric", "Share"]

Z = 1.959964  # 95 % of a normal distribution lies within this many standard deviations of its mean


@dataclass(frozen=True)
class Share:
    """How many of the rows are right."""

    right: int
    total: int

    @property
    def value(self) -> float:
        """0 to 1; 0 when there are no rows."""
        return self.right / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the share in the population that the rows were drawn from.

        Source: Wilson 1927. Unlike value ± 2 standard errors it stays within 0 and 1, and it is correct near them.
        """
        if not self.total:
            return 0.0, 1.0
        share = self.value
        spread = Z * Z / self.total
        middle = share + spread / 2
        half = Z * math.sqrt(share * (1 - share) / self.total + spread / (4 * self.total))
        low = (middle - half) / (1 + spread)
        high = (middle + half) / (1 + spread)
        return max(0.0, low), min(1.0, high)  # rounding may have taken them beyond

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{100 * low:.1f}–{100 * high:.1f}]"


@dataclass(frozen=True)
class LossScore:
    """Mean cross entropy over the target tokens of all rows."""

    loss: float
    """Nats per token."""
    tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Metric:
    """One line of a comparison: a share of rows, or a plain number."""

    name: str
    value: Share | float
    why: str = ""
    """What exactly is measured, where the name does not say so."""

    def __str__(self) -> str:
        return str(self.value) if isinstance(self.value, Share) else f"{self.value:.4g}"

    def to_json(self) -> dict[str, float | int | list[float]]:
        """The value, and for a share its rows and interval."""
        if not isinstance(self.value, Share):
            return {"value": self.value}
        return {
            "value": self.value.value,
            "right": self.value.right,
            "rows": self.value.total,
            "interval": [round(end, 4) for end in self.value.interval],
        }

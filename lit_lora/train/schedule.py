"""The learning rate as a pure function of the step, so that a resumed run needs no state of a schedule."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from lit_lora.config import Settings

__all__ = ["ScheduleConfig"]


class ScheduleConfig(Settings):
    """How the learning rate moves over the run."""

    name: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape of the decay after the warm-up.")
    warmup: float = Field(
        0.03,
        ge=0,
        description="Length of the linear warm-up: a fraction of all steps if below 1, else a number of steps. At most "
        "half of the run, so that the peak is always reached.",
    )
    min_ratio: float = Field(0.0, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")

    def asked_steps(self, total_steps: int) -> int:
        """Steps of warm-up as the setting gives them."""
        return round(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``: :meth:`asked_steps`, but at most half of the run."""
        return min(self.asked_steps(total_steps), total_steps // 2)

    def factor(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate in ``step`` (0-based) of ``total_steps``; never 0 in the first step."""
        warmup = self.warmup_steps(total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)  # from above 0 to just below the peak
        if self.name == "constant":
            return 1.0

        # The end of the decay is one step after the last, so that the last step still changes something.
        progress = (step - warmup) / max(total_steps - warmup, 1)
        remaining = 1 - progress if self.name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_ratio + (1 - self.min_ratio) * remaining

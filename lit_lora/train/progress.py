"""How a run goes, in lines for a log file, where no terminal shows a progress bar."""

from __future__ import annotations

import math
import time

from tqdm import tqdm

from lit_lora import log

__all__ = ["ProgressLines"]

_LINES = 20
"""Lines of a whole run."""

_LONGEST_SILENCE = 60.0
"""Seconds after which a line is due, however few steps were made."""


class ProgressLines:
    """Prints a line for every twentieth of a run, and after a minute without one.

    Args:
        total: Steps of the whole run.
        first_step: Finished steps of a resumed run.
    """

    def __init__(self, total: int, first_step: int) -> None:
        self.total = total
        self._first_step = first_step
        self._interval = max(1, math.ceil(total / _LINES))
        self._started = time.monotonic()
        self._last_line = self._started

    def after(self, step: int, outcome: str, *, already_reported: bool) -> None:
        """Print a line if one is due.

        Args:
            step: Finished steps.
            outcome: Loss and speed of the last one, in words.
            already_reported: Whether a line on this step was printed, such as that of a validation.
        """
        now = time.monotonic()
        is_due = step % self._interval == 0 or now - self._last_line > _LONGEST_SILENCE
        if not is_due and not already_reported:
            return

        self._last_line = now
        if not already_reported:
            seconds_per_step = (now - self._started) / (step - self._first_step)
            left = tqdm.format_interval(seconds_per_step * (self.total - step))
            log.note(f"step {step} of {self.total}: {outcome}, {left} left")

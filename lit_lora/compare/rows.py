"""The rows of a comparison: a variant with the runs that were tried and those that were chosen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lit_lora.compare.jobs import Outcome
from lit_lora.compare.settings import Variant

__all__ = ["Row", "rows_of"]


@dataclass(frozen=True)
class Row:
    """A variant with its runs."""

    variant: Variant
    tried: list[Outcome]
    """One run per learning rate, with the first seed."""
    chosen: list[Outcome]
    """One run per seed, at the chosen learning rate; empty if every run failed."""

    @property
    def rate(self) -> float | None:
        """The chosen learning rate."""
        return self.chosen[0].job.rate if self.chosen else None

    @property
    def finished(self) -> list[Outcome]:
        """The chosen runs that have a result."""
        return [outcome for outcome in self.chosen if outcome.result]

    @property
    def loss(self) -> float:
        """Mean validation loss of the chosen runs; infinite if none has a result."""
        return statistics.fmean(outcome.loss for outcome in self.finished) if self.finished else math.inf

    def values(self, key: str) -> list[float]:
        """A value of ``result.json``, or a score, from every chosen run that has it."""
        values = [outcome.result.get(key, outcome.scores.get(key)) for outcome in self.finished]
        return [float(value) for value in values if value is not None]

    @property
    def merges(self) -> str:
        """Whether the result can be merged into one model of the base's shape."""
        return {"added": "no", "full": "is a model"}.get(self.variant.config.peft.kind, "yes")

    @property
    def notes(self) -> list[str]:
        """What makes the results doubtful."""
        notes = []
        lowest, highest = self.variant.rates[0], self.variant.rates[-1]
        finite = [outcome for outcome in self.tried if math.isfinite(outcome.loss)]
        if len(finite) > 1 and self.rate in (lowest, highest):  # a better one may lie beyond
            notes.append(f"lr {self.rate:g} is the {'lowest' if self.rate == lowest else 'highest'} that was tried")

        for outcome in self.tried:
            if not outcome.result:
                notes.append(f"failed at lr {outcome.job.rate:g}: {outcome.error}")
        for outcome in self.chosen:
            if not outcome.result:
                notes.append(f"failed with seed {outcome.job.seed}: {outcome.error}")
        for outcome in self.finished:
            if outcome.error:
                notes.append(f"not evaluated: {outcome.error}")

        results = [outcome.result for outcome in self.finished]
        if any(result["validation_loss"] >= result["untrained_validation_loss"] for result in results):
            notes.append("the validation loss did not fall")
        return list(dict.fromkeys(notes))


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """The rows, the lowest validation loss first."""
    runs_by_name: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        runs_by_name.setdefault(outcome.job.variant.name, []).append(outcome)
    rows = []
    for runs in runs_by_name.values():
        tried = [run for run in runs if run.job.seed == runs[0].job.seed]
        best = min(tried, key=lambda run: run.loss)
        chosen = [run for run in runs if run.job.rate == best.job.rate] if best.result else []
        rows.append(Row(runs[0].job.variant, tried, chosen))
    return sorted(rows, key=lambda row: row.loss)

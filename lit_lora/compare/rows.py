"""The rows of a comparison: a method with the runs that were tried and those that were chosen."""

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
    """At every learning rate, with the first seed."""
    chosen: list[Outcome]
    """At the chosen learning rate, one for each seed; empty where every run failed."""

    @property
    def rate(self) -> float | None:
        """The chosen learning rate."""
        return self.chosen[0].job.rate if self.chosen else None

    @property
    def kept(self) -> list[Outcome]:
        """The chosen runs that have a result."""
        return [outcome for outcome in self.chosen if outcome.result]

    @property
    def loss(self) -> float:
        """Mean validation loss of the chosen runs."""
        return statistics.fmean(outcome.loss for outcome in self.kept) if self.kept else math.inf

    def values(self, key: str) -> list[float]:
        """A figure of ``result.json``, or a score, of every chosen run that has it."""
        found = [outcome.result.get(key, outcome.scores.get(key)) for outcome in self.kept]
        return [float(value) for value in found if value is not None]

    @property
    def merges(self) -> str:
        """Whether the result can be one model of the base's shape."""
        return {"added": "no", "full": "is a model"}.get(self.variant.config.peft.kind, "yes")

    @property
    def notes(self) -> list[str]:
        """What one should know before believing the figures."""
        notes, rates = [], self.variant.rates
        finite = [outcome for outcome in self.tried if math.isfinite(outcome.loss)]
        if len(finite) > 1 and self.rate in (rates[0], rates[-1]):
            notes.append(f"lr {self.rate:g} is the {'lowest' if self.rate == rates[0] else 'highest'} that was tried")
        notes += [f"failed at lr {o.job.rate:g}: {o.error}" for o in self.tried if not o.result]
        notes += [f"failed with seed {o.job.seed}: {o.error}" for o in self.chosen if not o.result]
        notes += [f"not measured: {o.error}" for o in self.kept if o.error]
        best = [outcome.result for outcome in self.kept]
        if any(result["validation_loss"] >= result["untrained_validation_loss"] for result in best):
            notes.append("the validation loss did not fall")
        return list(dict.fromkeys(notes))


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """The rows, the lowest validation loss first."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome.job.variant.name, []).append(outcome)
    rows = []
    for runs in found.values():
        tried = [run for run in runs if run.job.seed == runs[0].job.seed]
        best = min(tried, key=lambda run: run.loss)
        chosen = [run for run in runs if run.job.rate == best.job.rate] if best.result else []
        rows.append(Row(runs[0].job.variant, tried, chosen))
    return sorted(rows, key=lambda row: row.loss)

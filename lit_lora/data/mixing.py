"""Several data sets in one run: which rows of which set an epoch draws, and in what order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lit_lora.data.rows import Integers

__all__ = ["Mixture", "apportion"]


@dataclass(frozen=True)
class Mixture:
    """Data sets that lie one behind the other among some rows, and are drawn from by weight.

    An epoch has as many rows as all sets together. A set that is drawn from more often than it has rows starts over in
    a new order; of one that is drawn from less often, the next epoch takes the rest. What an epoch draws is a pure
    function of the seed and the epoch, so a run can resume at any step.
    """

    sizes: Sequence[int]
    """Number of rows in each set, at least one."""
    weights: Sequence[float]
    """Weight of each set; only their ratios matter."""

    @property
    def draws(self) -> list[int]:
        """Number of rows that an epoch draws from each set."""
        return apportion(sum(self.sizes), self.weights)

    def order(self, seed: int, epoch: int) -> Integers:
        """Indices of the rows that epoch ``epoch`` (from 0) draws; any stretch of them has the sets in proportion."""
        indices: list[Integers] = []
        times: list[np.ndarray] = []
        first_row = 0
        for number, (size, draws) in enumerate(zip(self.sizes, self.draws, strict=True)):
            drawn = _drawn(size, epoch * draws, (epoch + 1) * draws, [seed, number])
            indices.append(first_row + drawn)
            # Each set's draws are spread evenly over the epoch, and the sets merged by time.
            times.append((np.arange(draws) + 0.5) / draws)
            first_row += size
        merged: Integers = np.concatenate(indices)[np.argsort(np.concatenate(times), kind="stable")]
        return merged


def _drawn(size: int, start: int, end: int, seeds: Sequence[int]) -> Integers:
    """Draws ``start`` to ``end`` from a set of ``size`` rows; every ``size`` draws are a permutation of their own."""
    first_pass = start // size
    last_pass = (end - 1) // size
    passes = []
    for number in range(first_pass, last_pass + 1):
        passes.append(np.random.Generator(np.random.PCG64([*seeds, number])).permutation(size))
    offset = first_pass * size
    return np.concatenate(passes)[start - offset : end - offset]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to ``weights`` that add up to ``total``, each at least 1 if ``total`` allows it."""
    exact = np.asarray(weights, np.float64) / np.sum(weights) * total
    counts = np.floor(exact).astype(np.int64)
    left = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1  # to the largest remainders
    if total >= len(counts):
        for number in np.flatnonzero(counts == 0):
            counts[counts.argmax()] -= 1
            counts[number] = 1
    return [int(count) for count in counts]

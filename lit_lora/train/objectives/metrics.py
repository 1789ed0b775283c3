"""How well predictions agree with labels: the metrics that GLUE and its like are reported in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["accuracy", "f1", "matthews", "pearson", "spearman"]

Values = npt.NDArray[Any]


def accuracy(predicted: Values, true: Values) -> float:
    """Share of equal ids, (N,) and (N,)."""
    return float(np.mean(predicted == true))


def f1(predicted: Values, true: Values, labels: int) -> float:
    """Harmonic mean of precision and recall: of label 1 where there are two, else the mean over all labels.

    A label that is neither predicted nor true counts 0.
    """
    scores = []
    for label in [1] if labels == 2 else range(labels):
        right = np.sum((predicted == label) & (true == label))
        named = np.sum(predicted == label) + np.sum(true == label)
        scores.append(2 * right / named if named else 0.0)
    return float(np.mean(scores))


def matthews(predicted: Values, true: Values, labels: int) -> float:
    """Matthews' correlation for any number of labels, -1 to 1; 0 where all are predicted, or are, the same.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient", equation 8.
    """
    table = np.zeros((labels, labels))
    np.add.at(table, (true, predicted), 1)
    count, right = table.sum(), np.trace(table)
    of_true, of_predicted = table.sum(1), table.sum(0)
    together = right * count - of_true @ of_predicted
    spread = (count**2 - of_predicted @ of_predicted) * (count**2 - of_true @ of_true)
    return float(together / math.sqrt(spread)) if spread else 0.0


def pearson(predicted: Values, true: Values) -> float:
    """Correlation of two lists of numbers, -1 to 1; 0 where one is constant."""
    a, b = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (predicted, true))
    spread = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / spread if spread else 0.0


def spearman(predicted: Values, true: Values) -> float:
    """Correlation of the ranks; equal numbers share the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(true))


def _ranks(values: Values) -> Values:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Values = (last - (counts - 1) / 2)[places]
    return mean

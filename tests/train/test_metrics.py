"""Figures of agreement, against their definitions written out for one pair or label at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lit_lora.train.objectives.metrics import accuracy, f1, matthews, pearson, spearman

TRUE = np.array([1, 1, 1, 0, 0, 0, 0, 1, 0, 1])
SAID = np.array([1, 0, 1, 0, 1, 0, 0, 1, 0, 0])  # 3 right of 5 ones, 4 right of 5 zeros


def test_two_labels():
    assert accuracy(SAID, TRUE) == 0.7
    assert f1(SAID, TRUE, 2) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert matthews(SAID, TRUE, 2) == pytest.approx((3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2)))


def test_more_labels_are_averaged_and_correlated_over_all_pairs_of_indicators():
    generator = np.random.default_rng(0)
    true, said = generator.integers(0, 4, 200), generator.integers(0, 4, 200)
    said[:100] = true[:100]
    each = [f1((said == label).astype(int), (true == label).astype(int), 2) for label in range(4)]
    assert f1(said, true, 4) == pytest.approx(np.mean(each))
    # Gorodkin's coefficient is the correlation of the one-hot matrices, summed over their columns
    a, b = (np.eye(4)[values] - np.eye(4)[values].mean(0) for values in (said, true))
    assert matthews(said, true, 4) == pytest.approx((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def test_all_the_same_is_no_correlation_and_a_label_nobody_names_counts_nothing():
    same = np.zeros(5, dtype=int)
    assert matthews(same, np.array([0, 1, 0, 1, 1]), 2) == 0.0
    assert pearson(same, np.arange(5)) == spearman(np.arange(5), same) == 0.0
    assert f1(same, same, 3) == pytest.approx(1 / 3)


def test_numbers_by_value_and_by_rank():
    a, b = np.array([1.0, 2.0, 2.0, 5.0], np.float32), np.array([10.0, 40.0, 20.0, 30.0], np.float32)
    assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert spearman(a, b) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 4, 2, 3])[0, 1])
    assert spearman(np.exp(b), b) == pytest.approx(1.0)

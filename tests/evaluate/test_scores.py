from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.evaluate import LossScore, Metric, Share


# Textbook values of the Wilson score interval (Brown, Cai and DasGupta 2001 use the same formula).
@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (170, 200, 0.7939, 0.8929)],
)
def test_the_interval_is_wilsons(right: int, total: int, low: float, high: float) -> None:
    assert Share(right, total).interval == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 5000), st.floats(0, 1))
def test_the_interval_holds_the_share_and_stays_within_0_and_1(total: int, part: float) -> None:
    share = Share(round(part * total), total)
    low, high = share.interval
    assert 0 <= low <= share.value + 1e-12
    assert share.value - 1e-12 <= high <= 1


def test_no_rows_are_no_division_by_zero() -> None:
    assert (Share(0, 0).value, Share(0, 0).interval) == (0.0, (0.0, 1.0))


def test_perplexity_is_exp_of_the_loss_and_never_overflows() -> None:
    assert LossScore(math.log(7), 1, 1).perplexity == pytest.approx(7)
    assert LossScore(1e6, 1, 1).perplexity == math.inf


def test_a_metric_prints_its_interval_and_keeps_its_rows_in_json() -> None:
    assert str(Metric("exact match", Share(170, 200))) == "85.0% [79.4–89.3]"
    assert Metric("exact match", Share(170, 200)).to_json() == {
        "value": 0.85,
        "right": 170,
        "rows": 200,
        "interval": [0.7939, 0.8929],
    }
    assert (str(Metric("loss", 1.23456)), Metric("loss", 1.5).to_json()) == ("1.235", {"value": 1.5})

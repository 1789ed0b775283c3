from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_lora.train.schedule import ScheduleConfig

NAMES = ["cosine", "linear", "constant"]


def curve(total: int, **settings: object) -> list[float]:
    return [ScheduleConfig(**settings).factor(step, total) for step in range(total)]  # type: ignore[arg-type]


@given(st.sampled_from(NAMES), st.integers(1, 300), st.floats(0, 500), st.floats(0, 1))
def test_pain_42_every_run_reaches_the_peak_and_no_step_is_wasted(name, total, warmup, min_ratio):
    factors = curve(total, name=name, warmup=warmup, min_ratio=min_ratio)
    assert max(factors) == 1.0
    assert min(factors) > 0


@pytest.mark.parametrize("warmup", [0, 1, 5, 10, 1000, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 10])
def test_pain_42_warmup_rises_for_at_most_half_of_the_run(warmup, total):
    config = ScheduleConfig(warmup=warmup)
    steps = config.warmup_steps(total)
    assert steps <= total / 2
    assert steps == min(config.asked_steps(total), total // 2)
    rising = curve(total, warmup=warmup)[: steps + 1]
    assert rising == sorted(rising)
    assert rising[-1] == 1.0
    assert len(set(rising)) == len(rising)


def test_warmup_is_a_number_of_steps_or_a_share():
    assert ScheduleConfig(warmup=7).warmup_steps(100) == 7
    assert ScheduleConfig(warmup=0.07).warmup_steps(100) == 7
    assert ScheduleConfig(warmup=0).warmup_steps(100) == 0
    assert ScheduleConfig(warmup=1).warmup_steps(100) == 1


def test_shapes_after_the_warmup():
    assert curve(4, name="constant", warmup=0) == [1.0] * 4
    assert curve(4, name="linear", warmup=0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert curve(4, name="cosine", warmup=0) == pytest.approx([(1 + math.cos(math.pi * n / 4)) / 2 for n in range(4)])
    assert curve(4, name="linear", warmup=0, min_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert curve(8, name="linear", warmup=2) == pytest.approx([1 / 3, 2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch.testing import assert_close

from lit_lora.config import validate
from lit_lora.errors import NumericalError, UsageError
from lit_lora.generate import Sampling, choose, draw, probabilities

# Quarters: subtracting the maximum does not round them, so order and ties stay exactly what they were.
LOGITS = arrays("float32", (2, 12), elements=st.integers(-120, 120).map(lambda n: n / 4)).map(torch.from_numpy)
VARIED = st.floats(0.05, 5)


def draws(logits: Tensor, sampling: Sampling, seed: int = 0) -> list[int]:
    generators = [torch.Generator().manual_seed(seed) for _ in logits]
    return draw(probabilities(logits, sampling), generators)


@settings(deadline=None)
@given(logits=LOGITS, temperature=VARIED, top_k=st.integers(1, 20))
def test_top_k_keeps_the_k_best(logits: Tensor, temperature: float, top_k: int) -> None:
    chances = probabilities(logits, Sampling(temperature=temperature, top_k=top_k))
    assert ((chances > 0).sum(dim=-1) <= top_k).all()
    least_kept = torch.where(chances > 0, logits, torch.inf).min(dim=-1).values
    kth = logits.sort(dim=-1, descending=True).values[:, min(top_k, 12) - 1]
    assert (least_kept >= kth).all()
    assert_close(chances.sum(dim=-1), torch.ones(2))


@settings(deadline=None)
@given(logits=LOGITS, temperature=VARIED, top_p=st.floats(0, 1))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: Tensor, temperature: float, top_p: float) -> None:
    plain = probabilities(logits, Sampling(temperature=temperature))
    chances = probabilities(logits, Sampling(temperature=temperature, top_p=top_p))
    for before, after in zip(plain, chances, strict=True):
        kept = after > 0
        assert before[kept].max() == before.max()
        mass = float(before[kept].sum())
        assert mass >= top_p - 1e-5
        assert mass - float(before[kept].min()) < top_p + 1e-5 or int(kept.sum()) == 1
        assert_close(after[kept], before[kept] / mass, rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(logits=LOGITS, temperature=VARIED, min_p=st.floats(0, 1))
def test_min_p_keeps_what_is_near_the_best(logits: Tensor, temperature: float, min_p: float) -> None:
    plain = probabilities(logits, Sampling(temperature=temperature))
    chances = probabilities(logits, Sampling(temperature=temperature, min_p=min_p))
    best = plain.max(dim=-1, keepdim=True).values
    assert (plain[chances > 0] >= (min_p * best - 1e-6).expand_as(plain)[chances > 0]).all()
    assert (chances.sum(dim=-1) - 1).abs().max() < 1e-5


@settings(deadline=None)
@given(logits=LOGITS, top_p=st.sampled_from([None, 0.0, 0.5]), top_k=st.sampled_from([None, 1, 3]))
def test_pain_52_temperature_zero_is_the_best_token_whatever_else_is_set(
    logits: Tensor, top_p: float | None, top_k: int | None
) -> None:
    sampling = Sampling(temperature=0, top_p=top_p, top_k=top_k)
    assert draws(logits, sampling, seed=1) == draws(logits, sampling, seed=2) == logits.argmax(dim=-1).tolist()
    assert choose(logits, sampling) == logits.argmax(dim=-1).tolist()


@settings(deadline=None)
@given(logits=LOGITS, temperature=VARIED)
def test_pain_52_top_p_zero_and_top_k_one_are_the_best_token(logits: Tensor, temperature: float) -> None:
    for sampling in (Sampling(temperature=temperature, top_p=0), Sampling(temperature=temperature, top_k=1)):
        chosen = draws(logits, sampling)
        assert [row[token] for row, token in zip(logits, chosen, strict=True)] == [row.max() for row in logits]


def test_a_tiny_temperature_does_not_overflow() -> None:
    chances = probabilities(torch.tensor([[1e30, 0.0, -1e30]]), Sampling(temperature=1e-30))
    assert_close(chances, torch.tensor([[1.0, 0.0, 0.0]]))


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(2, 12, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.tensor([[1, 2, 3], [4, 4, 5]])
    seen = torch.zeros(2, 12, dtype=torch.bool).scatter_(1, ids, True)
    expected = torch.softmax(RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone()), dim=-1)
    assert_close(probabilities(logits, Sampling(temperature=1, repetition_penalty=1.3), seen), expected)


def test_filters_together_are_those_of_transformers() -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    theirs = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)]
    )
    logits = torch.randn(16, 200, generator=torch.Generator().manual_seed(1)) * 3
    expected = torch.softmax(theirs(torch.zeros(16, 1, dtype=torch.int64), logits.clone()), dim=-1)
    assert_close(probabilities(logits, Sampling(temperature=0.7, top_k=40, top_p=0.9, min_p=0.05)), expected)


def test_draws_follow_the_probabilities() -> None:
    chances = torch.tensor([[0.7, 0.2, 0.1]]).expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor(draw(chances, [generator] * 4000)), minlength=3) / 4000
    assert_close(counts, torch.tensor([0.7, 0.2, 0.1]), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        probabilities(torch.tensor([[0.0, bad]]), Sampling(temperature=temperature))
    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        choose(torch.tensor([[0.0, bad]]), Sampling(temperature=temperature))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -0.1),
        ("top_k", 0),
        ("top_p", 1.1),
        ("min_p", -1),
        ("max_new_tokens", 0),
        ("repetition_penalty", 0),
        ("temperature", float("nan")),
        ("tempreature", 1),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=key):
        validate({key: value}, Sampling)

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from lit_lora.data import Rows
from lit_lora.evaluate import evaluate_loss
from lit_lora.evaluate.likelihood import log_likelihoods
from lit_lora.model import CausalLM


@pytest.fixture
def documents() -> list[tuple[list[int], list[bool]]]:
    """Rows of very different lengths and shares of learned tokens; one of them learns a single token."""
    random = np.random.default_rng(0)
    lengths = [5, 90, 2, 33, 17, 60, 8]
    rows = [(random.integers(3, 384, n).tolist(), (random.random(n) < 0.4).tolist()) for n in lengths]
    rows[2] = (rows[2][0], [True, True])
    return rows


def one_by_one(model: CausalLM, documents: list[tuple[list[int], list[bool]]]) -> tuple[list[float], int]:
    """The slow and obvious way: whole logits of each row by itself."""
    sums, count = [], 0
    for ids, learn in documents:
        with torch.no_grad():
            chances = functional.log_softmax(model(torch.tensor([ids]))[0].double(), dim=-1)
        places = [t for t in range(1, len(ids)) if learn[t]]
        sums.append(sum(float(chances[t - 1, ids[t]]) for t in places))
        count += len(places)
    return sums, count


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 100, 10_000])
def test_the_loss_is_the_mean_over_tokens_whatever_the_batch_size(
    model: CausalLM, documents: list[tuple[list[int], list[bool]]], micro_batch_tokens: int
) -> None:
    sums, count = one_by_one(model, documents)
    score = evaluate_loss(model, Rows.from_tokens(documents), micro_batch_tokens=micro_batch_tokens)
    assert score.loss == pytest.approx(-sum(sums) / count, rel=1e-5)
    assert (score.tokens, score.rows) == (count, len(documents))


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_each_row_gets_its_own_sum(
    model: CausalLM, documents: list[tuple[list[int], list[bool]]], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_lora.evaluate.likelihood.CHUNK", chunk)
    sums, _ = one_by_one(model, documents)
    assert log_likelihoods(model, Rows.from_tokens(documents), micro_batch_tokens=100) == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize(
    ("beginning", "micro_batch_tokens", "computed"),
    [
        (70, 400, 2 * 69 + 5 + 20),  # each question once, but for the token that has an option to predict
        (2, 400, 5 * 2 + 20),  # too short for passes of its own: all in one
        (70, 60, 5 * 70 + 20),  # no room for two
    ],
)
def test_what_a_group_begins_with_is_computed_once_where_that_is_less(
    model: CausalLM, beginning: int, micro_batch_tokens: int, computed: int
) -> None:
    random = np.random.default_rng(1)
    groups, rows = [3, 2], []
    for group, ends in zip(groups, [[4, 6, 3], [5, 2]], strict=True):
        question = [10 + group, *random.integers(3, 384, beginning - 1).tolist()]
        for number, end in enumerate(ends):
            option = [100 + number, *random.integers(3, 384, end - 1).tolist()]
            rows.append(([*question, *option], [False] * beginning + [True] * end))
    sums, _ = one_by_one(model, rows)
    sizes: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: sizes.append(output[..., 0].numel())
    )
    tokenized = Rows.from_tokens(rows)
    found = log_likelihoods(model, tokenized, micro_batch_tokens=micro_batch_tokens, groups=groups)
    handle.remove()
    assert found == pytest.approx(sums, rel=1e-4)
    assert sum(sizes) == computed


def test_whole_logits_never_exist(
    model: CausalLM, documents: list[tuple[list[int], list[bool]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_lora.evaluate.likelihood.CHUNK", 16)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    evaluate_loss(model, Rows.from_tokens(documents))
    handle.remove()
    assert max(sizes) <= 16
    assert sum(sizes) == one_by_one(model, documents)[1], "logits of positions that are not learned were computed"


def test_a_row_without_targets_counts_nothing(model: CausalLM) -> None:
    rows = [([5, 6, 7], [True, False, False]), ([8, 9], [False, True])]
    assert log_likelihoods(model, Rows.from_tokens(rows))[0] == 0
    assert evaluate_loss(model, Rows.from_tokens(rows)).tokens == 1

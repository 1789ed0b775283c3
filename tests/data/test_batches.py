"""Every row once an epoch, every learned token a target once, nothing across documents, whatever the sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_lora import IGNORE_INDEX
from lit_lora.data.batches import Batches, MicroBatch, collate, validation_batches
from lit_lora.data.rows import EncodedRow, Rows, Status, TokenTable, record_batch

TokenRow = tuple[list[int], list[bool]]


@st.composite
def token_rows(draw: st.DrawFn, max_rows: int = 20) -> list[TokenRow]:
    """Rows whose tokens are all different, so that each can be followed to where it goes."""
    lengths = draw(st.lists(st.integers(2, 12), min_size=1, max_size=max_rows))
    rows, token = [], 0
    for length in lengths:
        learn = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        learn[1] = True  # a row with nothing to learn never gets here
        rows.append((list(range(token, token + length)), learn))
        token += length
    return rows


def _pairs(batch: MicroBatch) -> list[tuple[int, int]]:
    """``(token, the token it must predict)`` of every position with a label."""
    ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
    return [(token, label) for token, label in zip(ids, labels, strict=True) if label != IGNORE_INDEX]


def _expected(rows: list[TokenRow]) -> list[tuple[int, int]]:
    """What must be predicted, from the rows alone."""
    return [(ids[t - 1], ids[t]) for ids, learn in rows for t in range(1, len(ids)) if learn[t]]


@given(token_rows(), st.integers(1, 7), st.integers(1, 40), st.integers(0, 3))
def test_pain_07_every_learned_token_is_a_target_once_and_never_across_documents(
    rows: list[TokenRow], batch_size: int, budget: int, seed: int
) -> None:
    batches = Batches(Rows.from_tokens(rows), batch_size=batch_size, micro_batch_tokens=budget, seed=seed)
    steps = [micro for step in range(batches.steps_per_epoch) for micro in batches.step(step)]
    assert sorted(pair for micro in steps for pair in _pairs(micro)) == sorted(_expected(rows))
    evaluation = validation_batches(Rows.from_tokens(rows), budget)
    assert sorted(pair for micro in evaluation for pair in _pairs(micro)) == sorted(_expected(rows))


@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 5))
def test_pain_13_every_row_is_visited_once_an_epoch(row_count: int, batch_size: int, seed: int) -> None:
    rows = Rows.from_tokens([([n, n + 1], [True, True]) for n in range(row_count)])
    batches = Batches(rows, batch_size=batch_size, micro_batch_tokens=7, seed=seed)
    visits = np.zeros(row_count, int)
    for step in range(3 * batches.steps_per_epoch):
        chosen = [row for micro in batches.step(step) for row in micro.rows]
        assert 1 <= len(chosen) <= batch_size
        visits[chosen] += 1
        if (step + 1) % batches.steps_per_epoch == 0:
            assert set(visits) == {(step + 1) // batches.steps_per_epoch}


@given(token_rows(), st.integers(1, 40))
@example([([n] * length, [True] * length) for n, length in enumerate((2, 2, 2, 3, 3, 4, 4, 6, 8))], 7)
def test_micro_batches_keep_to_the_budget_unless_a_row_alone_breaks_it(rows: list[TokenRow], budget: int) -> None:
    packed = Rows.from_tokens(rows)
    training = Batches(packed, batch_size=len(rows), micro_batch_tokens=budget, seed=0).step(0)
    for micro in [*training, *validation_batches(packed, budget)]:
        assert micro.input_ids.shape == micro.labels.shape == (1, sum(micro.lengths))
        assert micro.lengths == [len(rows[row][0]) for row in micro.rows]
        assert micro.input_ids[0].tolist() == [token for row in micro.rows for token in rows[row][0]]
        assert sum(micro.lengths) <= budget or len(micro.rows) == 1
        assert micro.target_count == len(_pairs(micro)) == packed.target_counts[micro.rows].sum()


def test_a_row_beyond_the_budget_does_not_raise_it_for_the_others() -> None:
    lengths = [11, 9, 9, 9, 9, 7, 7, 3, 2, 2, 2, 2, 2, 2]  # evened out, a 9 and a 2 would meet
    rows = Rows.from_tokens([(list(range(n)), [True] * n) for n in lengths])
    for micro in Batches(rows, batch_size=len(lengths), micro_batch_tokens=10, seed=0).step(0):
        assert sum(micro.lengths) <= 10 or micro.lengths == [11]


def test_packing_takes_few_micro_batches_of_even_size() -> None:
    lengths = [90, 80, 70, 30, 20, 10, 10, 10]
    rows = Rows.from_tokens([(list(range(n)), [True] * n) for n in lengths])
    micros = Batches(rows, batch_size=8, micro_batch_tokens=130, seed=0).step(0)
    assert sorted(sum(micro.lengths) for micro in micros) == [100, 110, 110]


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 200))
def test_pain_24_a_step_depends_on_its_number_alone(row_count: int, batch_size: int, step: int) -> None:
    rows = Rows.from_tokens([([n, n + 1], [True, True]) for n in range(row_count)])
    there = Batches(rows, batch_size=batch_size, micro_batch_tokens=8, seed=3)
    for earlier in range(step):
        there.row_indices(earlier)
    fresh = Batches(rows, batch_size=batch_size, micro_batch_tokens=8, seed=3)
    assert [micro.rows for micro in there.step(step)] == [micro.rows for micro in fresh.step(step)]


def test_pain_24_a_far_step_costs_no_replay() -> None:
    rows = Rows.from_tokens([([n, n + 1], [True, True]) for n in range(100)])
    batches = Batches(rows, batch_size=3, micro_batch_tokens=8, seed=0)
    assert len(batches.row_indices(10**12)) > 0


def test_epochs_and_seeds_have_their_own_order() -> None:
    rows = Rows.from_tokens([([n, n + 1], [True, True]) for n in range(50)])
    orders = {
        tuple(Batches(rows, batch_size=50, micro_batch_tokens=200, seed=seed).row_indices(epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize("row_count", [1, 3, 7])
def test_pain_43_very_few_rows_give_steps(row_count: int) -> None:
    rows = Rows.from_tokens([([1, 2, 3], [False, True, True])] * row_count)
    batches = Batches(rows, batch_size=8, micro_batch_tokens=4096, seed=0)
    assert batches.steps_per_epoch == 1
    assert sum(micro.target_count for micro in batches.step(0)) == 2 * row_count


def test_pain_01_the_last_window_of_an_epoch_has_the_rows_that_are_left() -> None:
    rows = Rows.from_tokens([([n, n + 1], [True, True]) for n in range(10)])
    batches = Batches(rows, batch_size=4, micro_batch_tokens=100, seed=0)
    assert [len(batches.row_indices(step)) for step in range(3)] == [4, 4, 2]


def test_collating_leaves_the_rows_as_they_are() -> None:
    rows = Rows.from_tokens([([1, 2], [True, True]), ([3, 4], [True, True])])
    first = collate(rows, [0, 1])
    assert first.labels.tolist() == [[2, IGNORE_INDEX, 4, IGNORE_INDEX]]
    assert rows[1].loss_mask.tolist() == [True, True]
    assert collate(rows, [0, 1]).labels.equal(first.labels)


def test_no_rows_make_no_batches() -> None:
    with pytest.raises(ValueError, match="0 rows"):
        Batches(Rows.from_tokens([]), batch_size=1, micro_batch_tokens=1, seed=0)
    assert list(validation_batches(Rows.from_tokens([]), 10)) == []


SYSTEM = [7, 8, 9]
TALKS = [
    ([*SYSTEM, 1, 2, 3], [False] * 5 + [True]),
    ([*SYSTEM, 4, 5], [False] * 4 + [True]),
    ([*SYSTEM, 1, 2, 6, 6], [False] * 4 + [True] * 3),
]


def test_tokens_that_all_rows_begin_with_stand_in_a_micro_batch_once() -> None:
    rows = Rows.from_tokens(TALKS)
    assert rows.shared_prefix == 3
    batch = collate(rows, [0, 2], rows.shared_prefix)
    assert batch.input_ids.tolist() == [[7, 8, 9, 1, 2, 3, 1, 2, 6, 6]]
    none = IGNORE_INDEX
    assert batch.labels.tolist() == [[none, none, none, none, 3, none, 2, 6, 6, none]]
    assert (batch.lengths, batch.shared_prefix) == ([6, 7], 3)
    alone = collate(rows, [1], rows.shared_prefix)
    assert (alone.input_ids.tolist(), alone.shared_prefix) == ([[7, 8, 9, 4, 5]], 0)


@pytest.mark.parametrize(
    ("rows", "shared_prefix"),
    [
        (TALKS[:1] * 2, 4),  # the fifth predicts a learned token
        ([([7, 8], [False, True]), ([7, 8, 9], [False, False, True])], 0),
        ([([7, 8, 9], [True] * 3)] * 3, 0),  # plain text: all is learned
        ([([7, 8, 9, 1], [False] * 4), ([7, 8], [False] * 2)], 1),  # every row keeps a token of its own
        ([*TALKS, ([5, 8, 9, 1], [False] * 3 + [True])], 0),
        (TALKS[:1], 4),
        ([], 0),
    ],
)
def test_what_all_rows_begin_with_ends_before_anything_learned(rows: list[TokenRow], shared_prefix: int) -> None:
    assert Rows.from_tokens(rows).shared_prefix == shared_prefix


def test_the_beginning_is_that_of_the_rows_in_use_over_all_files() -> None:
    odd = ([1] * 5, [False] * 4 + [True])
    tables = [record_batch([EncodedRow(i, n, Status.KEPT, len(i), "f", 1) for i, n in part]) for part in (TALKS, [odd])]
    rows = TokenTable(tables).kept()
    assert rows.shared_prefix == 0
    assert rows.subset(np.array([2, 0])).shared_prefix == 3


@given(token_rows(), st.integers(1, 40))
def test_with_a_common_beginning_the_same_is_predicted_within_the_budget(rows: list[TokenRow], budget: int) -> None:
    rows = [([901, 902, 903, *ids], [False] * 3 + learn) for ids, learn in rows]
    packed = Rows.from_tokens(rows)
    training = Batches(
        packed, batch_size=len(rows), micro_batch_tokens=budget, seed=0, shared_prefix=packed.shared_prefix
    ).step(0)
    for micros in (training, list(validation_batches(packed, budget))):
        assert sorted(pair for micro in micros for pair in _pairs(micro)) == sorted(_expected(rows))
        for micro in micros:
            assert micro.input_ids.shape[1] == sum(micro.lengths) - micro.shared_prefix * (len(micro.rows) - 1)
            assert micro.input_ids.shape[1] <= budget or len(micro.rows) == 1
            assert micro.lengths == [len(rows[row][0]) for row in micro.rows]

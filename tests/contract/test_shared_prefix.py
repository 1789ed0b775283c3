"""Tokens that all rows begin with, held once in a micro-batch: the loss and every gradient stay those of whole rows."""

from __future__ import annotations

import pytest
import torch

from lit_lora import peft
from lit_lora.data.batches import MicroBatch, collate
from lit_lora.data.rows import Rows
from lit_lora.evaluate.likelihood import log_likelihoods
from lit_lora.model import CausalLM
from lit_lora.peft.core.capabilities import GroupsTokens
from lit_lora.train.loss import backward, evaluate
from tests.contract.test_methods import adapted, every_case
from tests.peft.tiny import make_model, shake
from tests.tiny import gradients_of

SYSTEM = [7, 8, 9, 10, 2, 44]
ENDS = [[1, 2, 3], [30], [30, 20, 10, 40, 50, 1, 2], list(range(40, 58))]
ROWS = Rows.from_tokens([([*SYSTEM, 5, *end], [False] * (len(SYSTEM) + 1) + [True] * len(end)) for end in ENDS])
PLACES = range(len(ENDS))


def batches() -> tuple[MicroBatch, MicroBatch]:
    """With the beginning in every row, and once."""
    assert ROWS.shared_prefix == len(SYSTEM)
    return collate(ROWS, PLACES), collate(ROWS, PLACES, ROWS.shared_prefix)


def gradients(model: CausalLM, batch: MicroBatch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = float(backward(model, batch, 1 / batch.target_count))
    return loss, gradients_of(model)


@every_case
def test_the_loss_and_the_gradients_are_those_of_whole_rows(case):
    model = adapted(case)
    shake(model, 0.1)
    model.eval()  # nothing is drawn
    (loss, expected), (shared_loss, got) = (gradients(model, batch) for batch in batches())
    assert shared_loss == pytest.approx(loss, rel=1e-5)
    assert got.keys() == expected.keys() != set()
    for name, gradient in got.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(gradient, expected[name], atol=1e-4 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_in_bfloat16_they_are_so_within_its_rounding(checkpointing):
    model = adapted("lora", dtype=torch.bfloat16)
    shake(model, 0.1)
    model.checkpoint_activations(checkpointing)
    (loss, expected), (shared_loss, got) = (gradients(model.train(), batch) for batch in batches())
    assert shared_loss == pytest.approx(loss, rel=2e-2)
    for name, gradient in got.items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0) > 0.995, name


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_are_those_of_whole_rows(window, dtype):
    model = make_model(dtype=dtype, window=window).eval()
    whole, shared = batches()
    with torch.no_grad():
        expected = model.hidden_states(whole.input_ids, lengths=whole.lengths)[0].split(whole.lengths)
        got = model.hidden_states(shared.input_ids, lengths=shared.lengths, shared_prefix=shared.shared_prefix)[0]
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    pieces = torch.cat([expected[0], *(states[shared.shared_prefix :] for states in expected[1:])])
    torch.testing.assert_close(got, pieces, atol=tolerance, rtol=tolerance)


def test_losses_without_a_gradient_are_those_of_whole_rows():
    model = make_model().eval()
    (total, targets), (shared_total, shared_targets) = (evaluate(model, batch) for batch in batches())
    assert (shared_total, shared_targets) == (pytest.approx(total, rel=1e-6), targets)
    alone = [evaluate(model, collate(ROWS, [place]))[0] for place in PLACES]
    assert (-log_likelihoods(model, ROWS)).tolist() == pytest.approx(alone, rel=1e-5)


def test_groups_do_not_take_tokens_held_once():
    model = adapted("longlora").train()
    assert {name for name, settings in peft.methods().items() if issubclass(settings, GroupsTokens)} == {"longlora"}
    with pytest.raises(ValueError, match="does not support a shared prefix, got 6 tokens"):
        backward(model, batches()[1], 1.0)


def test_lengths_that_do_not_fit_are_refused():
    model, shared = make_model(), batches()[1]
    with pytest.raises(ValueError, match="lengths sum to"):
        model.hidden_states(shared.input_ids, lengths=shared.lengths)
    with pytest.raises(ValueError, match="lengths sum to"):
        model.hidden_states(torch.tensor([[1, 2]]), lengths=[1, 3], shared_prefix=2)

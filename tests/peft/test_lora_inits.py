"""Starts taken from the weight, against the definitions and against PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lit_lora.errors import UsageError
from lit_lora.peft.lora.inits import start_factors
from tests.peft.tiny import adapted, lora, make_model


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_pissa_starts_at_the_nearest_matrix_of_the_rank(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    A, B = start_factors("pissa", weight, 5, 2.5)
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    torch.testing.assert_close(2.5 * B @ A, U[:, :5] * S[:5] @ V[:5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(A @ A.T, torch.diag(S[:5] / 2.5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(B.T @ B, torch.diag(S[:5] / 2.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_is_that_of_peft(init):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20))
    weight = base[0].weight.detach().clone()
    config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=8, init_lora_weights=init)
    theirs = peft.get_peft_model(base, config).base_model.model[0]
    A, B = start_factors(init, weight, 4, 2.0)
    expected = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    torch.testing.assert_close(B @ A, expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weight - 2.0 * B @ A, theirs.base_layer.weight.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"init": "pissa", "target_modules": ["embed_tokens"]},
            "'pissa' is for linear layers, but .*embed_tokens is Embedd",
        ),
        ({"init": "pisa"}, "init"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(settings, message):
    with pytest.raises((UsageError, ValueError), match=message):
        adapted(make_model(), lora(**settings))

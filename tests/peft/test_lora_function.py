"""The LoRA linear with its written-out backward against plain autograd."""

from __future__ import annotations

import pytest
import torch

from lit_lora.peft.lora.function import Part, lora_linear, lora_linear_reference, lora_linears


def make(dtype, *, bias=True, masked=False, weight_grad=False, a_grad=True):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 7, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 7, dtype=dtype, requires_grad=weight_grad)
    b = torch.randn(6, dtype=dtype, requires_grad=True) if bias else None
    A = torch.randn(3, 7, dtype=dtype, requires_grad=a_grad)
    B = torch.randn(6, 3, dtype=dtype, requires_grad=True)
    mask = torch.rand(2, 5, 7) > 0.3 if masked else None
    return x, weight, b, A, B, 1.7, mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_backward_passes_gradcheck_in_float64(masked, bias, weight_grad):
    args = make(torch.float64, bias=bias, masked=masked, weight_grad=weight_grad)
    assert torch.autograd.gradcheck(lora_linear, args)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("a_grad", [False, True])
def test_output_and_gradients_equal_plain_autograd_in_float32(masked, a_grad):
    args = make(torch.float32, masked=masked, a_grad=a_grad)
    leaves = [t for t in args[:5] if t.requires_grad]
    ours, theirs = lora_linear(*args), lora_linear_reference(*args)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(ours)
    for got, expected in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_bfloat16_base_come_back_in_float32():
    x, weight, bias, A, B, scaling, _ = make(torch.float32)
    half = lora_linear(x.bfloat16(), weight.bfloat16(), bias, A, B, scaling)
    assert half.dtype == torch.bfloat16
    half.float().square().sum().backward()
    assert A.grad is not None
    assert A.grad.dtype == B.grad.dtype == bias.grad.dtype == torch.float32
    exact = make(torch.float32)
    lora_linear_reference(*exact).square().sum().backward()
    assert (A.grad - exact[3].grad).norm() < 0.03 * exact[3].grad.norm()


def saved_bytes(function, args):
    seen = {}
    parameters = {t.data_ptr() for t in args if isinstance(t, torch.Tensor)} - {args[0].data_ptr()}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*args)
    return sum(seen.values())


def test_the_input_is_saved_once_and_not_at_all_when_a_is_frozen():
    x_bytes, low_bytes = 2 * 5 * 7 * 4, 2 * 5 * 3 * 4
    assert saved_bytes(lora_linear, make(torch.float32)) == x_bytes + low_bytes
    assert saved_bytes(lora_linear, make(torch.float32, a_grad=False)) == low_bytes


def test_layers_of_one_input_together_equal_each_alone():
    torch.manual_seed(0)
    x = torch.randn(5, 7, requires_grad=True)
    parts = [
        Part(torch.randn(out, 7), None, torch.randn(rank, 7, requires_grad=True), torch.randn(out, rank), 0.5)
        for out, rank in ((6, 3), (2, 1), (4, 2))
    ]
    together = lora_linears(x, parts)
    alone = [lora_linear_reference(x, *part) for part in parts]
    leaves = [x, *(part.A for part in parts)]
    upstream = [torch.randn_like(out) for out in alone]
    for got, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for got, expected in zip(
        torch.autograd.grad(together, leaves, upstream), torch.autograd.grad(alone, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_small_update_is_not_rounded_away_in_bfloat16():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 128).bfloat16(), torch.randn(32, 128).bfloat16()
    A, B = torch.randn(4, 128), 1e-4 * torch.randn(32, 4)  # the update is about 1/100 of the base output's rounding
    exact = torch.nn.functional.linear(x.double(), weight.double())
    update = (x.double() @ A.double().T) @ B.double().T
    kept = lora_linear(x, weight, None, A, B, 1.0).double() - exact
    naive = (torch.nn.functional.linear(x, weight) + ((x @ A.bfloat16().T) @ B.bfloat16().T)).double() - exact
    projected = [float((moved * update).sum() / update.square().sum()) for moved in (kept, naive)]
    assert abs(projected[0] - 1) < 0.3
    assert abs(projected[1]) < 0.3

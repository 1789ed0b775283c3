"""The layer over quantized weights: its products, its gradients, and what it keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from lit_lora.peft.lora.linear import LoRALinear
from lit_lora.quantize import QuantizeConfig, QuantizedLinear, count_quantized, quantize, stored_bytes

CONFIGS = [QuantizeConfig(), QuantizeConfig(name="fp4", double_quant=False), QuantizeConfig(name="int8")]


def make_layer(config: QuantizeConfig, dtype: torch.dtype = torch.float32, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    made = quantize(torch.randn(96, 128) * 0.1, config)
    return QuantizedLinear(made, torch.randn(96).to(dtype) if bias else None, dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_output_and_gradient_are_those_of_the_dequantized_weight(config: QuantizeConfig) -> None:
    layer = make_layer(config)
    x = torch.randn(7, 128, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    got, x.grad = x.grad, None
    expected = F.linear(x, layer.dequantize(), layer.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(got, x.grad)


def test_the_backward_keeps_no_tensor() -> None:
    layer, kept = make_layer(CONFIGS[0], bias=False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(7, 128, requires_grad=True))
    assert kept == []


def test_double_precision_agrees_with_finite_differences() -> None:
    layer = make_layer(CONFIGS[0]).double()
    x = torch.randn(3, 128, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_one_token_gives_what_many_give(config: QuantizeConfig, dtype: torch.dtype) -> None:
    layer = make_layer(config, dtype)
    x = torch.randn(5, 128).to(dtype)
    with torch.no_grad():
        rows = torch.stack([layer(row) for row in x])
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(rows, layer(x), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lora_over_it_is_lora_over_the_dequantized_layer(dtype: torch.dtype) -> None:
    layer = make_layer(CONFIGS[0], dtype)
    dense = torch.nn.Linear(128, 96).to(dtype)
    dense.weight.data, dense.bias.data = layer.weight, layer.bias.detach()
    x, outputs, gradients = torch.randn(2, 7, 128).to(dtype), [], []
    for base in (layer, dense):
        torch.manual_seed(3)
        lora = LoRALinear(base.requires_grad_(False), 4, 2.0)
        torch.nn.init.normal_(lora.lora_B)
        inputs = x.clone().requires_grad_()
        y = lora(inputs)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append([inputs.grad, lora.lora_A.grad, lora.lora_B.grad])
        with torch.no_grad():
            outputs.append(lora(x[0, :1]))
    assert torch.equal(outputs[0], outputs[2])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(outputs[1], outputs[3], atol=tolerance, rtol=tolerance)
    assert all(torch.equal(mine, other) for mine, other in zip(*gradients, strict=True))


def test_lora_over_it_keeps_no_weight() -> None:
    lora, kept = LoRALinear(make_layer(CONFIGS[0]), 4, 2.0), []  # type: ignore[var-annotated]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        lora(torch.randn(7, 128, requires_grad=True))
    assert (96, 128) not in kept
    assert (128, 96) not in kept


def test_state_comes_back() -> None:
    layer, other = make_layer(CONFIGS[0]), make_layer(CONFIGS[0])
    torch.manual_seed(9)
    other.quantized = quantize(torch.randn(96, 128), CONFIGS[0])
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_a_cast_changes_the_dtype_of_what_it_gives() -> None:
    layer = make_layer(CONFIGS[0])
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_weights_and_bytes_are_counted() -> None:
    layer = make_layer(CONFIGS[0], torch.bfloat16)
    assert count_quantized(layer) == 96 * 128
    blocks = 96 * 128 // 64
    assert stored_bytes(layer) == 96 * 128 // 2 + blocks + 4 * (-(-blocks // 256) + 1) + 2 * 96
    assert not next(iter(layer.parameters())).requires_grad

"""The kernels for GPUs against the same arithmetic on the CPU in float32, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_lora import kernels
from lit_lora.model import ModelConfig
from lit_lora.model.attention import flash as varlen_attention
from lit_lora.model.attention.attend import Attend, LayerAttention
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.model.ops import add_rms_norm, rotate, swiglu
from lit_lora.model.products import sum_of_products
from lit_lora.peft.lora.longlora import in_groups
from lit_lora.quantize import QuantizeConfig, quantize
from lit_lora.train.loss import cross_entropy_backward, cross_entropy_sum

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
every_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "fp16", "bf16"])


def compare(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor, dtype: torch.dtype) -> None:
    """Run on the GPU in ``dtype`` and on the CPU in float32 on equal values; outputs and gradients must agree."""
    results = []
    for device, precision in (("cuda", dtype), ("cpu", torch.float32)):
        leaves = [x.to(dtype).to(device, precision).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        draw = torch.Generator().manual_seed(1)
        outer = [torch.randn(out.shape, generator=draw).to(dtype).to(device, precision) for out in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, outer)])
    for fused, plain in zip(*results, strict=True):
        assert fused.dtype == dtype
        scale = max(1.0, float(plain.detach().abs().max()))
        torch.testing.assert_close(fused.float().cpu(), plain, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_triton_works_here() -> None:
    assert kernels.usable(torch.ones(2, device="cuda"), kernel="swiglu")


@every_dtype
@pytest.mark.parametrize("shape", [(1, 8), (5, 48), (33, 576), (7, 4096), (3, 8192)])
def test_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    compare(lambda x, delta, weight: add_rms_norm(x, delta, weight, 1e-5), x, delta, weight, dtype=dtype)
    compare(lambda x, weight: add_rms_norm(x, None, weight, 1e-5), x, weight, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (7, 80), (33, 1536)])
def test_gate(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, value = 6 * torch.randn(shape), torch.randn(shape)
    compare(lambda gate, value: (swiglu(gate, value),), gate, value, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 8), (9, 3, 20), (40, 32, 128)])
def test_rotation(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    angles = 6 * torch.rand(shape[0], shape[2] // 2)
    compare(lambda x: (rotate(x, *(t.to(x.device) for t in (angles.cos(), angles.sin()))),), torch.randn(shape),
            dtype=dtype)  # fmt: skip


@every_dtype
def test_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, labels = (4 * torch.randn(9, 9003)).to(dtype), torch.randint(9003, (9,))
    labels[4] = -100
    results = []
    for device, precision in (("cuda", dtype), ("cpu", torch.float32)):
        leaf = logits.detach().clone().to(device, precision).requires_grad_()
        total = cross_entropy_backward(leaf.clone(), labels.to(device), 0.25)
        assert torch.equal(total, cross_entropy_sum(leaf.detach().clone(), labels.to(device)))
        results.append((total.cpu(), leaf.grad.float().cpu()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0.25 * TOLERANCE[dtype])


def test_a_gradient_in_float32_is_not_rounded_in_between() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 300).bfloat16(), torch.randn(300, 64).bfloat16()
    got = sum_of_products((a.cuda(), b.cuda()), dtype=torch.float32)
    torch.testing.assert_close(got.cpu(), a.float() @ b.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("name", "block"), [("nf4", 64), ("nf4", 32), ("fp4", 64), ("nf4", 4096)])
def test_dequantized_bits_are_those_of_the_cpu(name: str, block: int, double: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    made = quantize(torch.randn(96, 4096), QuantizeConfig(name=name, block_size=block, double_quant=double))
    expected = made.dequantize(torch.float32).to(dtype)
    got = made.cuda().dequantize(dtype)
    assert got.is_cuda
    assert torch.equal(got.cpu(), expected)


LAYER = LayerAttention(0)


def attention(heads: int, keys: int, size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8, hidden_size=heads * size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=keys, head_dim=size,
    )  # fmt: skip


def attend_by(config: ModelConfig, lengths: list[int], how: str, device: str) -> Attend:
    place = torch.device(device)
    if how == "common":
        return PackedAttention(config, [5 + length for length in lengths], place, shared_prefix=5)
    plain = PackedAttention(config, lengths, place)
    return {"plain": lambda: plain, "behind": lambda: plain.with_prefix(5), "groups": lambda: in_groups(plain, 16)}[
        how
    ]()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("how", ["plain", "behind", "common", "groups"])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("lengths", [[1], [33, 7, 1], [300, 31, 64]])
@pytest.mark.parametrize(("heads", "keys", "size"), [(4, 4, 16), (6, 2, 64), (3, 1, 128), (2, 2, 256)])
def test_packed_attention(
    heads: int, keys: int, size: int, lengths: list[int], window: int | None, how: str, dtype: torch.dtype
) -> None:
    config = attention(heads, keys, size)
    tokens = sum(lengths) + (5 if how in ("behind", "common") else 0)
    torch.manual_seed(0)
    query, key, value = (torch.randn(tokens, n, size) for n in (heads, keys, keys))
    assert varlen_attention.usable(LAYER, *(x.to("cuda", dtype) for x in (query, key, value)))
    attends = {device: attend_by(config, lengths, how, device) for device in ("cuda", "cpu")}
    layer = LayerAttention(0, window)
    compare(lambda q, k, v: (attends[q.device.type](layer, q, k, v),), query, key, value, dtype=dtype)


def test_gradients_of_attention_are_the_same_bits_in_every_run() -> None:
    config, lengths = attention(4, 2, 64), [700, 300, 1500]
    attend = PackedAttention(config, lengths, torch.device("cuda"))
    torch.manual_seed(0)
    leaves = [torch.randn(2500, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2)]
    outer = torch.randn(2500, 4, 64, device="cuda", dtype=torch.bfloat16)
    runs = [torch.autograd.grad(attend(LAYER, *leaves), leaves, outer) for _ in range(5)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    assert not torch.are_deterministic_algorithms_enabled()


def test_head_sizes_that_the_kernel_does_not_take_go_through_the_loop() -> None:
    config, lengths = attention(2, 1, 12), [9, 4]
    torch.manual_seed(0)
    given = [torch.randn(13, n, 12) for n in (2, 1, 1)]
    attends = {device: PackedAttention(config, lengths, torch.device(device)) for device in ("cuda", "cpu")}
    compare(lambda q, k, v: (attends[q.device.type](LAYER, q, k, v),), *given, dtype=torch.bfloat16)

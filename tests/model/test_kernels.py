"""The fused CPU kernels against the same arithmetic in PyTorch, in float32, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_lora import kernels
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.model.attention.attend import LayerAttention
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.model.ops import add_rms_norm, geglu, linear, rotate, swiglu
from lit_lora.model.products import sum_of_products
from lit_lora.train.loss import cross_entropy_backward, cross_entropy_sum

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler for the CPU kernels")

SIZES = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}

TOLERANCE = 2**-6  # of a tensor's largest value: bfloat16 keeps 8 bits, and products of it are rounded in between


def _compare(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Run in bfloat16 (kernels) and float32 (PyTorch) on equal values; outputs and gradients must agree."""
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(1)
        outer = [torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(dtype) for out in outputs]
        grads = torch.autograd.grad(outputs, leaves, outer)
        results.append([*outputs, *grads])
    for fused, plain in zip(*results, strict=True):
        assert fused.dtype == torch.bfloat16
        scale = max(1.0, float(plain.detach().abs().max()))
        torch.testing.assert_close(fused.float(), plain, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("shape", [(1, 8), (5, 48), (33, 576)])
def test_norm_equals_pytorch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, delta, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    _compare(lambda x, delta, weight: add_rms_norm(x, delta, weight, 1e-5), x, delta, weight)
    _compare(lambda x, delta, weight: add_rms_norm(x, delta, weight, 1e-5, 1.0), x, delta, weight)
    _compare(lambda x, weight: add_rms_norm(x, None, weight, 1e-5), x, weight)


@pytest.mark.parametrize("shape", [(1, 1), (7, 80), (33, 1536)])
def test_gate_equals_pytorch(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    _compare(lambda gate, value: (swiglu(gate, value),), 6 * torch.randn(shape), torch.randn(shape))
    _compare(lambda gate, value: (geglu(gate, value),), 6 * torch.randn(shape), torch.randn(shape))
    for gated in (swiglu, geglu):  # whose exponentials overflow
        _compare(lambda gate, value, gated=gated: (gated(gate, value),), 60 * torch.randn(shape), torch.randn(shape))


@pytest.mark.parametrize("shape", [(1, 1, 8), (9, 3, 20), (40, 9, 64)])
def test_rotation_equals_pytorch(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    angles = 6 * torch.rand(shape[0], shape[2] // 2)
    _compare(lambda x: (rotate(x, angles.cos(), angles.sin()),), torch.randn(shape))


def test_cross_entropy_equals_pytorch() -> None:
    torch.manual_seed(0)
    logits, labels = (4 * torch.randn(9, 1003)).to(torch.bfloat16), torch.randint(1003, (9,))
    labels[4] = -100
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = logits.detach().clone().to(dtype).requires_grad_()
        total = cross_entropy_backward(leaf.clone(), labels, 0.25)
        assert torch.equal(total, cross_entropy_sum(leaf.detach().clone(), labels))
        results.append((total, leaf.grad.float()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0.25 * TOLERANCE)


needs_products = pytest.mark.skipif(not kernels.has("sum_of_products"), reason="no AVX-512 BF16, or AMX")


@needs_products
@pytest.mark.parametrize("start", [None, "row", "rows"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 31), (8, 32), (29, 64), (200, 97), (64, 576)])
def test_a_sum_of_products_is_rounded_once(rows: int, columns: int, dtype: torch.dtype, start: str | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    narrow = random(rows, 24)[:, 8:14]  # with gaps between its rows
    columns_of = random(columns * 2, 6)[:columns].T  # along the summed dimension
    terms = [(narrow, columns_of), (random(rows, 2098), random(2098, 2 * columns)[:, :columns])]
    terms.append((random(rows, 50), random(columns, 50).T))
    first = {None: None, "row": random(columns), "rows": random(rows, columns)}[start]
    total = sum_of_products(*terms, start=first, dtype=dtype)
    exact = sum((a.double() @ b.double() for a, b in terms), 0.0 if first is None else first.double())
    assert total.dtype == dtype
    error = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(total.double(), exact, rtol=error, atol=1e-4 * float(exact.abs().max()))


@needs_products
@pytest.mark.parametrize("shape", [(5, 48, 64), (40, 64, 33), (33, 63, 48)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_equals_pytorch(shape: tuple[int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    tokens, inputs, outputs = shape
    x, weight, offset = torch.randn(1, tokens, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    _compare(lambda *given: (linear(*given),), x, weight, *([offset] if bias else []))


@pytest.mark.parametrize("window", [None, 1, 5, 40, 300])
@pytest.mark.parametrize(
    ("lengths", "shared_prefix"),
    [([1], 0), ([33, 7, 1], 0), ([300, 31], 0), ([530], 0), ([70, 38, 45], 37), ([99, 3], 2)],
)
@pytest.mark.parametrize(("groups", "size"), [(1, 16), (2, 80), (6, 16)])
def test_packed_attention_equals_pytorch(
    lengths: list[int], shared_prefix: int, window: int | None, groups: int, size: int
) -> None:
    torch.manual_seed(0)
    config = ModelConfig.from_hf(
        {
            "model_type": "mistral",
            "vocab_size": 8,
            "hidden_size": 6 * size,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 6,
            "num_key_value_heads": groups,
        }
    )
    attend = PackedAttention(config, lengths, torch.device("cpu"), shared_prefix=shared_prefix)
    given = sum(lengths) - shared_prefix * (len(lengths) - 1)
    query, key, value = (torch.randn(given, heads, size) for heads in (6, groups, groups))
    _compare(lambda *tensors: (attend(LayerAttention(0, window), *tensors),), query, key, value)


@pytest.mark.parametrize("pairs", ["halves", "neighbors"])
@pytest.mark.parametrize(("size", "share"), [(16, 0.5), (80, 0.75), (256, 0.25), (256, 1.0)])
def test_packed_attention_turns_a_part_of_heads(size: int, share: float, pairs: str) -> None:
    torch.manual_seed(0)
    data = {
        "model_type": "glm" if pairs == "neighbors" else "llama",
        "vocab_size": 8,
        "hidden_size": 4 * size,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": size,
        "partial_rotary_factor": share,
    }
    attend = PackedAttention(ModelConfig.from_hf(data), [40, 12], torch.device("cpu"), shared_prefix=7)
    query, key, value = (torch.randn(45, heads, size) for heads in (4, 2, 2))
    _compare(lambda *tensors: (attend(LayerAttention(0, scale=0.2), *tensors),), query, key, value)


@pytest.mark.skipif(not kernels.has("packed_attention"), reason="no AVX-512 BF16")
def test_attention_gives_the_same_bits_each_time() -> None:
    config = ModelConfig(
        **{**SIZES, "head_dim": 16, "tie_word_embeddings": False}, num_attention_heads=4, num_key_value_heads=2
    )
    attend = PackedAttention(config, [75, 8, 38, 45], torch.device("cpu"), shared_prefix=5)
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        leaves = [torch.randn(151, heads, 16).bfloat16().requires_grad_() for heads in (4, 2, 2)]
        out = attend(LayerAttention(0), *leaves)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_a_kernel_that_finds_no_memory_says_so() -> None:
    if not kernels.has("packed_attention"):
        pytest.skip("no AVX-512 BF16")
    starts = torch.tensor([0, 1 << 50])  # buffers for such a document cannot be had
    with pytest.raises(MemoryError, match="packed_attention"):
        kernels.call("packed_attention", *[None] * 5, starts, None, None, 1, 0, 1, 1, 64, 64, 1 << 40, 1.0)


def test_pain_07_changing_one_document_leaves_the_others_bit_equal() -> None:
    torch.manual_seed(0)
    model = CausalLM(
        ModelConfig.from_hf({"model_type": "llama", **SIZES, "num_attention_heads": 4, "num_key_value_heads": 2})
    ).to(torch.bfloat16)
    ids = torch.randint(61, (1, 50))
    changed = ids.clone()
    changed[0, :20] = (changed[0, :20] + 1) % 61
    before, after = model(ids, lengths=[20, 30]), model(changed, lengths=[20, 30])
    assert torch.equal(before[0, 20:], after[0, 20:])
    later = ids.clone()
    later[0, 49] = (later[0, 49] + 1) % 61
    assert torch.equal(before[0, :49], model(later, lengths=[20, 30])[0, :49])


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_for_one_token_equals_pytorch(bias: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 1, 577), torch.randn(193, 577)
    added = torch.randn(193) if bias else None
    x, weight = x.bfloat16(), weight.bfloat16()
    with torch.no_grad():
        fused = linear(x, weight, None if added is None else added.bfloat16())
    plain = torch.nn.functional.linear(x.float(), weight.float(), None if added is None else added.bfloat16().float())
    assert fused.shape == (1, 1, 193)
    torch.testing.assert_close(fused.float(), plain, rtol=0, atol=TOLERANCE * float(plain.abs().max()))


def test_without_kernels_the_same_arithmetic_runs_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(4, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    fused = add_rms_norm(x, x, weight, 1e-5)
    monkeypatch.setenv("LIT_LORA_KERNELS", "0")
    kernels.library.cache_clear()
    try:
        assert not kernels.usable(x, kernel="add_rms_norm")
        plain = add_rms_norm(x, x, weight, 1e-5)
    finally:
        monkeypatch.undo()
        kernels.library.cache_clear()
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6)


def test_on_paper_a_gpu_takes_its_own_kernels() -> None:
    names: list[str] = []
    with kernels.rehearsed(lambda name, *_: names.append(name), "cuda"):
        x = torch.empty(4, 8, dtype=torch.float16, device="meta", requires_grad=True)
        total, normed = add_rms_norm(x, x, x[0], 1e-5)
        turned = rotate(normed[:, None], *torch.empty(2, 4, 4, device="meta"))
        linear(swiglu(total, turned[:, 0]), torch.empty(3, 8, dtype=torch.float16, device="meta")).sum().backward()
    forward = ["add_rms_norm", "rotate", "swiglu"]
    assert names == [*forward, "swiglu_backward", "rotate", "rms_norm_backward"]
    assert not kernels.usable(x, kernel="swiglu")


def test_tensors_of_two_dtypes_or_devices_are_left_to_pytorch() -> None:
    half, full = torch.ones(8, dtype=torch.bfloat16), torch.ones(8)
    assert kernels.usable(half, half, kernel="swiglu")
    assert not kernels.usable(half, full, kernel="swiglu")
    assert not kernels.usable(half, half.to("meta"), kernel="swiglu")

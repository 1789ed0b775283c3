"""Codes, scales and values: those of bitsandbytes, with and without the fused kernels."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch

from lit_lora import kernels
from lit_lora.errors import UsageError
from lit_lora.kernels import build
from lit_lora.quantize import Blocks, Groups, Int8, QuantizeConfig, Quantized, quantize
from lit_lora.quantize.codes import DYNAMIC, NF4, table

TYPES = ["nf4", "fp4"]
FOUR_BIT = [("nf4", 64, True), ("nf4", 32, False), ("fp4", 64, True), ("fp4", 128, False), ("nf4", 4096, True)]
FEWER = [("nf3", 64), ("nf3", 32, False), ("nf2", 64), ("nf2", 32), ("int2", 32), ("int2", 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["fused", "torch"], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both forms of every operation; without a compiler the fused one is skipped."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
        monkeypatch.setattr(build, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip("no C compiler")
    return str(request.param)


def weight(rows: int = 24, columns: int = 4096, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    made = torch.randn(rows, columns) * 0.05
    made[3, :64] = 0  # a block without a scale
    made[5] *= 1e-3
    return made.to(dtype)


def config(name: str, block_size: int = 64, double_quant: bool = True) -> QuantizeConfig:
    return QuantizeConfig.model_validate({"name": name, "block_size": block_size, "double_quant": double_quant})


def four_bit(*settings: Any, dtype: torch.dtype = torch.float32) -> Blocks:
    made = quantize(weight(dtype=dtype), config(*settings))
    assert isinstance(made, Blocks)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", FOUR_BIT, ids=str)
def test_codes_scales_and_values_are_those_of_bitsandbytes_bit_for_bit(settings: Any, dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    name, block_size, double = settings
    made = four_bit(*settings, dtype=dtype)
    codes, state = theirs.quantize_4bit(
        weight(dtype=dtype), blocksize=block_size, compress_statistics=double, quant_type=name
    )
    assert torch.equal(made.codes, codes)
    assert torch.equal(made.absmax, state.absmax)
    if double:
        assert torch.equal(made.nested_absmax, state.state2.absmax)
        assert torch.equal(made.offset, state.offset)
    assert torch.equal(made.dequantize(dtype), theirs.dequantize_4bit(codes, state))


def test_int8_rows_are_those_of_bitsandbytes() -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    matrix = weight(dtype=torch.float16)
    made = quantize(matrix, QuantizeConfig(name="int8"))
    codes, absmax, _ = theirs.int8_vectorwise_quant(matrix)
    assert isinstance(made, Int8)
    assert torch.equal(made.codes, codes)
    assert torch.equal(made.absmax, absmax)
    torch.testing.assert_close(made.dequantize(torch.float32), theirs.int8_vectorwise_dequant(codes, absmax))


def test_the_dynamic_values_are_those_of_bitsandbytes() -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(DYNAMIC, theirs.create_dynamic_map())


def test_nf4_is_the_quantiles_of_the_paper() -> None:
    """Appendix E: 8 of 9 equal steps from offset to 1/2 above zero, 7 of 8 below, scaled to 1."""
    offset = 1 - (1 / 32 + 1 / 30) / 2
    above = [NormalDist().inv_cdf(float(p)) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:8]]
    below = [-NormalDist().inv_cdf(float(p)) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:7]]
    built = sorted([*above, 0.0, *below])
    assert max(abs(value / built[-1] - known) for value, known in zip(built, NF4, strict=True)) < 2e-7


@pytest.mark.parametrize("name", TYPES)
def test_every_error_is_at_most_half_the_gap_of_its_code(name: str) -> None:
    made, matrix = four_bit(name, 64, False), weight()
    known = table(name, torch.device("cpu")).values.sort().values
    gap = (known[1:] - known[:-1]).max() / 2
    error = (made.dequantize(torch.float32) - matrix).view(-1, 64).abs().amax(1)
    assert (error <= gap * matrix.view(-1, 64).abs().amax(1) * (1 + 1e-6)).all()
    assert error.max() > 0


@pytest.mark.parametrize("settings", [("nf4", 64, False), ("fp4", 32, False), ("int8",)], ids=str)
def test_quantizing_dequantized_values_gives_the_same_codes(settings: Any) -> None:
    first = quantize(weight(), QuantizeConfig(name="int8") if settings == ("int8",) else config(*settings))
    again = quantize(first.dequantize(torch.float32), first.config)
    values, repeated = first.dequantize(torch.float32), again.dequantize(torch.float32)
    torch.testing.assert_close(repeated, values, atol=1e-9, rtol=1e-6)  # fp4 has two codes for zero


@pytest.mark.parametrize(("block_size", "expected"), [(32, 0.0873), (64, 0.0920), (128, 0.0956), (256, 0.0987)])
def test_errors_on_normal_values_are_those_of_methods(block_size: int, expected: float) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(512, 1024)
    made = quantize(matrix, config("nf4", block_size, False)).dequantize(torch.float32)
    assert (made - matrix).square().mean().sqrt().item() == pytest.approx(expected, abs=4e-4)


def test_double_quantized_scales_are_off_by_less_than_a_hundredth() -> None:
    torch.manual_seed(1)
    made = quantize(torch.randn(256, 1024), config("nf4"))
    exact = quantize(torch.randn(256, 1024, generator=torch.Generator().manual_seed(1)), config("nf4", 64, False))
    assert isinstance(made, Blocks)
    assert isinstance(exact, Blocks)
    relative = (made.scales() - exact.absmax).square().mean().sqrt() / exact.absmax.mean()
    assert 0 < relative < 0.01


def unpacked(made: Blocks | Groups) -> torch.Tensor:
    """The codes of a matrix, (out, in), read bit by bit."""
    bits = torch.stack([made.codes.view(-1) >> shift & 1 for shift in range(7, -1, -1)], dim=1)
    digits = bits.view(-1, made.config.code_bits).long()
    return sum(digits[:, place] << (digits.shape[1] - 1 - place) for place in range(digits.shape[1])).view(made.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [("nf4", 32), ("nf3", 64), ("nf3", 32, False), ("nf2", 64), ("nf2", 32)], ids=str)
def test_blocks_are_value_times_scale_bit_for_bit(settings: Any, dtype: torch.dtype) -> None:
    made = four_bit(*settings)
    values = table(settings[0], torch.device("cpu")).values[unpacked(made)].view(-1, settings[1])
    assert len(unpacked(made).unique()) == 2**made.config.code_bits
    assert torch.equal(made.dequantize(dtype), (values * made.scales()[:, None]).view(made.shape).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("settings", [("int4", 32), ("int4", 64), ("int2", 32), ("int2", 64)], ids=str)
def test_groups_are_scale_times_code_plus_zero_bit_for_bit(settings: Any, dtype: torch.dtype) -> None:
    made = quantize(weight(), config(*settings))
    assert isinstance(made, Groups)
    codes = unpacked(made).float().view(len(made.codes), -1, settings[1])
    expected = codes * made.scale.float()[..., None] + made.zero[..., None]
    assert torch.equal(made.dequantize(dtype), expected.flatten(1).to(dtype))


@pytest.mark.parametrize("settings", [*FOUR_BIT[:4], *FEWER, ("int8",), ("int4", 32)], ids=str)
def test_a_vector_multiplied_by_codes_is_the_product_of_the_dequantized_matrix(settings: Any) -> None:
    made = quantize(weight(), QuantizeConfig(name="int8") if settings == ("int8",) else config(*settings))
    torch.manual_seed(2)
    half = 2e-2 if settings in FEWER else 1e-2  # without kernels the matrix is rounded first
    for dtype, tolerance in ((torch.bfloat16, half), (torch.float32, 1e-5)):
        x = torch.randn(4096).to(dtype)
        expected = made.dequantize(torch.float32).double() @ x.double()
        torch.testing.assert_close(made.matrix_vector(x).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("name", "double", "bits"), [("nf4", True, 4.127), ("nf4", False, 4.5), ("int8", True, 8.0)])
def test_bits_are_those_of_the_bytes(name: str, double: bool, bits: float) -> None:
    chosen = QuantizeConfig(name="int8") if name == "int8" else config(name, 64, double)
    made = quantize(torch.empty(4096, 4096, device="meta"), chosen)
    stored = 8 * sum(buffer.numel() * buffer.element_size() for buffer in made.buffers()) / 4096**2
    assert stored == pytest.approx(bits, abs=1e-2 if name == "int8" else 1e-3)
    assert chosen.bits == pytest.approx(bits, abs=1e-3)


def test_no_cast_of_a_model_changes_the_scales(arithmetic: str) -> None:
    made: Quantized = torch.nn.Sequential(four_bit("nf4")).to(torch.bfloat16)[0]  # type: ignore[assignment]
    before = four_bit("nf4")
    assert {name: b.dtype for name, b in made.named_buffers()} == {name: b.dtype for name, b in before.named_buffers()}
    assert all(torch.equal(a, b) for a, b in zip(made.buffers(), before.buffers(), strict=True))


def test_a_block_size_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(UsageError, match=r"64 does not divide the 96 columns of up_proj, those that do: 32$"):
        quantize(torch.zeros(4, 96), config("nf4"), name="up_proj")
    with pytest.raises(UsageError, match=r"none does: use quantize\.name=int8"):
        quantize(torch.zeros(4, 24), config("nf4"))

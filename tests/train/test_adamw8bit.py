"""AdamW with 8-bit or paged moments."""

from __future__ import annotations

import pytest
import torch

from lit_lora.errors import InputError
from lit_lora.train.optim.build import build_optimizer
from lit_lora.train.optim.master_weights import MasterWeights
from lit_lora.train.optim.small_state import BLOCK, SMALL, SmallStateAdamW, dequantize, dynamic_map, quantize
from tests.train.tiny_run import losses, optimizer_config, stored, train, unfrozen

CPU = torch.device("cpu")
both_maps = pytest.mark.parametrize("signed", [True, False])


def quantized(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    codes, absmax = torch.empty(x.numel(), dtype=torch.uint8), torch.empty(-(-x.numel() // BLOCK))
    quantize(x, signed, codes, absmax)
    return codes, absmax


def numbers(count: int, signed: bool) -> torch.Tensor:
    """Of many magnitudes, as moments are; one block is zero and one has a single number in it."""
    draw = torch.Generator().manual_seed(0)
    size = max(count, 3 * BLOCK)
    x = torch.randn(size, generator=draw) * 10.0 ** torch.empty(size).uniform_(-8, 0, generator=draw)
    x[BLOCK : 3 * BLOCK] = 0
    x[2 * BLOCK + 7] = 1e-30
    return x[:count] if signed else x[:count].square()


@both_maps
def test_maps_and_codes_are_those_of_bitsandbytes_bit_for_bit(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = dynamic_map(signed, CPU)
    assert torch.equal(values, functional.create_dynamic_map(signed=signed))
    x = numbers(400 * BLOCK, signed)
    codes, absmax = quantized(x, signed)
    # The form for any device: its kernel for CPUs rounds to 16 bits first, too coarse for second moments.
    operator = torch.ops.bitsandbytes.quantize_blockwise.default
    theirs, their_absmax = operator._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, x, values, BLOCK)
    assert torch.equal(codes, theirs)
    assert torch.equal(absmax, their_absmax)
    back = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, values, BLOCK, torch.float32)
    assert torch.equal(dequantize(codes, absmax, signed), back)


@both_maps
def test_codes_beside_every_border_are_those_of_a_search(signed: bool) -> None:
    values = dynamic_map(signed, CPU)
    borders = (values[:-1] + values[1:]) / 2
    infinity = torch.tensor(torch.inf)
    near = [borders, torch.nextafter(borders, infinity), torch.nextafter(borders, -infinity)]
    halves = torch.arange(1 << 16) << 16  # and both ends of all numbers with one upper half
    ends = [bits.to(torch.int32).view(torch.float32) for bits in (halves, halves | 0xFFFF)]
    x = torch.cat([values, *near, *ends])
    x = x[(x.abs() <= 1) & (signed | (x >= 0))]
    x = torch.nn.functional.pad(x, (0, -x.numel() % (BLOCK - 1))).view(-1, BLOCK - 1)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).flatten()  # the largest of each block is 1
    assert torch.equal(quantized(x, signed)[0].int(), torch.bucketize(x, borders, out_int32=True))


@both_maps
@pytest.mark.parametrize("count", [1, 255, 256, 257, 5000])
def test_what_is_read_back_is_the_nearest_value_of_the_map(signed: bool, count: int) -> None:
    x = numbers(count, signed)
    codes, absmax = quantized(x, signed)
    read = dequantize(codes, absmax, signed)
    scales = absmax.repeat_interleave(BLOCK)[:count]
    distances = (x[:, None] - dynamic_map(signed, CPU) * scales[:, None]).abs()
    torch.testing.assert_close((read - x).abs(), distances.min(dim=1).values, atol=0, rtol=1e-3)
    assert ((read - x).abs() <= 0.04 * scales).all()
    assert read.isfinite().all()


def test_a_step_is_that_of_adamw_with_the_moments_rounded_in_between() -> None:
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(3, SMALL // 2, generator=draw)
    ours, plain = (start.clone().requires_grad_() for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = SmallStateAdamW([{"params": [ours], "weight_decay": 0.1}], **settings)
    reference = torch.optim.AdamW([plain], weight_decay=0.1, **settings)
    for _ in range(4):
        ours.grad = plain.grad = torch.randn(start.shape, generator=draw)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours.detach(), plain.detach(), atol=2e-6, rtol=0)
        state = optimizer.state[ours]
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            moment = reference.state[plain][name]
            codes, absmax = quantized(moment.flatten(), signed)
            torch.testing.assert_close(state[f"{name}_absmax"], absmax, rtol=1e-5, atol=0)
            assert (state[name].flatten() != codes).float().mean() < 1e-3  # the last bit of a moment may differ
            moment.copy_(dequantize(state[name].flatten(), state[f"{name}_absmax"], signed).view(moment.shape))
        with torch.no_grad():
            plain.copy_(ours)


def test_a_tensor_larger_than_one_piece_moves_like_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_lora.train.optim import small_state

    results = []
    for chunk in (small_state._CHUNK, 2 * BLOCK):
        monkeypatch.setattr(small_state, "_CHUNK", chunk)
        draw = torch.Generator().manual_seed(2)
        tensor = torch.randn(9, 1001, generator=draw).requires_grad_()
        optimizer = SmallStateAdamW([{"params": [tensor], "weight_decay": 0.0}], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
        for _ in range(3):
            tensor.grad = torch.randn(tensor.shape, generator=draw)
            optimizer.step()
        results.append([tensor.detach(), *optimizer.state[tensor].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(("name", "expected"), [("adamw", 8.0), ("adamw8bit", 2 + 8 / BLOCK)])
def test_bytes_of_state_per_number(name: str, expected: float) -> None:
    model = unfrozen(wide=5)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.numel() >= SMALL)
    master_weights = MasterWeights(model)
    optimizer = build_optimizer(optimizer_config(name), master_weights)
    for master in master_weights.masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    numbers = sum(master.numel() for master in master_weights.masters.values())
    assert state_bytes(optimizer) / numbers == pytest.approx(expected, rel=2e-3)


def test_small_tensors_keep_float32_moments_and_train_as_with_adamw(tmp_path) -> None:
    assert all(parameter.numel() < SMALL for parameter in unfrozen().parameters())
    train(unfrozen(), tmp_path / "eight", max_steps=8, optimizer={"name": "adamw8bit", "weight_decay": 0.1})
    train(unfrozen(), tmp_path / "full", max_steps=8, optimizer={"weight_decay": 0.1})
    assert losses(tmp_path / "eight") == pytest.approx(losses(tmp_path / "full"), abs=1e-5)


def test_the_loss_falls_as_with_float32_moments(tmp_path) -> None:
    for name in ("adamw", "adamw8bit", "sgd"):
        train(unfrozen(wide=5), tmp_path / name, max_steps=40, optimizer={"name": name, "lr": 2e-3})
    eight, full = losses(tmp_path / "adamw8bit"), losses(tmp_path / "adamw")
    assert eight != full
    assert full[-1] < 0.5 * full[0]
    assert eight == pytest.approx(full, rel=0.02)
    assert losses(tmp_path / "sgd")[-1] > 2 * full[-1]  # another optimizer is far from it
    kinds = {str(tensor.dtype) for key, tensor in stored(tmp_path / "adamw8bit", 40).items() if key[:7] == "exp_avg"}
    assert kinds == {"torch.uint8", "torch.float32"}


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_pages_are_the_gpus_and_a_cpu_run_says_so(name: str, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("is about machines without a GPU")
    train(unfrozen(wide=5), tmp_path / "paged", max_steps=3, optimizer={"name": name})
    assert f"paging needs a CUDA device; using {name.removeprefix('paged_')}" in capsys.readouterr().err
    train(unfrozen(wide=5), tmp_path / "plain", max_steps=3, optimizer={"name": name.removeprefix("paged_")})
    assert losses(tmp_path / "paged") == losses(tmp_path / "plain")


def test_state_of_another_optimizer_is_refused(tmp_path) -> None:
    train(unfrozen(wide=5), tmp_path, max_steps=2, optimizer={"name": "adamw"})
    with pytest.raises(InputError, match="is of another optimizer"):
        train(unfrozen(wide=5), tmp_path, max_steps=4, optimizer={"name": "adamw8bit"}, resume=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_a_gpu_trains_as_the_cpu_does_and_resumes_bit_for_bit(tmp_path, name: str) -> None:
    plain = name.removeprefix("paged_")
    settings = {"optimizer": {"name": name, "lr": 1e-3}, "save_every": 5, "keep_last": 5}
    train(unfrozen(wide=24).to("cuda"), tmp_path / "gpu", max_steps=10, **settings)
    train(unfrozen(wide=24), tmp_path / "cpu", max_steps=10, optimizer={"name": plain, "lr": 1e-3})
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-2)
    again = tmp_path / "again"
    train(unfrozen(wide=24).to("cuda"), again, max_steps=5, schedule={"name": "constant", "warmup": 0}, **settings)
    train(
        unfrozen(wide=24).to("cuda"),
        again,
        max_steps=10,
        schedule={"name": "constant", "warmup": 0},
        resume=True,
        **settings,
    )
    whole = tmp_path / "whole"
    train(unfrozen(wide=24).to("cuda"), whole, max_steps=10, schedule={"name": "constant", "warmup": 0}, **settings)
    first, second = stored(again, 10), stored(whole, 10)
    assert all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.gpu
def test_paged_moments_lie_in_managed_memory() -> None:
    model = unfrozen(wide=24).to("cuda")
    optimizer = build_optimizer(optimizer_config("paged_adamw8bit"), MasterWeights(model))
    large = [state for tensor, state in optimizer.state.items() if tensor.numel() >= 100_000]
    assert large
    assert all(getattr(state["exp_avg"], "is_paged", False) for state in large)

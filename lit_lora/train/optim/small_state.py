"""AdamW whose moments take one byte a number, or lie in memory that the GPU's driver pages out.

A moment is stored in blocks of 256 numbers: each an 8-bit code of its share of the block's largest. The codes stand for
values whose spacing grows with their size, so small moments keep their digits. Source: Dettmers et al. 2021, "8-bit
Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2; paging: arXiv:2305.14314, section 3.

On a GPU bitsandbytes' kernels do the step; elsewhere PyTorch does the same arithmetic. The state is the same tensors in
both, so a run may go on where the other began.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lit_lora.errors import UsageError
from lit_lora.quantize import bitsandbytes

__all__ = ["BLOCK", "SMALL", "SmallStateAdamW", "dequantize", "dynamic_map", "quantize"]

BLOCK = 256
"""Numbers that share a scale."""

SMALL = 4096
"""Tensors with fewer numbers keep float32 moments: vectors matter more than they weigh."""

_PAGED = 100_000
"""Moments of fewer numbers are not worth a page."""

_CHUNK = 1 << 20
"""Numbers in float32 at a time; a multiple of ``BLOCK``."""


@lru_cache(maxsize=4)
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of the codes, (256,) float32, ascending within [-1, 1], or within [0, 1].

    For i of 0 to 6: the middles of equal cells of [0.1, 1], times 10^(i - 6); 2^i cells with both signs, or 2^(i + 1)
    with one; 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (middles.neg().tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@lru_cache(maxsize=4)
def _nearest(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each upper half of a float32: the code of the least number with it, and above which number the next begins.

    The map is so coarse that at most one border of codes lies among numbers of one upper half: looking a code up here
    and comparing once gives what a search among all borders gives, many times as fast.

    Returns:
        (65536,) uint8 and (65536,) float32.
    """
    values = dynamic_map(signed, torch.device("cpu"))
    borders = (values[:-1] + values[1:]) / 2
    halves = torch.arange(1 << 16) << 16
    ends = [bits.to(torch.int32).view(torch.float32) for bits in (halves, halves | 0xFFFF)]
    first = torch.bucketize(torch.minimum(*ends), borders)
    border = torch.cat([borders, borders.new_tensor([torch.inf])])[first]
    return first.to(device, torch.uint8), border.to(device)


def quantize(x: Tensor, signed: bool, codes: Tensor, absmax: Tensor) -> None:
    """Write the nearest codes of ``x`` and the largest magnitude of each block, in place.

    Args:
        x: (n,) float32.
        signed: Which map.
        codes: (n,) uint8.
        absmax: (n / 256 rounded up,) float32.
    """
    first, border = _nearest(signed, x.device)
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    scaled = (blocks * absmax.clamp(min=1e-38).reciprocal()[:, None]).view(-1)[: x.numel()]
    halves = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    torch.add(first.index_select(0, halves), scaled > border.index_select(0, halves), out=codes)


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The numbers, (n,) float32, of (n,) uint8 codes and the magnitudes of their blocks."""
    values = dynamic_map(signed, codes.device).index_select(0, codes.int())
    whole = values.numel() // BLOCK * BLOCK
    values[:whole].view(-1, BLOCK).mul_(absmax[: whole // BLOCK, None])
    values[whole:].mul_(absmax[whole // BLOCK :])
    return values


class SmallStateAdamW(torch.optim.Optimizer):
    """AdamW with 8-bit or paged moments.

    Args:
        params: Groups with their ``weight_decay``; float32 tensors.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        bits: 8, or 32 for moments as they are.
        paged: Large moments in memory of the machine that the GPU reaches; every parameter is on a CUDA device.

    Raises:
        UsageError: ``paged`` without bitsandbytes.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        bits: int = 8,
        paged: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self._paged = paged
        self._bitsandbytes = _bitsandbytes(needed=paged)
        for group in self.param_groups:  # at once, so that a lack of memory shows before the first step
            for parameter in group["params"]:
                self.state[parameter] = self._zeros(parameter, bits)

    def _zeros(self, parameter: Tensor, bits: int) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        count, device = parameter.numel(), parameter.device
        state = {"step": torch.zeros((), dtype=torch.float32)}
        eight = bits == 8 and count >= SMALL
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = self._buffer(parameter, torch.uint8 if eight else torch.float32)
            if eight:  # a block whose largest is 0 is 0 whatever its codes
                state[f"{name}_absmax"] = torch.zeros(-(-count // BLOCK), dtype=torch.float32, device=device)
        return state

    def _buffer(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        if self._paged and parameter.numel() >= _PAGED:
            buffer: Tensor = self._bitsandbytes.get_paged(*parameter.shape, dtype=dtype, device=parameter.device)
            return buffer
        return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient, in place."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state["step"] += 1
                if parameter.device.type == "cuda" and self._bitsandbytes is not None:
                    self._step_on_gpu(parameter, state, group)
                else:
                    _step(parameter, state, group)
        if self._paged:
            torch.cuda.synchronize()  # pages are read by the CPU when a checkpoint is written

    def _step_on_gpu(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One parameter by bitsandbytes' kernel."""
        gradient, (beta1, beta2) = parameter.grad, group["betas"]
        assert gradient is not None
        given = {"eps": group["eps"], "step": int(state["step"]), "lr": group["lr"]}
        given["weight_decay"] = group["weight_decay"]
        moments = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"], "beta1": beta1, "beta2": beta2}
        start = ("adam", gradient.contiguous(), parameter)
        if state["exp_avg"].dtype == torch.float32:
            self._bitsandbytes.optimizer_update_32bit(*start, **moments, **given)
            return
        maps = {"qmap1": dynamic_map(True, parameter.device), "qmap2": dynamic_map(False, parameter.device)}
        scales = {"absmax1": state["exp_avg_absmax"], "absmax2": state["exp_avg_sq_absmax"]}
        self._bitsandbytes.optimizer_update_8bit_blockwise(
            *start, beta3=0.0, alpha=0.0, **moments, **given, **maps, **scales
        )


def _step(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One parameter in PyTorch, piece by piece: the float32 copies of its moments stay small."""
    assert parameter.grad is not None
    beta1, beta2 = group["betas"]
    step = int(state["step"])
    root = math.sqrt(1 - beta2**step)
    values, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
    for start in range(0, values.numel(), _CHUNK):
        place = slice(start, start + _CHUNK)
        value, grad = values[place], gradient[place]
        first, second = _read(state, "exp_avg", place), _read(state, "exp_avg_sq", place)
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(first, second.sqrt().div_(root).add_(group["eps"]), value=-group["lr"] / (1 - beta1**step))
        _write(state, "exp_avg", place, first)
        _write(state, "exp_avg_sq", place, second)


def _read(state: dict[str, Tensor], name: str, place: slice) -> Tensor:
    """A part of a moment in float32: a view where it is stored so."""
    part = state[name].view(-1)[place]
    if part.dtype == torch.float32:
        return part
    return dequantize(part, state[f"{name}_absmax"][place.start // BLOCK : place.stop // BLOCK], name == "exp_avg")


def _write(state: dict[str, Tensor], name: str, place: slice, moment: Tensor) -> None:
    """Store a part of a moment that is not a view."""
    part = state[name].view(-1)[place]
    if part.dtype != torch.float32:
        scales = state[f"{name}_absmax"][place.start // BLOCK : place.stop // BLOCK]
        quantize(moment, name == "exp_avg", part, scales)


def _bitsandbytes(*, needed: bool) -> Any:
    """``bitsandbytes.functional``, or ``None`` where its kernels cannot run.

    Raises:
        UsageError: It is needed and not there.
    """
    if not torch.cuda.is_available():
        return None
    module = bitsandbytes.load()  # seconds, and only a GPU has a use for it
    if module is None and needed:
        raise UsageError(
            "optimizer.name: paged optimizers need bitsandbytes", hint="pip install bitsandbytes, or take adamw8bit"
        )
    return None if module is None else module.functional

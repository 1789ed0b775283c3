"""AdamW whose moments take one byte per parameter, or lie in memory that the GPU's driver pages out.

A moment is stored in blocks of 256 values: each an 8-bit code of its share of the block's largest. The codes stand for
values whose spacing grows with their size, so small moments keep their digits. Source: Dettmers et al. 2021, "8-bit
Optimizers via Block-wise Quantization", arXiv:2110.02861, section 2; paging: arXiv:2305.14314, section 3.

On a GPU a step is done by bitsandbytes' kernels, elsewhere by the same arithmetic in PyTorch. Both have the same state,
so a run may be resumed on either.
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
"""Values that share a scale."""

SMALL = 4096
"""Tensors with fewer parameters keep float32 moments: norms and biases matter more than the memory they take."""

_PAGED = 100_000
"""Tensors with fewer parameters stay in the GPU's memory."""

_CHUNK = 1 << 20
"""Values in float32 at a time, on a CPU; a multiple of ``BLOCK``."""


@lru_cache(maxsize=4)
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The values of the 256 codes, (256,) float32, ascending within [-1, 1], or within [0, 1] if not ``signed``.

    They are 0, 1, and for i from 0 to 6 the middles of equal cells of [0.1, 1], times 10^(i - 6): 2^i cells, each with
    both signs, or 2^(i + 1) cells.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (middles.neg().tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@lru_cache(maxsize=4)
def _nearest(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tables by the upper 16 bits of a float32: the lowest code among such numbers, and where the next code begins.

    The map is so coarse that at most one border of codes lies among numbers with the same upper half: looking a code up
    here and comparing once gives what a search among all borders gives, many times as fast.

    Returns:
        (65536,) uint8 and (65536,) float32.
    """
    values = dynamic_map(signed, torch.device("cpu"))
    borders = (values[:-1] + values[1:]) / 2

    # The numbers with one upper half run from lower half 0 to lower half 0xFFFF; of a negative one, downwards.
    upper_halves = torch.arange(1 << 16) << 16
    one_end = upper_halves.to(torch.int32).view(torch.float32)
    other_end = (upper_halves | 0xFFFF).to(torch.int32).view(torch.float32)
    lowest_code = torch.bucketize(torch.minimum(one_end, other_end), borders)
    next_border = torch.cat([borders, borders.new_tensor([torch.inf])])[lowest_code]
    return lowest_code.to(device, torch.uint8), next_border.to(device)


def quantize(x: Tensor, signed: bool, codes: Tensor, absmax: Tensor) -> None:
    """Write the nearest codes of ``x`` and the largest magnitude of each block, in place.

    Args:
        x: (n,) float32.
        signed: Whether the map has negative values.
        codes: (n,) uint8; written.
        absmax: (n / 256 rounded up,) float32; written.
    """
    lowest_code, next_border = _nearest(signed, x.device)
    blocks = torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    scaled = (blocks * absmax.clamp(min=1e-38).reciprocal()[:, None]).view(-1)[: x.numel()]

    upper_halves = scaled.view(torch.int32).bitwise_right_shift(16).bitwise_and_(0xFFFF)
    beyond_border = scaled > next_border.index_select(0, upper_halves)
    torch.add(lowest_code.index_select(0, upper_halves), beyond_border, out=codes)


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The values, (n,) float32, of (n,) uint8 codes and the magnitudes of their blocks."""
    values = dynamic_map(signed, codes.device).index_select(0, codes.int())
    whole_blocks = values.numel() // BLOCK
    rest = whole_blocks * BLOCK
    values[:rest].view(-1, BLOCK).mul_(absmax[:whole_blocks, None])
    values[rest:].mul_(absmax[whole_blocks:])  # the last block may be shorter
    return values


class SmallStateAdamW(torch.optim.Optimizer):
    """AdamW with 8-bit or paged moments.

    Args:
        params: Groups with their ``weight_decay``; float32 tensors.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        bits: 8, or 32 for float32 moments.
        paged: Put large moments into memory that the driver moves between GPU and machine; all parameters must be on a
            CUDA device.

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
        for group in self.param_groups:  # now and not in the first step, so that a lack of memory shows at once
            for parameter in group["params"]:
                self.state[parameter] = self._zeros(parameter, bits)

    def _zeros(self, parameter: Tensor, bits: int) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        count, device = parameter.numel(), parameter.device
        is_8bit = bits == 8 and count >= SMALL
        dtype = torch.uint8 if is_8bit else torch.float32
        blocks = -(-count // BLOCK)

        state = {"step": torch.zeros((), dtype=torch.float32)}
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = self._buffer(parameter, dtype)
            if is_8bit:  # code 0 is not the value 0, but a block with magnitude 0 is 0 whatever its codes
                state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=device)
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
            torch.cuda.synchronize()  # the CPU reads pages directly, to write a checkpoint, without waiting for the GPU

    def _step_on_gpu(self, parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """One parameter by bitsandbytes' kernel."""
        assert parameter.grad is not None
        beta1, beta2 = group["betas"]
        positional = ("adam", parameter.grad.contiguous(), parameter)
        settings = {
            "beta1": beta1,
            "beta2": beta2,
            "eps": group["eps"],
            "step": int(state["step"]),
            "lr": group["lr"],
            "weight_decay": group["weight_decay"],
        }
        moments = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
        if state["exp_avg"].dtype == torch.float32:
            self._bitsandbytes.optimizer_update_32bit(*positional, **moments, **settings)
            return

        codes = {
            "qmap1": dynamic_map(True, parameter.device),  # the first moment has both signs,
            "qmap2": dynamic_map(False, parameter.device),  # the second, a mean of squares, only one
            "absmax1": state["exp_avg_absmax"],
            "absmax2": state["exp_avg_sq_absmax"],
        }
        unused = {"beta3": 0.0, "alpha": 0.0}  # of other optimizers
        self._bitsandbytes.optimizer_update_8bit_blockwise(*positional, **moments, **settings, **codes, **unused)


def _step(parameter: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """One parameter in PyTorch, chunk by chunk, so that the float32 copies of its moments stay small."""
    assert parameter.grad is not None
    lr, (beta1, beta2) = group["lr"], group["betas"]
    step = int(state["step"])
    # Moments start at 0; these undo what that takes from the first steps' means.
    first_correction = 1 - beta1**step
    second_correction = math.sqrt(1 - beta2**step)

    values, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
    for start in range(0, values.numel(), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        value, grad = values[chunk], gradient[chunk]
        first = _read(state, "exp_avg", chunk)
        second = _read(state, "exp_avg_sq", chunk)

        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        value.mul_(1 - lr * group["weight_decay"])
        root = second.sqrt().div_(second_correction).add_(group["eps"])
        value.addcdiv_(first, root, value=-lr / first_correction)

        _write(state, "exp_avg", chunk, first)
        _write(state, "exp_avg_sq", chunk, second)


def _read(state: dict[str, Tensor], name: str, chunk: slice) -> Tensor:
    """A chunk of a moment in float32; a view where it is stored as float32."""
    stored = state[name].view(-1)[chunk]
    if stored.dtype == torch.float32:
        return stored
    absmax = state[f"{name}_absmax"][chunk.start // BLOCK : chunk.stop // BLOCK]
    return dequantize(stored, absmax, signed=name == "exp_avg")


def _write(state: dict[str, Tensor], name: str, chunk: slice, moment: Tensor) -> None:
    """Store a chunk of a moment that :func:`_read` gave; nothing to do where that was a view."""
    stored = state[name].view(-1)[chunk]
    if stored.dtype == torch.float32:
        return
    absmax = state[f"{name}_absmax"][chunk.start // BLOCK : chunk.stop // BLOCK]
    quantize(moment, name == "exp_avg", stored, absmax)


def _bitsandbytes(*, needed: bool) -> Any:
    """``bitsandbytes.functional``, or ``None`` where its kernels cannot run.

    Raises:
        UsageError: It is needed and not installed.
    """
    if not torch.cuda.is_available():
        return None
    module = bitsandbytes.load()  # takes seconds, and only a GPU has a use for it
    if module is None and needed:
        raise UsageError(
            "optimizer.name: paged optimizers need bitsandbytes", hint="pip install bitsandbytes, or use adamw8bit"
        )
    return None if module is None else module.functional

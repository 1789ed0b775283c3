"""The maths of LoRA linears, ``y = x W^T + b + s (x A^T) B^T``, with the backward written out.

Nothing else in the package knows how the product is computed, so this is the one file to tune for speed. What autograd
would do and this does not: it saves ``x`` once for all uses (nothing when ``A`` is frozen), and never forms a gradient
of the frozen ``W``. Layers that read the same ``x`` (q, k, v; gate, up) go together: their ``A`` are one product, and
their input gradients add up in place.

A weight that is stored quantised is dequantised for each product and kept nowhere.

The update is computed first and the base product accumulates onto it, so their sum is rounded once, from float32. The
other way round, a bfloat16 base output would be rounded before a small update is added, and half of the updates of the
first steps would be lost.

Source: LoRA, Hu et al. 2021, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_lora.model.ops import linear
from lit_lora.quantize import Quantized, QuantizedLinear

__all__ = ["Part", "lora_linear", "lora_linear_reference", "lora_linears", "stored_weight"]


class Part(NamedTuple):
    """One layer's tensors."""

    weight: Tensor | Quantized
    """(out, in), in the dtype of the input; frozen or not. A quantised one is frozen."""
    bias: Tensor | None
    """(out,)."""
    A: Tensor
    """(R, in), usually float32."""
    B: Tensor
    """(out, R), usually float32."""
    scaling: float
    """The factor ``s`` of the update."""


def stored_weight(layer: nn.Linear) -> Tensor | Quantized:
    """The weight of a linear layer as it is stored, for a :class:`Part`."""
    return layer.quantized if isinstance(layer, QuantizedLinear) else layer.weight


def lora_linears(x: Tensor, parts: Sequence[Part], mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Linear layers of one input, each with a low-rank update.

    Products run in the dtype of ``x``; the gradients of ``A`` and ``B`` come back in their own dtype (float32), so
    micro-batches add up in float32.

    Args:
        x: (..., in).
        parts: The layers.
        mask: (..., in) bool or None: the inputs that the updates see (dropout); the caller puts 1 / keep into ``s``.

    Returns:
        (..., out) of each layer, in the dtype of ``x``.
    """
    if not torch.is_grad_enabled() and x.numel() == x.shape[-1] and mask is None:
        return tuple(_one_token(x, part) for part in parts)
    tensors = [None if isinstance(tensor, Quantized) else tensor for part in parts for tensor in part[:4]]
    fixed = [(part.scaling, part.weight if isinstance(part.weight, Quantized) else None) for part in parts]
    outputs: tuple[Tensor, ...] = _LoRALinears.apply(x, mask, fixed, *tensors)  # type: ignore[no-untyped-call]
    return outputs


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """One layer of :func:`lora_linears`."""
    return lora_linears(x, [Part(weight, bias, A, B, scaling)], mask)[0]


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """The same by plain autograd: what the tests hold :func:`lora_linear` against. Shapes as there."""
    branch = x if mask is None else x * mask
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y + scaling * (branch @ A.to(x.dtype).T) @ B.to(x.dtype).T


def _one_token(x: Tensor, part: Part) -> Tensor:
    """One layer for one token, as in decoding: all products are matrix-vector products."""
    bias = None if part.bias is None else part.bias.to(x.dtype)
    if isinstance(part.weight, Quantized):
        base = part.weight.matrix_vector(x.reshape(-1)).view(*x.shape[:-1], -1)
        base = base.float() if bias is None else base.float() + bias.float()
    else:
        base = linear(x, part.weight, bias).float()
    low = linear(x, part.A.to(x.dtype)).to(part.B.dtype)
    return (base + part.scaling * linear(low, part.B).float()).to(x.dtype)


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, fixed: list[tuple[float, Quantized | None]], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        parts = _parts(tensors, fixed)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        flat_mask = None if mask is None else mask.reshape(flat.shape)
        low = _masked(flat, flat_mask) @ _stacked(parts, x.dtype).T  # (tokens, all ranks)
        outputs = []
        for part, part_low in zip(parts, torch.split(low, [p.A.shape[0] for p in parts], dim=1), strict=True):
            y = part_low @ (part.B * part.scaling).to(x.dtype).T  # (tokens, out)
            if part.bias is not None:
                y += part.bias.to(x.dtype)
            outputs.append(_accumulate(y, flat, _dense(part.weight, x.dtype).T).view(*x.shape[:-1], -1))
        ctx.fixed, ctx.shape = fixed, x.shape
        trains_A = any(ctx.needs_input_grad[5::4]) or any(ctx.needs_input_grad[3::4])
        ctx.save_for_backward(flat if trains_A else None, flat_mask, low, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, low, *tensors = ctx.saved_tensors
        parts = _parts(tensors, ctx.fixed)
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        lows = torch.split(low, [part.A.shape[0] for part in parts], dim=1)
        grad_low = torch.zeros_like(low)
        grad_lows = torch.split(grad_low, [part.A.shape[0] for part in parts], dim=1)
        results: list[Tensor | None] = []
        flats: list[Tensor | None] = []
        for index, (part, grad) in enumerate(zip(parts, grads, strict=True)):
            need_weight, need_bias, _, need_B = needs[4 * index : 4 * index + 4]
            grad_weight = grad_bias = grad_B = None
            flat = None if grad is None else grad.reshape(-1, grad.shape[-1])  # (tokens, out)
            flats.append(flat)
            if flat is not None:
                grad_lows[index].copy_(flat @ (part.B * part.scaling).to(flat.dtype))
                if need_B:  # the wide operand goes last: faster
                    grad_B = (lows[index].T @ flat).T.to(part.B.dtype).mul_(part.scaling)  # (out, R)
                if need_weight:
                    grad_weight = flat.T @ x
                if need_bias:
                    grad_bias = flat.sum(0, dtype=None if part.bias is None else part.bias.dtype)
            results += [grad_weight, grad_bias, None, grad_B]
        if any(needs[2::4]):
            grad_A = grad_low.T @ _masked(x, mask)  # (all ranks, in)
            for index, piece in enumerate(torch.split(grad_A, [part.A.shape[0] for part in parts])):
                results[4 * index + 2] = piece.to(parts[index].A.dtype) if needs[4 * index + 2] else None
        grad_x = None
        if need_x:
            grad_x = _masked(grad_low @ _stacked(parts, low.dtype), mask)  # (tokens, in)
            for part, flat in zip(parts, flats, strict=True):
                if flat is not None:
                    _accumulate(grad_x, flat, _dense(part.weight, flat.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *results


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``total += left @ right``, in place.

    oneDNN gives a bfloat16 product of 513 to 1,400 rows and few columns to one of two threads (1.1 instead of 1.7 to
    2.3 TFLOP/s), so that one goes in parts of at most 512 rows: 8 % of a step of 860 tokens.
    """
    rows, columns = total.shape
    if total.device.type != "cpu" or not 512 < rows < 1408 or columns >= 1024:
        return total.addmm_(left, right)
    size = -(-rows // -(-rows // 512))
    for part, part_left in zip(torch.split(total, size), torch.split(left, size), strict=True):
        part.addmm_(part_left, right)
    return total


def _parts(tensors: Sequence[Any], fixed: Sequence[tuple[float, Quantized | None]]) -> list[Part]:
    parts = []
    for index, (scaling, quantized) in enumerate(fixed):
        weight, bias, A, B = tensors[4 * index : 4 * index + 4]
        parts.append(Part(weight if quantized is None else quantized, bias, A, B, scaling))
    return parts


def _dense(weight: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor, (out, in)."""
    return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight


def _stacked(parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """All ``A`` below one another, (all ranks, in)."""
    return torch.cat([part.A for part in parts]).to(dtype)


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask

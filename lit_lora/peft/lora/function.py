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

from lit_lora import kernels
from lit_lora.model.ops import linear
from lit_lora.model.products import sum_of_products
from lit_lora.quantize import Quantized, QuantizedLinear

__all__ = ["Part", "drop_inputs", "lora_linear", "lora_linear_reference", "lora_linears", "stored_weight"]


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


def drop_inputs(x: Tensor, share: float, training: bool) -> tuple[float, Tensor | None]:
    """The share of inputs that dropout leaves to the updates, and which, (..., in) bool; ``None`` where it is all."""
    if not (training and share):
        return 1.0, None
    keep = 1 - share
    return keep, torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep)


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
        A, scaled_Bs = _factors(parts, x.dtype)
        low = sum_of_products((_masked(flat, flat_mask), A.T))  # (tokens, all ranks)
        outputs = []
        for part, part_low, scaled_B in zip(parts, _split(low, scaled_Bs), scaled_Bs, strict=True):
            update, base = (part_low, scaled_B.T), (flat, _dense(part.weight, x.dtype).T)
            y = sum_of_products(update, base, start=None if part.bias is None else part.bias.to(x.dtype))
            outputs.append(y.view(*x.shape[:-1], -1))
        ctx.fixed, ctx.shape = fixed, x.shape
        trains_A = any(ctx.needs_input_grad[5::4]) or any(ctx.needs_input_grad[3::4])
        ctx.factors = (A, scaled_Bs) if kernels.device_type(x.device) == "cuda" else None
        ctx.save_for_backward(flat if trains_A else None, flat_mask, low, *tensors)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, low, *tensors = ctx.saved_tensors
        needs, results = ctx.needs_input_grad[3:], list[Tensor | None]([None] * len(tensors))
        flats = {i: grad.reshape(-1, grad.shape[-1]) for i, grad in enumerate(grads) if grad is not None}
        if not flats:
            return None, None, None, *results
        parts = _parts(tensors, ctx.fixed)
        A, scaled_Bs = ctx.factors or _factors(parts, low.dtype)
        lows = _split(low, scaled_Bs)  # (tokens, R) each
        grad_lows = [
            sum_of_products((flats[i], scaled_B)) if i in flats else torch.zeros_like(lows[i])
            for i, scaled_B in enumerate(scaled_Bs)
        ]
        for i, flat in flats.items():  # (tokens, out)
            need_weight, need_bias, _, need_B = needs[4 * i : 4 * i + 4]
            if need_weight:
                results[4 * i] = flat.T @ x
            if need_bias:
                results[4 * i + 1] = flat.sum(0, dtype=tensors[4 * i + 1].dtype)
            if need_B:  # (out, R)
                results[4 * i + 3] = _over_tokens(flat, lows[i], parts[i].B.dtype).mul_(parts[i].scaling)
        grad_low = torch.cat(grad_lows, dim=1) if len(grad_lows) > 1 else grad_lows[0]
        if any(needs[2::4]):
            grad_A = _over_tokens(grad_low, _masked(x, mask), parts[0].A.dtype)  # (all ranks, in)
            pieces = torch.split(grad_A, [part.A.shape[0] for part in parts])
            results[2::4] = [piece if need else None for piece, need in zip(pieces, needs[2::4], strict=True)]
        grad_x = None
        if ctx.needs_input_grad[0]:
            bases = [(flat, _dense(parts[i].weight, flat.dtype)) for i, flat in flats.items()]
            if mask is None:
                grad_x = sum_of_products((grad_low, A), *bases)  # (tokens, in)
            else:
                grad_x = sum_of_products(*bases, start=_masked(grad_low @ A, mask))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *results


def _factors(parts: Sequence[Part], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All ``A`` below one another, (all ranks, in), and each ``s B``, (out, R).

    A GPU keeps them from the forward to the backward: it waits longer for a small operation to be launched than it
    takes for it.
    """
    A = torch.cat([part.A for part in parts]) if len(parts) > 1 else parts[0].A
    return A.to(dtype), [torch.mul(p.B, p.scaling, out=torch.empty_like(p.B, dtype=dtype)) for p in parts]


def _split(low: Tensor, scaled_Bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(tokens, all ranks) to (tokens, R) of each layer."""
    return torch.split(low, [B.shape[1] for B in scaled_Bs], dim=1) if len(scaled_Bs) > 1 else (low,)


def _over_tokens(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left.T @ right``: the gradient of a factor, summed over tokens."""
    if left.is_cuda:
        return sum_of_products((left.T, right), dtype=dtype)
    if left.shape[1] > right.shape[1]:  # on a CPU it is faster with the wide operand last
        return sum_of_products((right.T.contiguous(), left), dtype=dtype).T
    return sum_of_products((left.T.contiguous(), right), dtype=dtype)


def _parts(tensors: Sequence[Any], fixed: Sequence[tuple[float, Quantized | None]]) -> list[Part]:
    parts = []
    for index, (scaling, quantized) in enumerate(fixed):
        weight, bias, A, B = tensors[4 * index : 4 * index + 4]
        parts.append(Part(weight if quantized is None else quantized, bias, A, B, scaling))
    return parts


def _dense(weight: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor, (out, in)."""
    return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask

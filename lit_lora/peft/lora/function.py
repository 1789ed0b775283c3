"""The math of LoRA linears, ``y = x W^T + b + s (x A^T) B^T``, with the backward pass written out.

Nothing else in the package knows how the product is computed, so this is the one file to tune for speed. Unlike plain
autograd, it saves ``x`` once for all uses (and not at all if ``A`` is frozen), and never forms a gradient of the frozen
``W``. Layers that read the same ``x`` (q, k, v; gate, up) are computed together: their ``A`` are one product, and their
input gradients add up in place.

A quantized weight is dequantized for each product and never saved.

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
    """(out, in), in the dtype of the input; frozen or not. A quantized one is frozen."""
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
    """Dropout for the updates: the share of inputs to keep, and a mask of them, (..., in) bool, or ``None`` for all.

    Args:
        x: (..., in).
        share: Share of the inputs to drop.
        training: Without it, nothing is dropped.
    """
    if not training or share == 0:
        return 1.0, None
    keep = 1 - share
    return keep, torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(keep)


def lora_linears(x: Tensor, parts: Sequence[Part], mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """Linear layers of one input, each with a low-rank update.

    Products run in the dtype of ``x``; the gradients of ``A`` and ``B`` have their own dtype (float32), so that
    micro-batches accumulate in float32.

    Args:
        x: (..., in).
        parts: The layers.
        mask: (..., in) bool or None: the inputs that the updates see (dropout); the caller includes 1 / keep in ``s``.

    Returns:
        (..., out) of each layer, in the dtype of ``x``.
    """
    is_one_token = x.numel() == x.shape[-1]
    if is_one_token and not torch.is_grad_enabled() and mask is None:
        return tuple(_one_token(x, part) for part in parts)

    # Autograd sees tensors only if they are arguments of their own: four per layer. A quantized weight is no tensor and
    # needs no gradient, so it goes with the constants.
    constants: list[tuple[float, Quantized | None]] = []
    tensors: list[Tensor | None] = []
    for part in parts:
        if isinstance(part.weight, Quantized):
            constants.append((part.scaling, part.weight))
            tensors += [None, part.bias, part.A, part.B]
        else:
            constants.append((part.scaling, None))
            tensors += [part.weight, part.bias, part.A, part.B]
    outputs: tuple[Tensor, ...] = _LoRALinears.apply(x, mask, constants, *tensors)  # type: ignore[no-untyped-call]
    return outputs


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """One layer of :func:`lora_linears`."""
    return lora_linears(x, [Part(weight, bias, A, B, scaling)], mask)[0]


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """The same by plain autograd, with which the tests compare :func:`lora_linear`."""
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
    """The function of :func:`lora_linears`. Its arguments are x, mask, constants, and (W, b, A, B) for each layer.

    So with ``needs_input_grad``, which has one entry per argument, ``[3::4]`` are the weights, ``[4::4]`` the biases,
    ``[5::4]`` the ``A`` and ``[6::4]`` the ``B``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor | None,
        constants: list[tuple[float, Quantized | None]],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        parts = _parts(tensors, constants)
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        flat_mask = None if mask is None else mask.reshape(flat.shape)

        A, scaled_Bs = _factors(parts, x.dtype)
        low = sum_of_products((_masked(flat, flat_mask), A.T))  # (tokens, all ranks)
        outputs = []
        for part, part_low, scaled_B in zip(parts, _split(low, scaled_Bs), scaled_Bs, strict=True):
            update = (part_low, scaled_B.T)
            base = (flat, _dense(part.weight, x.dtype).T)
            bias = None if part.bias is None else part.bias.to(x.dtype)
            y = sum_of_products(update, base, start=bias)
            # Not `view`: some models of transformers change outputs in place, which autograd forbids for views.
            outputs.append(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]))

        # Only the gradients of A and of a trained W need x, the largest tensor to save; that of B needs x A^T.
        trains_A = any(ctx.needs_input_grad[5::4])
        trains_weight = any(ctx.needs_input_grad[3::4])
        ctx.save_for_backward(flat if trains_A or trains_weight else None, flat_mask, low, *tensors)
        ctx.constants = constants
        ctx.shape = x.shape
        # A GPU takes longer to launch these small operations than to run them, so they are not repeated.
        ctx.factors = (A, scaled_Bs) if kernels.device_type(x.device) == "cuda" else None
        # An output that the loss does not use has the gradient None, not a tensor of zeros to multiply by.
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, mask, low, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]  # four per layer, as results
        results: list[Tensor | None] = [None] * len(tensors)
        # By the layer's index, for a layer without a gradient has none: (tokens, out).
        grad_ys = {i: grad.reshape(-1, grad.shape[-1]) for i, grad in enumerate(grads) if grad is not None}
        if not grad_ys:
            return None, None, None, *results

        parts = _parts(tensors, ctx.constants)
        A, scaled_Bs = ctx.factors or _factors(parts, low.dtype)
        lows = _split(low, scaled_Bs)  # (tokens, R) each

        # The gradient of x A^T, which those of A and x both need.
        grad_lows = [
            sum_of_products((grad_ys[i], scaled_B)) if i in grad_ys else torch.zeros_like(lows[i])
            for i, scaled_B in enumerate(scaled_Bs)
        ]
        grad_low = torch.cat(grad_lows, dim=1) if len(grad_lows) > 1 else grad_lows[0]  # (tokens, all ranks)

        for i, grad_y in grad_ys.items():
            need_weight, need_bias, _, need_B = needs[4 * i : 4 * i + 4]
            if need_weight:
                results[4 * i] = grad_y.T @ x
            if need_bias:
                results[4 * i + 1] = grad_y.sum(0, dtype=tensors[4 * i + 1].dtype)
            if need_B:  # (out, R)
                results[4 * i + 3] = _over_tokens(grad_y, lows[i], parts[i].B.dtype).mul_(parts[i].scaling)

        needs_A = needs[2::4]
        if any(needs_A):
            grad_A = _over_tokens(grad_low, _masked(x, mask), parts[0].A.dtype)  # (all ranks, in)
            grad_As = torch.split(grad_A, [part.A.shape[0] for part in parts])
            results[2::4] = [grad if need else None for grad, need in zip(grad_As, needs_A, strict=True)]

        grad_x = None
        if ctx.needs_input_grad[0]:
            through_base = [(grad_y, _dense(parts[i].weight, grad_y.dtype)) for i, grad_y in grad_ys.items()]
            if mask is None:
                grad_x = sum_of_products((grad_low, A), *through_base)  # (tokens, in)
            else:  # only the update's part of it went through dropout
                grad_x = sum_of_products(*through_base, start=_masked(grad_low @ A, mask))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, *results


def _factors(parts: Sequence[Part], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """All ``A`` stacked, (all ranks, in), and each ``s B``, (out, R), in ``dtype``."""
    A = torch.cat([part.A for part in parts]) if len(parts) > 1 else parts[0].A
    # Multiplied in float32 and rounded once, without a float32 tensor in between.
    scaled_Bs = [torch.mul(part.B, part.scaling, out=torch.empty_like(part.B, dtype=dtype)) for part in parts]
    return A.to(dtype), scaled_Bs


def _split(low: Tensor, scaled_Bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """(tokens, all ranks) to (tokens, R) per layer."""
    return torch.split(low, [B.shape[1] for B in scaled_Bs], dim=1) if len(scaled_Bs) > 1 else (low,)


def _over_tokens(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left.T @ right``: the gradient of a factor, summed over tokens."""
    if left.is_cuda:
        return sum_of_products((left.T, right), dtype=dtype)
    if left.shape[1] > right.shape[1]:  # on a CPU it is faster with the wide operand last
        return sum_of_products((right.T.contiguous(), left), dtype=dtype).T
    return sum_of_products((left.T.contiguous(), right), dtype=dtype)


def _parts(tensors: Sequence[Any], constants: Sequence[tuple[float, Quantized | None]]) -> list[Part]:
    """The layers, put together again from the arguments of :class:`_LoRALinears`."""
    parts = []
    for index, (scaling, quantized) in enumerate(constants):
        weight, bias, A, B = tensors[4 * index : 4 * index + 4]
        parts.append(Part(weight if quantized is None else quantized, bias, A, B, scaling))
    return parts


def _dense(weight: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """The weight as a tensor, (out, in); ``dtype`` is for a quantized one."""
    return weight.dequantize(dtype) if isinstance(weight, Quantized) else weight


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask

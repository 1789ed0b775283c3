"""The maths of one LoRA linear, ``y = x W^T + b + s (x A^T) B^T``, with its backward written out.

Nothing else in the package knows how the product is computed, so this is the one file to tune for speed. What autograd
would do and this does not: it saves ``x`` once for all uses (nothing when ``A`` is frozen), never forms a gradient of
the frozen ``W``, and adds the low-rank product into the base output in place.

Source: LoRA, Hu et al. 2021, section 4.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["lora_linear", "lora_linear_reference"]


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """A linear layer with a low-rank branch beside it.

    Products run in the dtype of ``x``; the gradients of ``A`` and ``B`` come back in their own dtype (float32), so
    micro-batches add up in float32.

    Args:
        x: (..., in), in the dtype of ``weight``.
        weight: (out, in), frozen or not.
        bias: (out,) or None.
        A: (R, in), usually float32.
        B: (out, R), usually float32.
        scaling: The factor ``s`` of the branch.
        mask: (..., in) bool or None: the inputs that the branch sees (dropout); the caller puts 1 / keep into ``s``.

    Returns:
        (..., out), in the dtype of ``x``.
    """
    y: Tensor = _LoRALinear.apply(x, weight, bias, A, B, scaling, mask)  # type: ignore[no-untyped-call]
    return y


def lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None = None
) -> Tensor:
    """The same by plain autograd: what the tests hold :func:`lora_linear` against. Shapes as there."""
    branch = x if mask is None else x * mask
    y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return y + scaling * (branch @ A.to(x.dtype).T) @ B.to(x.dtype).T


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        y = torch.nn.functional.linear(flat, weight, None if bias is None else bias.to(x.dtype))  # (tokens, out)
        flat_mask = None if mask is None else mask.reshape(flat.shape)
        low = _masked(flat, flat_mask) @ A.to(x.dtype).T  # (tokens, R)
        y.addmm_(low, B.to(x.dtype).T, alpha=scaling)
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(flat if needs_x else None, low, weight, A, B, flat_mask)
        ctx.scaling, ctx.shape, ctx.bias_dtype = scaling, x.shape, None if bias is None else bias.dtype
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, A, B, mask = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B = ctx.needs_input_grad[:5]
        grad = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
        grad_x = grad_weight = grad_bias = grad_A = grad_B = None
        if need_B:
            grad_B = (low.T @ grad).T.to(B.dtype).mul_(ctx.scaling)  # (out, R); the wide operand goes last: faster
        if need_A or need_x:
            grad_low = (grad @ B.to(grad.dtype)).mul_(ctx.scaling)  # (tokens, R)
        if need_A:
            grad_A = (grad_low.T @ _masked(x, mask)).to(A.dtype)  # (R, in)
        if need_x:
            grad_x = grad @ weight  # (tokens, in)
            if mask is None:
                grad_x.addmm_(grad_low, A.to(grad.dtype))
            else:
                grad_x.addcmul_(grad_low @ A.to(grad.dtype), mask.to(grad.dtype))
            grad_x = grad_x.view(ctx.shape)
        if need_weight:
            grad_weight = grad.T @ x
        if need_bias:
            grad_bias = grad.sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask

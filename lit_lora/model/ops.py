"""The decoder's arithmetic between its matrix products: by fused kernels where they apply, else in PyTorch.

Every operation has one PyTorch form, which autograd differentiates, and on a CPU in bfloat16 and on a GPU a fused one
with its backward written out. Both compute in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_lora import kernels
from lit_lora.model.products import sum_of_products

__all__ = ["add_rms_norm", "causal_attention", "linear", "rotate", "swiglu", "to_device"]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; a GPU goes on with its work meanwhile instead of finishing it first.

    Raises:
        RuntimeError: The GPU's work is being recorded, and would read these numbers again and again.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("numbers come from the CPU")
    return x.pin_memory().to(device, non_blocking=True)


def add_rms_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum: ``s = x + delta``, ``s / sqrt(mean(s²) + eps) * weight``.

    Args:
        x: (..., D).
        delta: (..., D), or ``None`` for nothing to add.
        weight: (D,).
        eps: Added to the mean square.

    Returns:
        ``s`` and the normed ``s``, both (..., D) in the dtype of ``x``.

    Source: RMSNorm, arXiv:1910.07467 eq. 4.
    """
    if kernels.usable(x, weight, *([] if delta is None else [delta]), kernel="add_rms_norm"):
        if not torch.is_grad_enabled():  # a third of the time for one token
            return _added_and_normed(x, delta, weight, eps)[:2]
        return _AddRMSNorm.apply(x, delta, weight, eps)  # type: ignore[no-untyped-call, no-any-return]
    total = x if delta is None else x + delta
    wide = total.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, normal.to(x.dtype) * weight


def _added_and_normed(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel: sum, norm, and the reciprocal root of each row, float32."""
    width = x.shape[-1]
    total = x if delta is None else torch.empty_like(x)
    normed = torch.empty_like(x)
    roots = x.new_empty(x.numel() // width, dtype=torch.float32)
    kernels.call("add_rms_norm", x, delta, weight, total, normed, roots, roots.numel(), width, eps)
    return total, normed, roots


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, roots = _added_and_normed(x, delta, weight, eps)
        ctx.save_for_backward(total, weight, roots)
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, roots = ctx.saved_tensors
        if grad_normed is None:
            return grad_total, grad_total, None, None
        grad_weight = None
        if ctx.needs_input_grad[2]:
            normal = (total.float().flatten(0, -2) * roots[:, None]).to(total.dtype)
            grad_weight = (grad_normed.flatten(0, -2) * normal).sum(0, dtype=torch.float32).to(weight.dtype)
        grad = torch.empty_like(total)
        grad_normed = grad_normed.contiguous()
        grad_total = None if grad_total is None else grad_total.contiguous()
        width = total.shape[-1]
        kernels.call("rms_norm_backward", grad_normed, grad_total, total, weight, roots, grad, roots.numel(), width)
        return grad, grad if ctx.needs_input_grad[1] else None, grad_weight, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; one token on a CPU, as in decoding, by a matrix-vector product.

    The library's matrix product costs the same for 1 row as for 16, and twice a matrix-vector product.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,).
    """
    if x.numel() == weight.shape[1] and x.device.type == "cpu" and not torch.is_grad_enabled():
        if kernels.usable(x, weight, kernel="matrix_vector"):
            y = torch.empty(weight.shape[0], dtype=x.dtype)
            kernels.call("matrix_vector", weight, x, y, *weight.shape)
        else:
            y = torch.mv(weight, x.reshape(-1))
        return (y if bias is None else y + bias).view(*x.shape[:-1], -1)
    if kernels.usable(x, weight, kernel="sum_of_products") and x.numel():
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        if len(weight) > _LINES_APART:
            return F.linear(x, weight, bias)
        return sum_of_products((x.flatten(0, -2), weight.T), start=bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)  # (tokens, out)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = sum_of_products((flat, weight)).view(*grad.shape[:-1], -1) if needs_x else None
        grad_weight = flat.T @ x.flatten(0, -2) if needs_weight else None
        return grad_x, grad_weight, flat.sum(0) if needs_bias else None


_LINES_APART = 16384
"""Of a result with more columns every row is in other pages, and writing it panel by panel takes too long."""


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """``silu(gate) * value`` of two tensors of one shape. Source: arXiv:2002.05202."""
    if kernels.usable(gate, value, kernel="swiglu"):
        if not torch.is_grad_enabled():
            return _gated(gate, value)
        return _SwiGLU.apply(gate, value)  # type: ignore[no-untyped-call, no-any-return]
    return F.silu(gate) * value


def _gated(gate: Tensor, value: Tensor) -> Tensor:
    """By the kernel."""
    out = torch.empty_like(gate)
    kernels.call("swiglu", gate, value, out, gate.numel())
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return _gated(gate, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        grad_gate, grad_value = torch.empty_like(gate), torch.empty_like(value)
        kernels.call("swiglu_backward", grad.contiguous(), gate, value, grad_gate, grad_value, gate.numel())
        return grad_gate, grad_value


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair ``(x_i, x_{i+H/2})`` by its position's angle.

    Args:
        x: (T, heads, H).
        cosine: (T, H/2) float32.
        sine: (T, H/2) float32.

    Returns:
        (T, heads, H) in the dtype of ``x``.
    """
    if kernels.usable(x, kernel="rotate"):
        if not torch.is_grad_enabled():
            return _rotated(x, cosine, sine, 1.0)
        return _Rotate.apply(x, cosine, sine)  # type: ignore[no-untyped-call, no-any-return]
    first, second = x.chunk(2, dim=-1)  # (T, heads, H/2) each
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(grad.contiguous(), cosine, sine, -1.0), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, turn: float) -> Tensor:
    """By the kernel: forward, or back with ``turn`` -1."""
    tokens, heads, size = x.shape
    out = torch.empty_like(x)
    kernels.call("rotate", x, cosine.contiguous(), sine.contiguous(), out, tokens, heads, size // 2, turn)
    return out


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention to the tokens before and to the token itself, by a fused kernel of the device.

    Args:
        query: (B, N, T, H).
        key: (B, K, T, H).
        value: (B, K, T, H).
        mask: (T, T) bool in place of the causal one.
    """
    if query.is_meta:  # where PyTorch would write the scores out, as no device does
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = fused(
            query, key, value, 0.0, mask is None, attn_mask=None if mask is None else mask.to(query.dtype)
        )[0]
        return out
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=grouped)

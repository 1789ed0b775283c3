"""The decoder's arithmetic between its matrix products: by fused kernels where they apply, else in PyTorch.

Every operation has one form in PyTorch, which autograd differentiates, and a fused one with its backward pass written
out, on a CPU in bfloat16 and on a GPU. Both compute in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_lora import kernels
from lit_lora.model.products import sum_of_products

__all__ = ["add_rms_norm", "attention", "geglu", "linear", "rotate", "swiglu", "to_device", "to_halves"]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``, without waiting for the work that a GPU still has to do.

    Raises:
        RuntimeError: A CUDA graph is being captured. Every replay would copy from this same memory, whatever it holds.
    """
    if device.type != "cuda" or x.device.type != "cpu":
        return x.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a tensor is copied from the CPU")
    return x.pin_memory().to(device, non_blocking=True)  # only a copy from pinned memory does not block


def add_rms_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum: ``s = x + delta``, ``s / sqrt(mean(s²) + eps) * (offset + weight)``.

    Args:
        x: (..., D).
        delta: (..., D), or ``None`` for nothing to add.
        weight: (D,).
        eps: Added to the mean square.
        offset: Added to the weight, in float32.

    Returns:
        ``s`` and the normed ``s``, both (..., D) in the dtype of ``x``.

    Source: RMSNorm, arXiv:1910.07467 eq. 4.
    """
    if kernels.usable(x, weight, *([] if delta is None else [delta]), kernel="add_rms_norm"):
        if not torch.is_grad_enabled():  # without autograd's bookkeeping: a third of the time for one token
            return _added_and_normed(x, delta, weight, eps, offset)[:2]
        return _AddRMSNorm.apply(x, delta, weight, eps, offset)  # type: ignore[no-untyped-call, no-any-return]

    total = x if delta is None else x + delta
    wide = total.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:
        return total, (normal * (offset + weight.float())).to(x.dtype)
    return total, normal.to(x.dtype) * weight


def _added_and_normed(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By the kernel: the sum, its norm, both (..., D), and per row ``1 / sqrt(mean(s²) + eps)``, (rows,) float32."""
    width = x.shape[-1]
    total = x if delta is None else torch.empty_like(x)  # with nothing to add, the kernel leaves x as it is
    normed = torch.empty_like(x)
    roots = x.new_empty(x.numel() // width, dtype=torch.float32)
    kernels.call("add_rms_norm", x, delta, weight, total, normed, roots, roots.numel(), width, eps, offset)
    return total, normed, roots


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        total, normed, roots = _added_and_normed(x, delta, weight, eps, offset)
        ctx.offset = offset
        ctx.save_for_backward(total, weight, roots)
        ctx.set_materialize_grads(False)  # the last norm's sum is not used: None instead of a tensor of zeros
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, roots = ctx.saved_tensors
        _, needs_delta, needs_weight, _, _ = ctx.needs_input_grad
        if grad_normed is None:
            return grad_total, grad_total, None, None, None

        grad_weight = None
        if needs_weight:
            normal = (total.float().flatten(0, -2) * roots[:, None]).to(total.dtype)
            grad_weight = (grad_normed.flatten(0, -2) * normal).sum(0, dtype=torch.float32).to(weight.dtype)

        grad = torch.empty_like(total)
        grad_normed = grad_normed.contiguous()
        grad_total = None if grad_total is None else grad_total.contiguous()
        width = total.shape[-1]
        sizes = roots.numel(), width, ctx.offset
        kernels.call("rms_norm_backward", grad_normed, grad_total, total, weight, roots, grad, *sizes)
        # x and delta were added, so both have the gradient of the sum.
        return grad, grad if needs_delta else None, grad_weight, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; one token on a CPU, as in decoding, by a matrix-vector product.

    The library's matrix product takes as long for 1 row as for 16, twice as long as a matrix-vector product.

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
        if bias is not None:
            y = y + bias
        return y.view(*x.shape[:-1], -1)

    if kernels.usable(x, weight, kernel="sum_of_products") and x.numel():
        return _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call, no-any-return]
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight)  # a frozen weight's gradient would need x
        if len(weight) > _MOST_COLUMNS:
            return F.linear(x, weight, bias)
        return sum_of_products((x.flatten(0, -2), weight.T), start=bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (tokens, out)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad

        grad_x = grad_weight = grad_bias = None
        if needs_x:
            grad_x = sum_of_products((rows, weight)).view(*grad.shape[:-1], -1)
        if needs_weight:
            grad_weight = rows.T @ x.flatten(0, -2)
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias


_MOST_COLUMNS = 16384
"""Our product writes its result in panels of columns. In a wider result, such as logits, each row lies in pages of its
own, and every panel would touch all of them again."""


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """``silu(gate) * value`` of two tensors of one shape. Source: arXiv:2002.05202."""
    if kernels.usable(gate, value, kernel="swiglu"):
        return _gated(gate, value, "swiglu")
    return F.silu(gate) * value


def geglu(gate: Tensor, value: Tensor) -> Tensor:
    """``gelu(gate) * value``, by gelu's approximation with tanh. Source: arXiv:2002.05202 and arXiv:1606.08415 §2."""
    if kernels.usable(gate, value, kernel="geglu"):
        return _gated(gate, value, "geglu")
    return F.gelu(gate, approximate="tanh") * value


def _gated(gate: Tensor, value: Tensor, kernel: str) -> Tensor:
    if not torch.is_grad_enabled():
        return _gated_by_kernel(gate, value, kernel)
    return _Gated.apply(gate, value, kernel)  # type: ignore[no-untyped-call, no-any-return]


def _gated_by_kernel(gate: Tensor, value: Tensor, kernel: str) -> Tensor:
    out = torch.empty_like(gate)
    kernels.call(kernel, gate, value, out, gate.numel())
    return out


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, kernel: str) -> Tensor:
        ctx.save_for_backward(gate, value)
        ctx.kernel = kernel
        return _gated_by_kernel(gate, value, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, value = ctx.saved_tensors
        grad_gate, grad_value = torch.empty_like(gate), torch.empty_like(value)
        grad = grad.contiguous()
        kernels.call(f"{ctx.kernel}_backward", grad, gate, value, grad_gate, grad_value, gate.numel())
        return grad_gate, grad_value, None


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, neighbors: bool = False) -> Tensor:
    """Turn each pair ``(x_i, x_{i+R/2})`` of the first R dimensions by its position's angle.

    Args:
        x: (T, heads, H).
        cosine: (T, R/2) float32. With R < H, the dimensions from R on stay as they are.
        sine: (T, R/2) float32.
        neighbors: The pairs are ``(x_{2i}, x_{2i+1})`` instead.

    Returns:
        (T, heads, H) in the dtype of ``x``.
    """
    rotated = 2 * cosine.shape[1]
    if neighbors:
        turned = rotate(to_halves(x, rotated), cosine, sine)
        pairs = turned[..., :rotated].reshape(*x.shape[:-1], 2, -1).mT.flatten(-2)
        return torch.cat((pairs, turned[..., rotated:]), dim=-1)
    if rotated < x.shape[-1]:
        if not rotated:
            return x
        first = x[..., :rotated].contiguous()
        return torch.cat((rotate(first, cosine, sine), x[..., rotated:]), dim=-1)

    if kernels.usable(x, kernel="rotate"):
        if not torch.is_grad_enabled():
            return _rotated(x, cosine, sine, 1.0)
        return _Rotate.apply(x, cosine, sine)  # type: ignore[no-untyped-call, no-any-return]

    first, second = x.chunk(2, dim=-1)  # (T, heads, H/2) each
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


def to_halves(x: Tensor, rotated: int) -> Tensor:
    """(T, heads, H) with the first R = ``rotated`` dimensions in the order 0, 2, 4 …, 1, 3, 5 …."""
    halves = x[..., :rotated].reshape(*x.shape[:-1], -1, 2).mT.flatten(-2)
    return torch.cat((halves, x[..., rotated:]), dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        # A rotation's transpose, which the gradient needs, is the rotation back.
        return _rotated(grad.contiguous(), cosine, sine, -1.0), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> Tensor:
    """:func:`rotate` by the kernel: forwards with ``direction`` 1.0, back with -1.0."""
    tokens, heads, head_size = x.shape
    out = torch.empty_like(x)
    kernels.call("rotate", x, cosine.contiguous(), sine.contiguous(), out, tokens, heads, head_size // 2, direction)
    return out


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention, by a fused kernel of the device unless there is a softcap or are sinks.

    Args:
        query: (B, N, T, H).
        key: (B, K, S, H).
        value: (B, K, S, J), mostly J = H.
        mask: Bool, broadcast to (B, N, T, S): which tokens are seen.
        causal: Instead of a mask, with S = T: each token sees itself and those before it.
        scale: As all that follows, see :class:`lit_lora.model.attention.attend.LayerAttention`.
        softcap: Likewise.
        sinks: Likewise.

    Returns:
        (B, N, T, J).
    """
    if softcap is not None or sinks is not None:
        return _attention_by_steps(query, key, value, mask, causal, scale, softcap, sinks)
    if query.is_meta and key.shape == value.shape:
        # On the meta device, where estimates count memory, PyTorch would write out all scores; no real device does.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        numeric_mask = None if mask is None else mask.to(query.dtype)
        out: Tensor = fused(query, key, value, 0.0, causal, attn_mask=numeric_mask, scale=scale)[0]
        return out

    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _attention_by_steps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """:func:`attention` with all scores written out.

    Source: the softcap is that of Gemma 2, arXiv:2408.00118 section 2; sinks are those of arXiv:2309.17453 section 3.3.
    """
    groups, (tokens, size) = key.shape[1], query.shape[2:]
    grouped = query.view(len(query), groups, -1, tokens, size)  # (B, K, N/K, T, H)
    scores = grouped @ key[:, :, None].mT * (size**-0.5 if scale is None else scale)  # (B, K, N/K, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    if causal:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        if mask.dim() == 4:
            mask = mask[:, :, None]
        scores = scores.masked_fill(~mask, -torch.inf)

    scores = scores.float()
    if sinks is not None:
        sink = sinks.float().view(groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    probabilities = scores.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    out: Tensor = probabilities @ value[:, :, None]
    return out.flatten(1, 2)

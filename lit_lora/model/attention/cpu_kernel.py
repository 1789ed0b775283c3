"""Causal attention over packed documents on a CPU in bfloat16, as one kernel: rotation, products and softmax.

Queries, keys and values stay in token order and are kept as they are for the backward, which rotates them again and
computes the scores again from the saved log-sum-exp (as FlashAttention does, arXiv:2205.14135 §3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_lora import kernels
from lit_lora.model.attention.attend import LayerAttention
from lit_lora.model.attention.documents import Layout
from lit_lora.model.rope import RopeTable

__all__ = ["packed_attention", "usable"]


def usable(layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this CPU has the kernel and it takes these tensors."""
    fits = layer.fused and key.shape == value.shape
    return fits and kernels.usable(query, key, value, kernel="packed_attention")


def packed_attention(
    layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor, rope: RopeTable, layout: Layout
) -> Tensor:
    """Rotate queries and keys and attend within each document.

    Args:
        layer: Its window and scale.
        query: (T, N, H) bfloat16, contiguous, not rotated.
        key: (T, K, H), likewise.
        value: (T, K, H).
        rope: Of the tokens of all documents.
        layout: Of the documents.

    Returns:
        (T, N, H) bfloat16.
    """
    return _PackedAttention.apply(query, key, value, rope.cosine, rope.sine, layout, layer)  # type: ignore[no-untyped-call, no-any-return]


class _PackedAttention(torch.autograd.Function):
    # The order of the kernels' arguments is that of attention.c. The C code writes into tensors made here.

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cosine: Tensor,
        sine: Tensor,
        layout: Layout,
        layer: LayerAttention,
    ) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)  # (T, N) log-sum-exp of the scores
        inputs = (query, key, value, cosine, sine, layout.starts)
        kernels.call("packed_attention", *inputs, out, lse, *_sizes(layer, layout, query, key, cosine))
        ctx.save_for_backward(query, key, value, cosine, sine, lse)
        ctx.layout, ctx.layer = layout, layer
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cosine, sine, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        inputs = (query, key, value, cosine, sine, ctx.layout.starts, lse, grad.contiguous())
        sizes = _sizes(ctx.layer, ctx.layout, query, key, cosine)
        kernels.call("packed_attention_backward", *inputs, *grads, *sizes)
        return *grads, None, None, None, None


def _sizes(
    layer: LayerAttention, layout: Layout, query: Tensor, key: Tensor, cosine: Tensor
) -> tuple[int | float, ...]:
    """The closing arguments of both kernels, as ``attention.c`` declares them."""
    _, query_heads, head_size = query.shape
    heads = query_heads, key.shape[1]
    rotated = 2 * cosine.shape[1]
    window = layer.window or _NO_WINDOW
    scale = head_size**-0.5 if layer.scale is None else layer.scale
    return len(layout.starts) - 1, layout.shared_prefix, *heads, head_size, rotated, window, scale


_NO_WINDOW = 1 << 40
"""More tokens than any document has."""

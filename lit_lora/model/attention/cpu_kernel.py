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
from lit_lora.model.attention.documents import Layout

__all__ = ["packed_attention", "usable"]


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this CPU has the kernel and it takes these tensors."""
    return kernels.usable(query, key, value, kernel="packed_attention")


def packed_attention(query: Tensor, key: Tensor, value: Tensor, rope: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """Rotate queries and keys and attend within each document.

    Args:
        query: (T, N, H) bfloat16, contiguous, not rotated.
        key: (T, K, H), likewise.
        value: (T, K, H).
        rope: Cosine and sine, (tokens of all documents, H/2) float32.
        layout: Of the documents.

    Returns:
        (T, N, H) bfloat16.
    """
    return _PackedAttention.apply(query, key, value, *rope, layout)  # type: ignore[no-untyped-call, no-any-return]


class _PackedAttention(torch.autograd.Function):
    # The order of the kernels' arguments is that of attention.c. The C code writes into tensors made here.

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor, layout: Layout
    ) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)  # (T, N) log-sum-exp of the scores
        inputs = (query, key, value, cosine, sine, layout.starts)
        kernels.call("packed_attention", *inputs, out, lse, *layout.sizes(query, key))
        ctx.save_for_backward(query, key, value, cosine, sine, lse)
        ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cosine, sine, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        inputs = (query, key, value, cosine, sine, ctx.layout.starts, lse, grad.contiguous())
        kernels.call("packed_attention_backward", *inputs, *grads, *ctx.layout.sizes(query, key))
        return *grads, None, None, None

"""Causal attention over packed documents on a CPU in bfloat16, as one kernel: rotation, products and softmax.

Queries, keys and values stay in token order and are kept as they are for the backward, which rotates them again and
computes the scores again from the saved log-sum-exp (as FlashAttention does, arXiv:2205.14135 §3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_lora import kernels

__all__ = ["Layout", "packed_attention", "usable"]


class Layout:
    """Where documents lie.

    Args:
        lengths: Tokens per document.
        window: A token sees this many tokens, itself included; ``None`` means all before it.
    """

    def __init__(self, lengths: Sequence[int], window: int | None) -> None:
        self.lengths = list(lengths)
        self.starts = torch.tensor([0, *lengths]).cumsum(0)
        self.window = window or (1 << 40)

    def sizes(self, query: Tensor, key: Tensor) -> tuple[int | float, ...]:
        """The closing arguments of both kernels."""
        _, heads, size = query.shape
        return len(self.starts) - 1, heads, key.shape[1], size, self.window, size**-0.5


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether this CPU has the kernel and it takes these tensors."""
    return kernels.usable(query, key, value) and kernels.has("packed_attention")


def packed_attention(query: Tensor, key: Tensor, value: Tensor, rope: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
    """Rotate queries and keys and attend within each document.

    Args:
        query: (T, N, H) bfloat16, contiguous, not rotated.
        key: (T, K, H), likewise.
        value: (T, K, H).
        rope: Cosine and sine, (T, H/2) float32.
        layout: Of the documents.

    Returns:
        (T, N, H) bfloat16.
    """
    return _PackedAttention.apply(query, key, value, *rope, layout)  # type: ignore[no-untyped-call, no-any-return]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cosine: Tensor, sine: Tensor, layout: Layout
    ) -> Tensor:
        out = torch.empty_like(query)
        lse = query.new_empty(query.shape[:2], dtype=torch.float32)
        places = (query, key, value, cosine, sine, layout.starts)
        kernels.call("packed_attention", *places, out, lse, *layout.sizes(query, key))
        ctx.save_for_backward(query, key, value, cosine, sine, lse)
        ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, cosine, sine, lse = ctx.saved_tensors
        grads = [torch.empty_like(x) for x in (query, key, value)]
        places = (query, key, value, cosine, sine, ctx.layout.starts, lse, grad.contiguous())
        kernels.call("packed_attention_backward", *places, *grads, *ctx.layout.sizes(query, key))
        return *grads, None, None, None

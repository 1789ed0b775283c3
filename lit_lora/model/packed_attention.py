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
from lit_lora.model.ops import to_device

__all__ = ["Layout", "packed_attention", "usable"]


class Layout:
    """Where documents lie.

    Args:
        lengths: Tokens per document.
        window: A token sees this many tokens, itself included; ``None`` means all before it.
        common: So many tokens that every document begins with come first, once; then the rest of each document.
    """

    def __init__(self, lengths: Sequence[int], window: int | None, common: int = 0) -> None:
        self.lengths = list(lengths)
        self.common = common
        self.starts = torch.tensor([0, *lengths]).cumsum(0)
        self.window = window or (1 << 40)
        self._moved: dict[torch.device, Tensor] = {}

    def starts_on(self, device: torch.device) -> Tensor:
        """Where documents begin, and the end, (documents + 1,) int32; moved once."""
        if device not in self._moved:
            self._moved[device] = to_device(self.starts.int(), device)
        return self._moved[device]

    def sizes(self, query: Tensor, key: Tensor) -> tuple[int | float, ...]:
        """The closing arguments of both kernels."""
        _, heads, size = query.shape
        return len(self.starts) - 1, self.common, heads, key.shape[1], size, self.window, size**-0.5

    def spread(self, x: Tensor) -> Tensor:
        """Rows as they are given to rows with the common ones before the rest of every document."""
        if not self.common:
            return x
        first, *rests = torch.split(x, [self.common, *(length - self.common for length in self.lengths)])
        return torch.cat([part for rest in rests for part in (first, rest)])

    def gather(self, x: Tensor) -> Tensor:
        """The other way: what the common rows are in the first document is what they are in all."""
        if not self.common:
            return x
        parts = torch.split(x, [part for length in self.lengths for part in (self.common, length - self.common)])
        return torch.cat([parts[0], *parts[1::2]])


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

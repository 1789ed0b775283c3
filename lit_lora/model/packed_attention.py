"""Causal attention over packed documents on a CPU in bfloat16: matrix products by PyTorch, the rest by kernels.

Rotation writes queries, keys and values in document order, (heads, length, H) each, so that the products of a document
are batched products over its key/value heads without a copy: the query heads of a group are more rows of the same
product. Queries go in blocks, so the scores of a long document never exist at once, and the backward computes them
again from the saved log-sum-exp (as FlashAttention does, arXiv:2205.14135 §3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_lora import kernels

__all__ = ["packed_attention"]

_BLOCK = 256
"""Queries whose scores exist at a time."""


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rope: tuple[Tensor, Tensor],
    starts: Tensor,
    lengths: Sequence[int],
    window: int | None,
) -> Tensor:
    """Rotate queries and keys and attend within each document.

    Args:
        query: (T, N, H) bfloat16, contiguous, not rotated.
        key: (T, K, H), likewise.
        value: (T, K, H).
        rope: Cosine and sine, (T, H/2) float32.
        starts: (documents + 1,) int64: where each document starts, and T.
        lengths: Tokens per document.
        window: A token sees this many tokens, itself included; ``None`` means all before it.

    Returns:
        (T, N, H) bfloat16.
    """
    return _PackedAttention.apply(query, key, value, *rope, starts, list(lengths), window)  # type: ignore[no-untyped-call, no-any-return]


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cosine: Tensor,
        sine: Tensor,
        starts: Tensor,
        lengths: list[int],
        window: int | None,
    ) -> Tensor:
        turn = _Turn(cosine, sine, starts)
        q, k, v = turn.pack(query, 1), turn.pack(key, 1), turn.pack(value, 0)
        out, sums = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32)
        ctx.layout = layout = _Layout(lengths, query.shape[1], key.shape[1], query.shape[2], window)
        for block in layout.blocks():
            scores = torch.bmm(layout.queries(q, block), layout.keys(k, block).transpose(1, 2))
            part = torch.empty(layout.heads * block.rows, dtype=torch.float32)
            layout.softmax("causal_softmax", block, scores, part)
            layout.put(sums, block, part)
            layout.put(out, block, torch.bmm(scores, layout.keys(v, block)))
        ctx.save_for_backward(q, k, v, sums, cosine, sine, starts)
        return turn.unpack(out, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sums, cosine, sine, starts = ctx.saved_tensors
        layout, turn = ctx.layout, _Turn(cosine, sine, starts)
        grad_out = turn.pack(grad.contiguous(), 0)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros(k.shape, dtype=torch.bfloat16) for _ in range(2))
        for block in layout.blocks():
            queries, keys, values = layout.queries(q, block), layout.keys(k, block), layout.keys(v, block)
            outer = layout.queries(grad_out, block)
            scores = torch.bmm(queries, keys.transpose(1, 2))  # (K, group * rows, keys)
            grads = torch.bmm(outer, values.transpose(1, 2))
            layout.softmax("causal_softmax_backward", block, scores, grads, layout.rows(sums, block))
            layout.keys(grad_v, block).baddbmm_(scores.transpose(1, 2), outer)
            layout.keys(grad_k, block).baddbmm_(grads.transpose(1, 2), queries)
            layout.put(grad_q, block, torch.bmm(grads, keys))
        return turn.unpack(grad_q, -1), turn.unpack(grad_k, -1), turn.unpack(grad_v, 0), None, None, None, None, None


class _Turn:
    """Rotation between token order (T, heads, H) and document order, documents one after the other."""

    def __init__(self, cosine: Tensor, sine: Tensor, starts: Tensor) -> None:
        self.angles, self.starts = (cosine, sine), starts

    def pack(self, x: Tensor, sign: int) -> Tensor:
        """(T, heads, H) to (T, heads, H) memory in which each document is (heads, length, H)."""
        return self._move(x, sign, to_tokens=0)

    def unpack(self, x: Tensor, sign: int) -> Tensor:
        """The other way."""
        return self._move(x, sign, to_tokens=1)

    def _move(self, x: Tensor, sign: int, to_tokens: int) -> Tensor:
        out, documents = torch.empty_like(x), self.starts.numel() - 1
        heads, size = x.shape[1:]
        kernels.call("rotate_and_pack", x, out, *self.angles, self.starts, documents, heads, size, sign, to_tokens)
        return out


class _Block:
    """Queries ``first .. first + rows`` of the document at ``start``, which see its first ``end`` keys."""

    def __init__(self, start: int, length: int, first: int, rows: int) -> None:
        self.start, self.length, self.first, self.rows, self.end = start, length, first, rows, first + rows


class _Layout:
    """Views of the document-ordered tensors."""

    def __init__(self, lengths: list[int], heads: int, groups: int, size: int, window: int | None) -> None:
        self.lengths, self.heads, self.groups, self.size = lengths, heads, groups, size
        self.window = window or (1 << 40)
        self.scale = size**-0.5

    def blocks(self) -> Iterator[_Block]:
        start = 0
        for length in self.lengths:
            for first in range(0, length, _BLOCK):
                yield _Block(start, length, first, min(_BLOCK, length - first))
            start += length

    def queries(self, x: Tensor, block: _Block) -> Tensor:
        """(K, group * rows, H) of a (T, N, H) tensor: a view for a whole document, a copy for a part of one."""
        part = self._document(x, block)[:, block.first : block.end]
        return part.reshape(self.groups, -1, self.size)

    def keys(self, x: Tensor, block: _Block) -> Tensor:
        """(K, keys, H) view of a (T, K, H) tensor."""
        return self._document(x, block)[:, : block.end]

    def rows(self, x: Tensor, block: _Block) -> Tensor:
        """(N * rows,) of a (T, N) tensor, contiguous."""
        return self._document(x, block)[:, block.first : block.end].reshape(-1)

    def put(self, x: Tensor, block: _Block, values: Tensor) -> None:
        """Write the rows of a block."""
        target = self._document(x, block)[:, block.first : block.end]
        target.copy_(values.view(target.shape))

    def softmax(self, kernel: str, block: _Block, *tensors: Tensor) -> None:
        """Run a softmax kernel in place over the scores of a block."""
        place = (self.heads, block.rows, block.end, block.first, self.window)
        kernels.call(kernel, *tensors, *place, self.scale)

    @staticmethod
    def _document(x: Tensor, block: _Block) -> Tensor:
        """(heads, length, …) view of one document."""
        heads, rest = x.shape[1], x.shape[2:]
        flat = x[block.start : block.start + block.length]
        return flat.view(heads, block.length, *rest)

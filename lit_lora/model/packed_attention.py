"""Causal attention over packed documents on a CPU in bfloat16: matrix products by PyTorch, the rest by kernels.

Rotation writes queries, keys and values in document order, (heads, length, H) for each document, so that its products
are batched products over its key/value heads without a copy: the query heads of a group are more rows of the same
product. Queries go in blocks, so the scores of a long document never exist at once, and the backward computes them
again from the saved log-sum-exp (as FlashAttention does, arXiv:2205.14135 §3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_lora import kernels

__all__ = ["Layout", "packed_attention"]

_BLOCK = 256
"""Queries whose scores exist at a time; a multiple of ``_PAD``."""

_PAD = 32
"""Documents are padded to a multiple of this many tokens: the matrix units' and the vector loops' step."""


class Layout:
    """Where documents lie in token order and in document order.

    Args:
        lengths: Tokens per document.
        window: A token sees this many tokens, itself included; ``None`` means all before it.
    """

    def __init__(self, lengths: Sequence[int], window: int | None) -> None:
        self.padded = [-(-length // _PAD) * _PAD for length in lengths]
        self.starts = torch.tensor([0, *lengths]).cumsum(0)
        self.places = torch.tensor([0, *self.padded]).cumsum(0)
        self.window = window or (1 << 40)


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
        turn = _Turn(cosine, sine, layout)
        q, k, v = turn.pack(query, 1), turn.pack(key, 1), turn.pack(value, 0)
        out = torch.empty_like(q)
        lse, inverse = (torch.empty(q.shape[:2], dtype=torch.float32) for _ in range(2))
        for block in _blocks(layout, q, k):
            scores = torch.bmm(block.queries(q), block.keys(k).transpose(1, 2))
            sums = torch.empty(2, block.heads * block.rows, dtype=torch.float32)
            block.softmax("causal_softmax", scores, sums[0], sums[1])
            block.put(lse, sums[0])
            block.put(inverse, sums[1])
            block.product(out, scores, block.keys(v))
        ctx.save_for_backward(q, k, v, lse, cosine, sine)
        ctx.layout = layout
        return turn.unpack(out, query.shape[0], 0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lse, cosine, sine = ctx.saved_tensors
        turn = _Turn(cosine, sine, ctx.layout)
        grad_out = turn.pack(grad.contiguous(), 0)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
        for block in _blocks(ctx.layout, q, k):
            queries, keys, outer = block.queries(q), block.keys(k), block.queries(grad_out)
            scores = torch.bmm(queries, keys.transpose(1, 2))  # (K, group * rows, keys)
            grads = torch.bmm(outer, block.keys(v).transpose(1, 2))
            block.softmax("causal_softmax_backward", scores, grads, block.flat(lse))
            block.product(grad_q, grads, keys)
            block.add_product(grad_v, scores.transpose(1, 2), outer)
            block.add_product(grad_k, grads.transpose(1, 2), queries)
        parts = ((grad_q, -1), (grad_k, -1), (grad_v, 0))
        return *(turn.unpack(part, grad.shape[0], sign) for part, sign in parts), None, None, None


class _Turn:
    """Rotation between token order (T, heads, H) and document order."""

    def __init__(self, cosine: Tensor, sine: Tensor, layout: Layout) -> None:
        self.angles, self.layout = (cosine, sine), layout

    def pack(self, x: Tensor, sign: int) -> Tensor:
        """(T, heads, H) to (padded T, heads, H) memory in which each document is (heads, padded length, H)."""
        out = torch.empty(int(self.layout.places[-1]), *x.shape[1:], dtype=x.dtype)
        self._move(x, out, sign, None, to_tokens=0)
        return out

    def unpack(self, x: Tensor, tokens: int, sign: int, factors: Tensor | None = None) -> Tensor:
        """The other way; ``factors`` (padded T, heads), in document order, multiply the vectors."""
        out = torch.empty(tokens, *x.shape[1:], dtype=x.dtype)
        self._move(x, out, sign, factors, to_tokens=1)
        return out

    def _move(self, x: Tensor, out: Tensor, sign: int, factors: Tensor | None, to_tokens: int) -> None:
        layout, documents = self.layout, len(self.layout.padded)
        places = (*self.angles, layout.starts, layout.places, factors)
        kernels.call("rotate_and_pack", x, out, *places, documents, *x.shape[1:], sign, to_tokens)


@dataclass(frozen=True)
class _Block:
    """Queries ``first .. first + rows`` of one document, which see its keys up to ``end``."""

    start: int
    """Place of the document."""
    length: int
    """Its padded length."""
    first: int
    rows: int
    heads: int
    groups: int
    window: int
    scale: float

    @property
    def end(self) -> int:
        return self.first + self.rows

    @property
    def is_document(self) -> bool:
        """Whether it is a whole document: then every part of it is a view."""
        return self.rows == self.length

    def queries(self, x: Tensor) -> Tensor:
        """(K, group * rows, H) of a (T, N, H) tensor: a view for a whole document, a copy for a part of one."""
        return self._rows(x).reshape(self.groups, -1, x.shape[2])

    def keys(self, x: Tensor) -> Tensor:
        """(K, keys, H) view of a (T, K, H) tensor."""
        return self._document(x)[:, : self.end]

    def flat(self, x: Tensor) -> Tensor:
        """(N * rows,) of a (T, N) tensor, contiguous."""
        return self._rows(x).reshape(-1)

    def put(self, x: Tensor, values: Tensor) -> None:
        """Write the rows of this block."""
        target = self._rows(x)
        target.copy_(values.view(target.shape))

    def product(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        """Write the product, (K, group * rows, H), into the rows of this block."""
        if self.is_document:
            torch.bmm(left, right, out=self._document(x).view(self.groups, -1, x.shape[2]))
        else:
            self.put(x, torch.bmm(left, right))

    def add_product(self, x: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the product, (K, keys, H), to the keys that this block sees; set those that no block before it saw."""
        if self.is_document:
            torch.bmm(left, right, out=self._document(x))
            return
        values, document = torch.bmm(left, right), self._document(x)
        document[:, : self.first] += values[:, : self.first]
        document[:, self.first : self.end] = values[:, self.first :]

    def softmax(self, kernel: str, *tensors: Tensor) -> None:
        """Run a softmax kernel in place over the scores of this block."""
        place = (self.heads, self.rows, self.end, self.first, self.window)
        kernels.call(kernel, *tensors, *place, self.scale)

    def _rows(self, x: Tensor) -> Tensor:
        return self._document(x)[:, self.first : self.end]

    def _document(self, x: Tensor) -> Tensor:
        """(heads, padded length, …) view of the document."""
        return x[self.start : self.start + self.length].view(x.shape[1], self.length, *x.shape[2:])


def _blocks(layout: Layout, q: Tensor, k: Tensor) -> Iterator[_Block]:
    heads, groups, scale = q.shape[1], k.shape[1], q.shape[2] ** -0.5
    for start, length in zip(layout.places.tolist(), layout.padded, strict=False):
        for first in range(0, length, _BLOCK):
            yield _Block(start, length, first, min(_BLOCK, length - first), heads, groups, layout.window, scale)

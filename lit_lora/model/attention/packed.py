"""Causal attention: over packed documents (training, scoring) and over a key/value cache (decoding).

Both are objects that a layer calls with its queries, keys and values, so the layer knows neither of positions, nor of
documents, nor of caches. Grouped queries: query head ``n`` attends with key/value head ``n // (N / K)``.

``behind(P)`` of either gives one in which every document stands behind the same ``P`` tokens. These are not repeated:
they are the first rows of queries, keys and values, before those of the documents, and get the first positions. So it
is with tokens that all documents begin with, such as a system prompt: a model computes them once.

``in_groups(G)`` of either is for training on long documents: tokens attend within groups of ``G``, and in half of the
heads the groups are shifted by half of that, so that neighbours meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora.model.attention import flash as varlen_attention
from lit_lora.model.attention.cpu_kernel import Layout, Places, packed_attention, usable
from lit_lora.model.config import ModelConfig
from lit_lora.model.kv_cache import KVCache
from lit_lora.model.ops import causal_attention, rotate, to_device
from lit_lora.model.rope import rope_table

__all__ = ["Attend", "CachedAttention", "PackedAttention"]


class Attend(Protocol):
    """How tokens attend: what a layer is given."""

    front: int
    """The first rows of what is given are this many tokens that stand before every document; mostly 0."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(layer index, queries (T, N, H), keys (T, K, H), values (T, K, H)) -> (T, N, H)."""

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""

    def behind(self, front: int, *, rotated: bool = False) -> Attend:
        """The same, with ``front`` tokens before every document.

        Args:
            front: How many.
            rotated: Their keys are in their final form.

        Returns:
            Its :attr:`front` says how many of these rows are to be given: none if a cache holds them already.
        """

    def in_groups(self, size: int) -> Attend:
        """The same within groups of ``size`` tokens, for training; decoding sees everything."""


class PackedAttention:
    """Documents laid end to end in one row; none sees another, so no token is padding.

    Tokens that all documents begin with may be given once: they see nothing but one another, so they are the same in
    each, whatever comes after them. They are put before each for attention, and only there.

    Args:
        config: The model's.
        lengths: Tokens per document; positions restart in each.
        device: Of the tokens.
        common: The first rows of what is given are this many tokens, which every document begins with. The other rows
            are the rest of each document.
    """

    front = 0

    def __init__(self, config: ModelConfig, lengths: Sequence[int], device: torch.device, *, common: int = 0) -> None:
        self.config = config
        self.lengths = list(lengths)
        self.window = config.sliding_window
        self.layout = Layout(self.lengths, self.window, common)
        self.positions = to_device(self.layout.positions(), device)
        self.rope = rope_table(config, self.positions, max(self.lengths))
        self._grouped: dict[int, Attend] = {}

    def copy(self, rope: tuple[Tensor, Tensor], places: Sequence[Tensor]) -> PackedAttention:
        """The same with other tensors: those of ``rope``, and of the layout's places."""
        twin = copy(self)
        twin.rope, twin.layout, twin._grouped = rope, self.layout.copy(Places(*places)), {}
        return twin

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rotate, and attend within each document.

        Args:
            layer: Index of the calling layer; unused here.
            query: (T, N, H).
            key: (T, K, H).
            value: (T, K, H).

        Returns:
            (T, N, H) in the dtype of ``query``.
        """
        return self.within(self.layout, query, key, value)

    def within(self, layout: Layout, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rotate by the positions in the documents, and attend within each piece of ``layout``."""
        if usable(query, key, value):
            return packed_attention(query, key, value, self.rope, layout)
        query, key, value = map(layout.spread, (query, key, value))
        turned = rotate(query, *self.rope), rotate(key, *self.rope), value
        if varlen_attention.usable(query):
            return layout.gather(varlen_attention.varlen_attention(*turned, layout))
        outputs = []
        for q, k, v in zip(*(torch.split(tensor, layout.lengths) for tensor in turned), strict=True):
            masked = self.window is not None and q.shape[0] > self.window
            mask = _window_mask(q.shape[0], self.window, q.device) if masked else None
            out = causal_attention(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], mask)
            outputs.append(out[0].transpose(0, 1))
        return layout.gather(torch.cat(outputs))

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""
        return rotate(x, *map(self.layout.gather, self.rope))

    def behind(self, front: int, *, rotated: bool = False) -> Attend:
        """The same, with ``front`` tokens before every document; see :class:`Attend`."""
        return _PackedBehind(self, front, rotated)

    def in_groups(self, size: int) -> Attend:
        """The same within groups of ``size`` tokens; all layers of a pass share the result.

        Raises:
            ValueError: Documents share their first tokens, which would be in groups of different sizes.
        """
        if self.layout.common:
            raise ValueError(f"{self.layout.common} tokens that all documents begin with do not go with groups")
        if size not in self._grouped:
            self._grouped[size] = _InGroups(self, size)
        return self._grouped[size]


class _InGroups:
    """Documents cut into groups that do not see each other; half of the key/value heads cut them half a group earlier.

    A group is to attention what a document is, only that positions go on. So nobody sees what comes later, and nobody
    another document. A document of at most one group stays whole in all heads. With one key/value head, the query heads
    are halved.

    Source: arXiv:2309.12307 section 3.2, without the wrap of the last group around to the first tokens.
    """

    front = 0

    def __init__(self, tokens: PackedAttention, size: int) -> None:
        self.tokens = tokens
        self.halves = [
            Layout([piece for length in tokens.lengths for piece in _groups(length, size, first)], tokens.window)
            for first in (size, max(1, size // 2))
        ]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, H) -> (T, N, H)."""
        kept = -(-key.shape[1] // 2)
        shared = query.shape[1] // key.shape[1]
        cuts = [kept * shared if key.shape[1] > 1 else -(-shared // 2), kept, kept]
        first, second = [], []
        for tensor, cut in zip((query, key, value), cuts, strict=True):
            first.append(tensor[:, :cut].contiguous())
            second.append((tensor[:, cut:] if cut < tensor.shape[1] else tensor).contiguous())
        early, late = self.halves
        return torch.cat([self.tokens.within(early, *first), self.tokens.within(late, *second)], dim=1)

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""
        return self.tokens.rotate(x)

    def behind(self, front: int, *, rotated: bool = False) -> Attend:
        """Refused: tokens before a document would be in its first group only."""
        raise ValueError("tokens before every document do not go with groups")

    def in_groups(self, size: int) -> Attend:
        """Refused: these are groups already."""
        raise ValueError("these are groups already")


class _PackedBehind(PackedAttention):
    """Documents behind given tokens, which are common to all of them as well."""

    def __init__(self, tokens: PackedAttention, front: int, rotated: bool) -> None:
        lengths, device = [front + length for length in tokens.lengths], tokens.positions.device
        super().__init__(tokens.config, lengths, device, common=front + tokens.layout.common)
        self.front = front
        if rotated:
            still = self.positions[:, None] < front
            cosine, sine = self.rope
            self.rope = cosine.masked_fill(still, 1.0), sine.masked_fill(still, 0.0)

    def behind(self, front: int, *, rotated: bool = False) -> Attend:
        """Refused: something stands before every document already."""
        raise ValueError(f"{self.front} tokens stand before every document already")


class CachedAttention:
    """New tokens attend to a cache and to themselves; their keys and values are appended to it in place.

    Args:
        config: The model's.
        cache: The cache.
        batch_size: Rows B.
        tokens: New tokens per row T.
    """

    front = 0

    def __init__(self, config: ModelConfig, cache: KVCache, batch_size: int, tokens: int) -> None:
        self.config, self.cache = config, cache
        self.batch_size = batch_size
        self.tokens = tokens
        self.mask = cache.mask(tokens, config.sliding_window)
        self.rope = rope_table(config, cache.positions(tokens).reshape(-1), cache.front + cache.length + tokens)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rotate, and attend to everything stored so far.

        Args:
            layer: Index of the calling layer: where its keys and values are stored.
            query: (B·T, N, H).
            key: (B·T, K, H).
            value: (B·T, K, H).

        Returns:
            (B·T, N, H) in the dtype of ``query``.
        """
        q, k, v = (
            tensor.view(self.batch_size, self.tokens, *tensor.shape[1:]).transpose(1, 2)  # (B, heads, T, H)
            for tensor in (rotate(query, *self.rope), rotate(key, *self.rope), value)
        )
        keys, values = self.cache.append(layer, k, v)
        if self.tokens == 1:  # the query heads of one key/value head as rows of one query: a fifth of the time on a CPU
            q = q.reshape(self.batch_size, key.shape[1], -1, key.shape[2])
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask).reshape(query.shape)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(query.shape)

    def rotate(self, x: Tensor) -> Tensor:
        """(B·T, heads, H) turned by the positions of its rows."""
        return rotate(x, *self.rope)

    def behind(self, front: int, *, rotated: bool = False) -> Attend:
        """The same, with ``front`` tokens before every row; see :class:`Attend`."""
        return _CachedBehind(self, front, rotated)

    def in_groups(self, size: int) -> Attend:
        """Itself: groups are for training."""
        return self


class _CachedBehind:
    """Rows behind common tokens, whose keys and values the cache keeps before those of the first tokens read."""

    def __init__(self, tokens: CachedAttention, front: int, rotated: bool) -> None:
        cache = self.cache = tokens.cache
        self.front = 0 if cache.length else front
        cache.reserve(front)
        self.tokens = CachedAttention(tokens.config, cache, tokens.batch_size, tokens.tokens)
        self.common = PackedAttention(tokens.config, [front], cache.keys.device)
        if rotated:
            cosine, sine = self.common.rope
            self.common.rope = torch.ones_like(cosine), torch.zeros_like(sine)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(P + B·T, …) to (P + B·T, N, H), P being :attr:`front`."""
        if not self.front:
            return self.tokens(layer, query, key, value)
        (q, first_q), (k, first_k), (v, first_v) = ((x[self.front :], x[: self.front]) for x in (query, key, value))
        self.cache.put_front(layer, self.common.rotate(first_k).transpose(0, 1), first_v.transpose(0, 1))
        return torch.cat([self.common(layer, first_q, first_k, first_v), self.tokens(layer, q, k, v)])

    def rotate(self, x: Tensor) -> Tensor:
        """(P + B·T, heads, H) turned by the positions of its rows."""
        return torch.cat([self.common.rotate(x[: self.front]), self.tokens.rotate(x[self.front :])])

    def behind(self, front: int, *, rotated: bool = False) -> Attend:
        """Refused: something stands before every row already."""
        raise ValueError(f"{self.front} tokens stand before every row already")

    def in_groups(self, size: int) -> Attend:
        """Itself: groups are for training."""
        return self


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T) bool: causal, and at most ``window`` tokens back."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)


def _groups(length: int, size: int, first: int) -> list[int]:
    """A document's length in groups of ``size``, the first of ``first`` tokens; one that fits into a group is one."""
    if length <= size:
        return [length]
    whole, rest = divmod(length - first, size)
    return [first, *[size] * whole, *([rest] if rest else [])]

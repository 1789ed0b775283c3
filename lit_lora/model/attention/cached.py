"""Attention of new tokens over a key/value cache, when decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_lora.model.attention.attend import Attend, LayerAttention
from lit_lora.model.attention.packed import PackedAttention
from lit_lora.model.config import ModelConfig
from lit_lora.model.kv_cache import KVCache
from lit_lora.model.ops import attention
from lit_lora.model.rope import rope_tables

__all__ = ["CachedAttention"]


class CachedAttention:
    """New tokens attend to a cache and to themselves; their keys and values are appended to it in place.

    Args:
        config: The model's.
        cache: The cache.
        batch_size: Rows B.
        tokens: New tokens per row T.
    """

    prefix_length = 0

    def __init__(self, config: ModelConfig, cache: KVCache, batch_size: int, tokens: int) -> None:
        self.config, self.cache = config, cache
        self.batch_size = batch_size
        self.tokens = tokens
        lengths = [(tokens, length) for length in cache.lengths(tokens)]
        self.ropes = rope_tables(config, cache.positions(tokens).reshape(-1), lengths)
        self._masks: dict[int | None, Tensor | None] = {}  # by window

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rotate, and attend to everything stored so far.

        Args:
            layer: The calling layer's.
            query: (B·T, N, H).
            key: (B·T, K, H).
            value: (B·T, K, J), mostly J = H.

        Returns:
            (B·T, N, J) in the dtype of ``query``.
        """
        rope = layer.rope_table(self.ropes)
        if rope.query_scale is not None:
            query = query * rope.query_scale.to(query.dtype)
        q, k, v = (
            tensor.view(self.batch_size, self.tokens, *tensor.shape[1:]).transpose(1, 2)  # (B, heads, T, H)
            for tensor in (rope.rotate(query), rope.rotate(key), value)
        )
        keys, values = self.cache.append(layer.index, k, v)
        mask = self._mask(layer.window)
        out_shape = (*query.shape[:2], value.shape[2])
        if self.tokens == 1 and layer.fused:
            # (B, K, N/K, H): all query heads of a key/value head become the rows of one product. With one new token
            # they see the same keys, and nothing has to be masked between them. A fifth of the time on a CPU.
            q = q.reshape(self.batch_size, key.shape[1], -1, key.shape[2])
            return attention(q, keys, values, mask, scale=layer.scale).reshape(out_shape)

        out = attention(q, keys, values, mask, scale=layer.scale, softcap=layer.softcap, sinks=layer.sinks)
        return out.transpose(1, 2).reshape(out_shape)

    def _mask(self, window: int | None) -> Tensor | None:
        """Which stored tokens the new ones may see, see :meth:`KVCache.mask`; made once for all layers."""
        if window not in self._masks:
            self._masks[window] = self.cache.mask(self.tokens, window)
        return self._masks[window]

    def rotate(self, layer: LayerAttention, x: Tensor) -> Tensor:
        """(B·T, heads, H) turned by the positions of its rows."""
        return layer.rope_table(self.ropes).rotate(x)

    def token_positions(self) -> Tensor:
        """(B·T,) int64: the position of each row in its document."""
        return self.cache.positions(self.tokens).reshape(-1)

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """The same, with ``prefix_length`` tokens before every row; see :class:`Attend`."""
        return _CachedWithPrefix(self, prefix_length, rotated)


class _CachedWithPrefix:
    """Rows behind a prefix that all of them share, whose keys and values the cache keeps in slots of their own.

    The first pass computes the prefix and stores it; later passes find it in the cache and are given no rows for it.
    """

    def __init__(self, tokens: CachedAttention, prefix_length: int, rotated: bool) -> None:
        cache = self.cache = tokens.cache
        self.prefix_length = 0 if cache.length else prefix_length
        cache.reserve(prefix_length)
        self.tokens = CachedAttention(tokens.config, cache, tokens.batch_size, tokens.tokens)
        self.prefix = PackedAttention(tokens.config, [prefix_length], cache.device)
        if rotated:
            everything = torch.ones_like(self.prefix.positions, dtype=torch.bool)
            self.prefix.ropes = [rope.without(everything) for rope in self.prefix.ropes]

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(P + B·T, …) to (P + B·T, N, J), P being :attr:`prefix_length`."""
        if not self.prefix_length:
            return self.tokens(layer, query, key, value)

        sizes = [self.prefix_length, len(query) - self.prefix_length]
        prefix_query, token_query = torch.split(query, sizes)
        prefix_key, token_key = torch.split(key, sizes)
        prefix_value, token_value = torch.split(value, sizes)

        # First, because the tokens attend to what the cache then holds.
        rotated_key = self.prefix.rotate(layer, prefix_key)
        self.cache.put_prefix(layer.index, rotated_key.transpose(0, 1), prefix_value.transpose(0, 1))
        prefix_out = self.prefix(layer, prefix_query, prefix_key, prefix_value)
        token_out = self.tokens(layer, token_query, token_key, token_value)
        return torch.cat([prefix_out, token_out])

    def rotate(self, layer: LayerAttention, x: Tensor) -> Tensor:
        """(P + B·T, heads, H) turned by the positions of its rows."""
        prefix, tokens = x[: self.prefix_length], x[self.prefix_length :]
        return torch.cat([self.prefix.rotate(layer, prefix), self.tokens.rotate(layer, tokens)])

    def token_positions(self) -> Tensor:
        """(P + B·T,) int64: the position of each row in its document."""
        return torch.cat([self.prefix.positions[: self.prefix_length], self.tokens.token_positions()])

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """Refused: every row already has a prefix."""
        raise ValueError(f"every row already has a prefix of {self.cache.prefix_length} tokens")

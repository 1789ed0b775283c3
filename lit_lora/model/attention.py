"""Causal attention: over packed documents (training, scoring) and over a key/value cache (decoding).

Both are objects that a layer calls with its queries, keys and values, so the layer knows neither of positions, nor of
documents, nor of caches. Grouped queries: query head ``n`` attends with key/value head ``n // (N / K)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora import kernels
from lit_lora.model.config import ModelConfig
from lit_lora.model.kv_cache import KVCache
from lit_lora.model.ops import rotate
from lit_lora.model.packed_attention import Layout, packed_attention
from lit_lora.model.rope import rope_table

__all__ = ["CachedAttention", "PackedAttention"]


class PackedAttention:
    """Documents laid end to end in one row; none sees another, so no token is padding.

    Args:
        config: The model's.
        lengths: Tokens per document; positions restart in each.
        device: Of the tokens.
    """

    def __init__(self, config: ModelConfig, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = list(lengths)
        self.window = config.sliding_window
        positions = torch.cat([torch.arange(length, device=device) for length in self.lengths])
        self.rope = rope_table(config, positions, max(self.lengths))
        self.layout = Layout(self.lengths, self.window)

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
        if kernels.usable(query, key, value):
            return packed_attention(query, key, value, self.rope, self.layout)
        outputs = []
        turned = rotate(query, *self.rope), rotate(key, *self.rope), value
        for q, k, v in zip(*(torch.split(tensor, self.lengths) for tensor in turned), strict=True):
            masked = self.window is not None and q.shape[0] > self.window
            out = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=_window_mask(q.shape[0], self.window, q.device) if masked else None,
                is_causal=not masked,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)


class CachedAttention:
    """New tokens attend to a cache and to themselves; their keys and values are appended to it in place.

    Args:
        config: The model's.
        cache: The cache.
        batch_size: Rows B.
        tokens: New tokens per row T.
    """

    def __init__(self, config: ModelConfig, cache: KVCache, batch_size: int, tokens: int) -> None:
        self.cache = cache
        self.batch_size = batch_size
        self.tokens = tokens
        self.mask = cache.mask(tokens, config.sliding_window)
        self.rope = rope_table(config, cache.positions(tokens).reshape(-1), cache.length + tokens)

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
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask, enable_gqa=grouped)
        return out.transpose(1, 2).reshape(query.shape)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T) bool: causal, and at most ``window`` tokens back."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)

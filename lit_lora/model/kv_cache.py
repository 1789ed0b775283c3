"""Keys and values of the tokens seen so far, so that decoding computes each token once."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_lora.model.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """Room for ``max_length`` tokens of ``batch_size`` rows; the decoder appends to it in place.

    Args:
        config: The model's.
        batch_size: Rows B.
        max_length: Tokens per row, left padding included.
        dtype: Of the stored keys and values; the model's dtype.
        device: Where they live.
        padding: (B,) int64, how many tokens at the left of each row are padding: they are never attended to, and
            positions count from the first token after them. ``None`` means none.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        padding: Tensor | None = None,
    ) -> None:
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (layers, B, K, S, H)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.max_length = max_length
        self.length = 0

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next ``tokens`` tokens, (B, T) int64; padding has position 0."""
        batch_size, device = self.keys.shape[1], self.keys.device
        positions = torch.arange(self.length, self.length + tokens, device=device).expand(batch_size, -1)
        return positions if self.padding is None else (positions - self.padding[:, None]).clamp(min=0)

    def mask(self, tokens: int, window: int | None) -> Tensor | None:
        """Which stored tokens the next ``tokens`` tokens may see.

        Returns:
            (B or 1, 1, T, S) bool with S = length + tokens; ``None`` when all of them.
        """
        end = self.length + tokens
        if tokens == 1 and self.padding is None and (window is None or end <= window):
            return None
        source = torch.arange(end, device=self.keys.device)  # (S,)
        target = source[self.length :, None]  # (T, 1)
        seen = source <= target
        if window is not None:
            seen &= source > target - window
        if self.padding is None:
            return seen[None, None]
        # A padding token sees itself: a row of a softmax without any entry would be NaN.
        real = (source >= self.padding[:, None])[:, None, None, :]  # (B, 1, 1, S)
        return (seen & real) | (source == target)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, H) keys and values of one layer; return those of all tokens so far, (B, K, S, H) views.

        :attr:`length` does not move: the decoder calls :meth:`advance` after the last layer.
        """
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` tokens as stored."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, length)

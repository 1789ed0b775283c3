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
        self.prefix_length = 0
        """Slots before all tokens, for what every row begins with: see :meth:`reserve`. Filled once length > 0."""

    def reserve(self, prefix_length: int) -> None:
        """Keep ``prefix_length`` slots before the tokens, beside ``max_length``, for what stands before every document.

        Raises:
            ValueError: There are tokens already, and they were stored without it.
        """
        if prefix_length == self.prefix_length:
            return
        if self.length:
            raise ValueError(
                f"{self.length} tokens are stored behind {self.prefix_length} others, not behind {prefix_length}"
            )
        shape = (*self.keys.shape[:3], prefix_length + self.max_length, self.keys.shape[4])
        self.keys, self.values, self.prefix_length = (
            self.keys.new_zeros(shape),
            self.values.new_zeros(shape),
            prefix_length,
        )

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next ``tokens`` tokens, (B, T) int64; padding has that of the first token."""
        batch_size, device = self.keys.shape[1], self.keys.device
        positions = torch.arange(self.length, self.length + tokens, device=device).expand(batch_size, -1)
        if self.padding is not None:
            positions = (positions - self.padding[:, None]).clamp(min=0)
        return positions + self.prefix_length

    def mask(self, tokens: int, window: int | None) -> Tensor | None:
        """Which stored tokens the next ``tokens`` tokens may see.

        Returns:
            (B or 1, 1, T, S) bool with S = front + length + tokens; ``None`` when all of them.
        """
        end = self.length + tokens
        if tokens == 1 and self.padding is None and (window is None or self.prefix_length + end <= window):
            return None
        seen = self._among_tokens(tokens, window)
        if not self.prefix_length:
            return seen
        # Padding lies between the front and the first token, so distances to the front are counted in positions.
        distance = self.positions(tokens)[:, None, :, None] - torch.arange(self.prefix_length, device=self.keys.device)
        near = torch.ones_like(distance, dtype=torch.bool) if window is None else distance < window  # (B, 1, T, P)
        return torch.cat([near, seen.expand(near.shape[0], -1, -1, -1)], dim=-1)

    def _among_tokens(self, tokens: int, window: int | None) -> Tensor:
        """(B or 1, 1, T, length + tokens) bool."""
        end = self.length + tokens
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
        """Store (B, K, T, H) keys and values of one layer; return all so far, the front's first, (B, K, S, H) views.

        :attr:`length` does not move: the decoder calls :meth:`advance` after the last layer.
        """
        start = self.prefix_length + self.length
        end = start + key.shape[2]
        self.keys[layer, :, :, start:end] = key
        self.values[layer, :, :, start:end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def put_prefix(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the (K, P, H) keys and values of one layer that stand before the tokens of every row."""
        self.keys[layer, :, :, : self.prefix_length] = key
        self.values[layer, :, :, : self.prefix_length] = value

    def copy_row(self, other: KVCache, row: int, tokens: int, start: int = 0) -> None:
        """Copy the front and ``tokens`` tokens of the first row of ``other`` to ``row``, from ``start`` on."""
        self.reserve(other.prefix_length)
        for own, others in ((self.keys, other.keys), (self.values, other.values)):
            own[:, row, :, : self.prefix_length] = others[:, 0, :, : self.prefix_length]
            first = self.prefix_length + start
            own[:, row, :, first : first + tokens] = others[:, 0, :, other.prefix_length : other.prefix_length + tokens]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.padding = None if self.padding is None else self.padding[rows]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` tokens as stored."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, length)

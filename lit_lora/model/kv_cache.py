"""Keys and values of the tokens seen so far, so that decoding computes each token once.

The slots of one row, with a prefix of 2 tokens and, because another prompt is longer, 3 tokens of padding::

    slot      | P P | . . . t t t t | …        P prefix, . padding, t tokens
    position  | 0 1 | 2 2 2 2 3 4 5 |          padding has no positions of its own and nobody attends to it

Padding at the left lets all rows end in the same slot, so a step of decoding writes one slot of every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_lora.model.config import ModelConfig

__all__ = ["KVCache"]


class KVCache:
    """Room for ``max_length`` tokens in each of ``batch_size`` rows; the decoder appends to it in place.

    Args:
        config: The model's.
        batch_size: Rows B.
        max_length: Tokens per row, left padding included.
        dtype: The model's, in which keys and values are stored.
        device: The model's.
        padding: (B,) int64, how many tokens at the left of each row are padding: they are never attended to, and
            positions count from the first token after them. ``None`` for no padding.
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
        """Slots before all tokens, for a prefix of every row: see :meth:`reserve`. Filled once there are tokens."""

    def reserve(self, prefix_length: int) -> None:
        """Add ``prefix_length`` slots before the tokens, beyond ``max_length``, for what stands before every row.

        Raises:
            ValueError: Tokens are already stored behind a prefix of another length.
        """
        if prefix_length == self.prefix_length:
            return
        if self.length:
            raise ValueError(
                f"{self.length} tokens are stored behind a prefix of {self.prefix_length}, not of {prefix_length}"
            )
        layers, batch_size, heads, _, head_size = self.keys.shape
        shape = (layers, batch_size, heads, prefix_length + self.max_length, head_size)
        self.keys = self.keys.new_zeros(shape)
        self.values = self.values.new_zeros(shape)
        self.prefix_length = prefix_length

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next ``tokens`` tokens, (B, T) int64; padding has the position of the first token."""
        batch_size, device = self.keys.shape[1], self.keys.device
        positions = torch.arange(self.length, self.length + tokens, device=device).expand(batch_size, -1)
        if self.padding is not None:
            positions = (positions - self.padding[:, None]).clamp(min=0)
        return positions + self.prefix_length

    def mask(self, tokens: int, window: int | None) -> Tensor | None:
        """Which stored tokens the next ``tokens`` tokens may see.

        Returns:
            (B or 1, 1, T, S) bool with S = prefix_length + length + tokens; ``None`` when all of them.
        """
        end = self.length + tokens
        window_holds_all = window is None or self.prefix_length + end <= window
        if tokens == 1 and self.padding is None and window_holds_all:
            return None

        among_tokens = self._among_tokens(tokens, window)
        if not self.prefix_length:
            return among_tokens

        # Padding lies between the prefix and the first token, so distances to the prefix are counted in positions.
        prefix_positions = torch.arange(self.prefix_length, device=self.keys.device)
        distance = self.positions(tokens)[:, None, :, None] - prefix_positions  # (B, 1, T, P)
        to_prefix = torch.ones_like(distance, dtype=torch.bool) if window is None else distance < window
        return torch.cat([to_prefix, among_tokens.expand(len(to_prefix), -1, -1, -1)], dim=-1)

    def _among_tokens(self, tokens: int, window: int | None) -> Tensor:
        """Which tokens the next ones may see, without the prefix: (B or 1, 1, T, length + tokens) bool."""
        end = self.length + tokens
        source = torch.arange(end, device=self.keys.device)  # (S,)
        target = source[self.length :, None]  # (T, 1)
        seen = source <= target
        if window is not None:
            seen &= source > target - window
        if self.padding is None:
            return seen[None, None]
        # A padding token sees itself: a softmax over nothing would be NaN, and 0 times NaN spoils what comes after it.
        real = (source >= self.padding[:, None])[:, None, None, :]  # (B, 1, 1, S)
        return (seen & real) | (source == target)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, H) keys and values of one layer; returns all so far, the prefix first, as (B, K, S, H) views.

        :attr:`length` stays, as all layers write to the same slots: the decoder calls :meth:`advance` after the last.
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
        """Copy the prefix and the first ``tokens`` tokens of the first row of ``other`` to ``row``.

        Args:
            other: The cache to copy from.
            row: The row to write.
            tokens: How many tokens to copy.
            start: The token of ``row`` that the first of them becomes; those before it are padding.
        """
        prefix = other.prefix_length
        self.reserve(prefix)
        first = prefix + start
        for target, source in ((self.keys, other.keys), (self.values, other.values)):
            target[:, row, :, :prefix] = source[:, 0, :, :prefix]
            target[:, row, :, first : first + tokens] = source[:, 0, :, prefix : prefix + tokens]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, given as (rows,) int64 or a mask (B,)."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]
        if self.padding is not None:
            self.padding = self.padding[rows]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` tokens as stored."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, length)

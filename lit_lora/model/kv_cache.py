"""Keys and values of the tokens seen so far, so that decoding computes each token once.

The slots of one row, with a prefix of 2 tokens and, because another prompt is longer, 3 tokens of padding::

    slot      | P P | . . . t t t t | …        P prefix, . padding, t tokens
    position  | 0 1 | 2 2 2 2 3 4 5 |          padding has no positions of its own and nobody attends to it

Padding at the left lets all rows end in the same slot, so a step of decoding writes one slot of every row.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["KVCache"]


class KVCache:
    """Room for ``max_length`` tokens in each of ``batch_size`` rows; the decoder appends to it in place.

    Each layer stores keys and values as it computes them: layers may differ in heads, head sizes and dtype.

    Args:
        batch_size: Rows B.
        max_length: Tokens per row, left padding included.
        device: The model's.
        padding: (B,) int64, how many tokens at the left of each row are padding: they are never attended to, and
            positions count from the first token after them. ``None`` for no padding.
    """

    def __init__(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str = "cpu",
        padding: Tensor | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.keys: dict[int, Tensor] = {}
        """By layer, (B, K, S, H), made when the layer first stores something."""
        self.values: dict[int, Tensor] = {}
        """By layer, (B, K, S, J), mostly J = H."""
        self.padding = padding if padding is not None and bool(padding.any()) else None
        self.max_length = max_length
        self.length = 0
        self.expected = 0
        """At least this many tokens follow in the next passes, as those of a prompt that is read in pieces: rotations
        that depend on a sequence's length count them."""
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
        self.keys, self.values = {}, {}
        self.prefix_length = prefix_length

    def positions(self, tokens: int) -> Tensor:
        """Positions of the next ``tokens`` tokens, (B, T) int64; padding has the position of the first token."""
        positions = torch.arange(self.length, self.length + tokens, device=self.device).expand(self.batch_size, -1)
        if self.padding is not None:
            positions = (positions - self.padding[:, None]).clamp(min=0)
        return positions + self.prefix_length

    def lengths(self, tokens: int) -> list[int]:
        """How long each row is after the next ``tokens`` tokens or those expected, with its prefix, without padding."""
        length = self.prefix_length + self.length + max(tokens, self.expected)
        if self.padding is None:
            return [length] * self.batch_size
        return [length - padding for padding in self.padding.tolist()]

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
        prefix_positions = torch.arange(self.prefix_length, device=self.device)
        distance = self.positions(tokens)[:, None, :, None] - prefix_positions  # (B, 1, T, P)
        to_prefix = torch.ones_like(distance, dtype=torch.bool) if window is None else distance < window
        return torch.cat([to_prefix, among_tokens.expand(len(to_prefix), -1, -1, -1)], dim=-1)

    def _among_tokens(self, tokens: int, window: int | None) -> Tensor:
        """Which tokens the next ones may see, without the prefix: (B or 1, 1, T, length + tokens) bool."""
        end = self.length + tokens
        source = torch.arange(end, device=self.device)  # (S,)
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
        """Store the (B, K, T, H) keys and values of a layer; returns all so far, the prefix first, (B, K, S, H) views.

        :attr:`length` stays, as all layers write to the same slots: the decoder calls :meth:`advance` after the last.
        """
        start = self.prefix_length + self.length
        end = start + key.shape[2]
        keys, values = self._slots(layer, key, value)
        keys[:, :, start:end] = key
        values[:, :, start:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def put_prefix(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the (K, P, H) keys and values of one layer that stand before the tokens of every row."""
        keys, values = self._slots(layer, key[None], value[None])
        keys[:, :, : self.prefix_length] = key
        values[:, :, : self.prefix_length] = value

    def _slots(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All slots of a layer, (B, K, S, H) each; at first, zeros for keys and values like these, (…, K, …, H)."""
        if layer not in self.keys:
            length = self.prefix_length + self.max_length
            for slots, new in ((self.keys, key), (self.values, value)):
                slots[layer] = new.new_zeros(self.batch_size, new.shape[1], length, new.shape[3])
        return self.keys[layer], self.values[layer]

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
        for layer in other.keys:
            others = other.keys[layer], other.values[layer]
            for target, source in zip(self._slots(layer, *others), others, strict=True):
                target[row, :, :prefix] = source[0, :, :prefix]
                target[row, :, first : first + tokens] = source[0, :, prefix : prefix + tokens]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, given as (rows,) int64 or a mask (B,)."""
        self.keys = {layer: keys[rows] for layer, keys in self.keys.items()}
        self.values = {layer: values[rows] for layer, values in self.values.items()}
        self.batch_size = len(torch.arange(self.batch_size, device=self.device)[rows])
        if self.padding is not None:
            self.padding = self.padding[rows]

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` tokens as stored."""
        self.length += tokens
        self.expected = max(self.expected - tokens, 0)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, length)

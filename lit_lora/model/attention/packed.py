"""Causal attention over packed documents, for training and scoring.

Grouped queries: query head ``n`` attends with key/value head ``n // (N / K)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from lit_lora.model.attention import flash as varlen_attention
from lit_lora.model.attention.attend import Attend
from lit_lora.model.attention.cpu_kernel import packed_attention, usable
from lit_lora.model.attention.documents import Layout, Places
from lit_lora.model.config import ModelConfig
from lit_lora.model.ops import causal_attention, rotate, to_device
from lit_lora.model.rope import rope_table

__all__ = ["PackedAttention"]


class PackedAttention:
    """Documents laid end to end in one row; none sees another, so no token is padding.

    Tokens that all documents begin with may be given once: they see nothing but one another, so they are the same in
    each, whatever comes after them. They are put before each for attention, and only there.

    Args:
        config: The model's.
        lengths: Tokens per document; positions restart in each.
        device: Of the tokens.
        shared_prefix: The first rows are this many tokens, which every document begins with. The other rows are the
            rest of each document.
    """

    prefix_length = 0

    def __init__(
        self, config: ModelConfig, lengths: Sequence[int], device: torch.device, *, shared_prefix: int = 0
    ) -> None:
        self.config = config
        self.lengths = list(lengths)
        self.window = config.sliding_window
        self.layout = Layout(self.lengths, self.window, shared_prefix)
        self.positions = to_device(self.layout.positions(), device)
        self.rope = rope_table(config, self.positions, max(self.lengths))

    def copy(self, rope: tuple[Tensor, Tensor], places: Sequence[Tensor]) -> PackedAttention:
        """The same with other tensors: those of ``rope``, and of the layout's places."""
        twin = copy(self)
        twin.rope = rope
        twin.layout = self.layout.copy(Places(*places))
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

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """The same, with ``prefix_length`` tokens before every document; see :class:`Attend`."""
        return _PackedWithPrefix(self, prefix_length, rotated)


class _PackedWithPrefix(PackedAttention):
    """Documents behind given tokens, which are common to all of them as well."""

    def __init__(self, tokens: PackedAttention, prefix_length: int, rotated: bool) -> None:
        lengths, device = [prefix_length + length for length in tokens.lengths], tokens.positions.device
        super().__init__(tokens.config, lengths, device, shared_prefix=prefix_length + tokens.layout.shared_prefix)
        self.prefix_length = prefix_length
        if rotated:
            still = self.positions[:, None] < prefix_length
            cosine, sine = self.rope
            self.rope = cosine.masked_fill(still, 1.0), sine.masked_fill(still, 0.0)

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """Refused: something stands before every document already."""
        raise ValueError(f"{self.prefix_length} tokens stand before every document already")


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T) bool: causal, and at most ``window`` tokens back."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask if window is None else mask.triu(1 - window)

"""Causal attention over packed documents, for training and scoring.

Grouped queries: query head ``n`` attends with key/value head ``n // (N / K)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from lit_lora.model.attention import flash
from lit_lora.model.attention.attend import Attend
from lit_lora.model.attention.cpu_kernel import packed_attention, usable
from lit_lora.model.attention.documents import Layout, Places
from lit_lora.model.config import ModelConfig
from lit_lora.model.ops import causal_attention, rotate, to_device
from lit_lora.model.rope import rope_table

__all__ = ["PackedAttention"]


class PackedAttention:
    """Documents laid end to end in one row; none sees another, so no token is padding.

    Tokens that all documents begin with may be given once: they see only each other, so they come out the same in every
    document, whatever follows. For attention, and only for it, each document gets them back.

    Args:
        config: The model's.
        lengths: Tokens per document; positions restart in each.
        device: Of the tokens.
        shared_prefix: The first rows are this many tokens, which every document begins with. The other rows are the
            rest of each document.
    """

    prefix_length = 0  # shared_prefix counts tokens of the documents; prefix_length those that come on top, see Attend

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
        """Rotate by the positions in the documents, and attend within each piece of ``layout``.

        The arguments and the result are those of a call. ``layout`` may cut documents into pieces, as positions are
        taken from the documents and not from it.
        """
        # On a CPU one kernel rotates, finds the shared prefix and attends.
        if usable(query, key, value):
            return packed_attention(query, key, value, self.rope, layout)

        # Elsewhere the shared prefix is copied into every document, and taken out of the result again.
        query, key, value = map(layout.spread, (query, key, value))
        query, key = rotate(query, *self.rope), rotate(key, *self.rope)
        if flash.usable(query):
            return layout.gather(flash.varlen_attention(query, key, value, layout))

        pieces = zip(*(torch.split(tensor, layout.lengths) for tensor in (query, key, value)), strict=True)
        outputs = [self._one_piece(q, k, v) for q, k, v in pieces]
        return layout.gather(torch.cat(outputs))

    def _one_piece(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, H), rotated, of one document or piece -> (T, N, H)."""
        tokens = len(query)
        mask = None
        if self.window is not None and tokens > self.window:
            mask = _window_mask(tokens, self.window, query.device)

        # PyTorch wants (B, heads, T, H).
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        return causal_attention(q, k, v, mask)[0].transpose(0, 1)

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""
        return rotate(x, *map(self.layout.gather, self.rope))

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """The same, with ``prefix_length`` tokens before every document; see :class:`Attend`."""
        return _PackedWithPrefix(self, prefix_length, rotated)


class _PackedWithPrefix(PackedAttention):
    """Documents behind a prefix. To the layout it is nothing but more tokens that all documents begin with."""

    def __init__(self, tokens: PackedAttention, prefix_length: int, rotated: bool) -> None:
        lengths = [prefix_length + length for length in tokens.lengths]
        shared_prefix = prefix_length + tokens.layout.shared_prefix
        super().__init__(tokens.config, lengths, tokens.positions.device, shared_prefix=shared_prefix)
        self.prefix_length = prefix_length

        if rotated:
            # Cosine 1 and sine 0 turn nothing: these rows are in their final form.
            in_prefix = self.positions[:, None] < prefix_length
            cosine, sine = self.rope
            self.rope = cosine.masked_fill(in_prefix, 1.0), sine.masked_fill(in_prefix, 0.0)

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """Refused: every document already has a prefix."""
        raise ValueError(f"every document already has a prefix of {self.prefix_length} tokens")


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: causal, and each token sees ``window`` tokens, itself included."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)

"""Causal attention over packed documents, for training and scoring.

Grouped queries: query head ``n`` attends with key/value head ``n // (N / K)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from lit_lora.errors import InputError
from lit_lora.model.attention import flash
from lit_lora.model.attention.attend import Attend, LayerAttention
from lit_lora.model.attention.cpu_kernel import packed_attention, usable
from lit_lora.model.attention.documents import Layout, Places
from lit_lora.model.config import ModelConfig
from lit_lora.model.ops import attention, to_device
from lit_lora.model.rope import rope_tables

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
        self.layout = Layout(self.lengths, shared_prefix)
        self.positions = to_device(self.layout.positions(), device)
        self.ropes = rope_tables(config, self.positions, [(length, length) for length in self.lengths])

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors on the device that attention reads, in one order."""
        tables = [tensor for rope in self.ropes for tensor in rope.tensors]
        return [*tables, *self.layout.on(self.positions.device)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> PackedAttention:
        """The same with other :attr:`tensors`."""
        twin = copy(self)
        rest = iter(tensors)
        twin.ropes = [rope.map(lambda _: next(rest)) for rope in self.ropes]
        twin.layout = self.layout.copy(Places(*rest))
        return twin

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rotate, and attend within each document.

        Args:
            layer: The calling layer's.
            query: (T, N, H).
            key: (T, K, H).
            value: (T, K, J), mostly J = H.

        Returns:
            (T, N, J) in the dtype of ``query``.
        """
        return self.within(self.layout, layer, query, key, value)

    def within(self, layout: Layout, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Rotate by the positions in the documents, and attend within each piece of ``layout``.

        The arguments and the result are those of a call. ``layout`` may cut documents into pieces, as positions are
        taken from the documents and not from it.
        """
        rope = layer.rope_table(self.ropes)
        if rope.query_scale is not None:
            query = query * layout.gather(rope.query_scale).to(query.dtype)
        # On a CPU one kernel rotates, finds the shared prefix and attends.
        if usable(layer, query, key, value):
            query, key = rope.halved(query), rope.halved(key)
            return packed_attention(layer, query, key, value, rope, layout)

        # Elsewhere the shared prefix is copied into every document, and taken out of the result again.
        query, key, value = map(layout.spread, (query, key, value))
        query, key = rope.rotate(query), rope.rotate(key)
        if flash.usable(layer, query, key, value):
            return layout.gather(flash.varlen_attention(layer, query, key, value, layout))

        pieces = zip(*(torch.split(tensor, layout.lengths) for tensor in (query, key, value)), strict=True)
        outputs = [_one_piece(layer, q, k, v) for q, k, v in pieces]
        return layout.gather(torch.cat(outputs))

    def rotate(self, layer: LayerAttention, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""
        if layer.rope is None:
            return x
        return self.ropes[layer.rope].map(self.layout.gather).rotate(x)

    def token_positions(self) -> Tensor:
        """(T,) int64: the position of each row in its document."""
        return self.layout.gather(self.positions)

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
        is_computed = not rotated or tokens.layout.shared_prefix > 0  # something that documents have in common
        if is_computed and not tokens.config.rotates_alike(lengths):
            raise InputError(
                f"documents of at most {tokens.config.rope_switch} tokens and longer ones cannot have the same virtual "
                "tokens before them, as this model rotates them differently",
                hint="limit the length of rows with data.max_seq_length, or use a method without virtual tokens",
            )

        if rotated:
            in_prefix = self.positions < prefix_length
            self.ropes = [rope.without(in_prefix) for rope in self.ropes]

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """Refused: every document already has a prefix."""
        raise ValueError(f"every document already has a prefix of {self.prefix_length} tokens")


def _one_piece(layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(T, N, H), (T, K, H), (T, K, J), rotated, of one document or piece -> (T, N, J)."""
    tokens = len(query)
    mask = None
    if layer.window is not None and tokens > layer.window:
        mask = _window_mask(tokens, layer.window, query.device)

    # PyTorch wants (B, heads, T, H).
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    causal = mask is None
    out = attention(q, k, v, mask, causal=causal, scale=layer.scale, softcap=layer.softcap, sinks=layer.sinks)
    return out[0].transpose(0, 1)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: causal, and each token sees ``window`` tokens, itself included."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window)

"""The protocol of attention: what a layer calls with its queries, keys and values.

A layer knows neither of positions, nor of documents, nor of caches; these are known to what it is given.

``with_prefix(P)`` puts the same ``P`` tokens before every document. They are not repeated: they are the first rows of
queries, keys and values, before those of the documents, and take the first positions. Tokens that all documents begin
with, such as a system prompt, are handled alike: a model computes them once. ``docs/architecture.md`` has a drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lit_lora.model.rope import UNROTATED, RopeTable

__all__ = ["Attend", "LayerAttention"]


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """How one layer attends: all in which the layers of a model may differ."""

    index: int
    """The layer's place in the model, by which a cache stores its keys and values."""
    window: int | None = None
    """A token sees this many tokens, itself included; ``None`` means all before it."""
    scale: float | None = None
    """The factor on the products of queries and keys; ``None`` means ``H**-0.5``."""
    softcap: float | None = None
    """Scores ``s`` become ``softcap * tanh(s / softcap)``; ``None`` leaves them as they are."""
    rope: int | None = 0
    """Which of the config's ``ropes`` rotates queries and keys; ``None`` leaves them as they are."""
    sinks: Tensor | None = None
    """(N,): per query head, the score of a key that every token sees and whose value is 0."""

    @property
    def fused(self) -> bool:
        """Whether fused kernels can compute it: they know neither softcap nor sinks."""
        return self.softcap is None and self.sinks is None

    def rope_table(self, tables: Sequence[RopeTable]) -> RopeTable:
        """The table of its rotation, of those of the model."""
        return UNROTATED if self.rope is None else tables[self.rope]


class Attend(Protocol):
    """How tokens attend: what a layer is given."""

    prefix_length: int
    """How many of the first rows are tokens that stand before every document; mostly 0."""

    def __call__(self, layer: LayerAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(the calling layer, queries (T, N, H), keys (T, K, H), values (T, K, J)) -> (T, N, J); mostly J = H."""

    def rotate(self, layer: LayerAttention, x: Tensor) -> Tensor:
        """(T, heads, H), queries or keys of ``layer``, turned by the positions of their rows."""

    def token_positions(self) -> Tensor:
        """(T,) int64: the position of each row in its document, for models that use positions themselves."""

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """The same, with ``prefix_length`` tokens before every document.

        Args:
            prefix_length: How many.
            rotated: Their keys are already rotated, or have no positions, as those of prefix tuning.

        Returns:
            Its :attr:`prefix_length` says how many prefix rows the caller passes: none if a cache already holds them.
        """

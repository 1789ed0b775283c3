"""The protocol of attention: what a layer calls with its queries, keys and values.

A layer knows neither of positions, nor of documents, nor of caches; these are known to what it is given.

``with_prefix(P)`` puts the same ``P`` tokens before every document. They are not repeated: they are the first rows of
queries, keys and values, before those of the documents, and take the first positions. Tokens that all documents begin
with, such as a system prompt, are handled alike: a model computes them once. ``docs/architecture.md`` has a drawing.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Attend"]


class Attend(Protocol):
    """How tokens attend: what a layer is given."""

    prefix_length: int
    """How many of the first rows are tokens that stand before every document; mostly 0."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(layer index, queries (T, N, H), keys (T, K, H), values (T, K, H)) -> (T, N, H)."""

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """The same, with ``prefix_length`` tokens before every document.

        Args:
            prefix_length: How many.
            rotated: Their keys are already rotated, or have no positions, as those of prefix tuning.

        Returns:
            Its :attr:`prefix_length` says how many prefix rows the caller passes: none if a cache already holds them.
        """

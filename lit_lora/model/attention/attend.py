"""The protocol of attention: what a layer calls with its queries, keys and values.

A layer knows neither of positions, nor of documents, nor of caches; these are known to what it is given.

``with_prefix(P)``  gives one in which every document stands behind the same ``P`` tokens. These are not repeated:
they are the first rows of queries, keys and values, before those of the documents, and get the first positions. So it
is with tokens that all documents begin with, such as a system prompt: a model computes them once.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Attend"]


class Attend(Protocol):
    """How tokens attend: what a layer is given."""

    prefix_length: int
    """The first rows of what is given are this many tokens that stand before every document; mostly 0."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(layer index, queries (T, N, H), keys (T, K, H), values (T, K, H)) -> (T, N, H)."""

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """The same, with ``prefix_length`` tokens before every document.

        Args:
            prefix_length: How many.
            rotated: Their keys are in their final form.

        Returns:
            Its :attr:`prefix_length` says how many of these rows are to be given: none if a cache holds them already.
        """

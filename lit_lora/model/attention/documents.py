"""Where documents lie in a packed row, and how rows that all of them share are spread to each and gathered again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_lora.model.ops import to_device

__all__ = ["Layout", "Places"]


class Layout:
    """Where documents lie.

    Args:
        lengths: Tokens per document.
        shared_prefix: The number of tokens that every document begins with; they come first, once, and then the rest
            of each document.
    """

    def __init__(self, lengths: Sequence[int], shared_prefix: int = 0) -> None:
        self.lengths = list(lengths)
        self.shared_prefix = shared_prefix
        self.starts = torch.tensor([0, *lengths]).cumsum(0)
        self._moved: dict[torch.device, Places] = {}

    def positions(self) -> Tensor:
        """(S,) int64: of the spread rows, which token of its document each is."""
        lengths = torch.tensor(self.lengths)
        return torch.arange(int(self.starts[-1])) - self.starts[:-1].repeat_interleave(lengths)

    def on(self, device: torch.device) -> Places:
        """The indices of :class:`Places` on a device, moved once."""
        if device not in self._moved:
            self._moved[device] = Places(*(to_device(index, device) for index in self._places()))
        return self._moved[device]

    def copy(self, places: Places) -> Layout:
        """The same with other tensors."""
        twin = copy(self)
        twin._moved = {places.starts.device: places}
        return twin

    def _places(self) -> Places:
        starts = self.starts.int()
        if not self.shared_prefix:
            empty = torch.empty(0, dtype=torch.int64)
            return Places(starts, empty, empty, empty)

        position = self.positions()
        spread_row = torch.arange(len(position))
        document = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        in_prefix = position < self.shared_prefix

        # The packed row holds one prefix: document d lies d prefixes earlier in it than among the spread rows.
        sources = torch.where(in_prefix, position, spread_row - self.shared_prefix * document)
        packed = (~in_prefix | (document == 0)).nonzero()[:, 0]
        prefixes = self.starts[:-1, None] + torch.arange(self.shared_prefix)
        return Places(starts, sources, packed, prefixes)

    def spread(self, x: Tensor) -> Tensor:
        """(T, …) packed rows to (S, …) spread ones, in which every document has the shared prefix."""
        if not self.shared_prefix:
            return x
        places = self.on(x.device)
        return _Rows.apply(x, places.sources, places.gradient_of_spread)  # type: ignore[no-untyped-call, no-any-return]

    def gather(self, x: Tensor) -> Tensor:
        """(S, …) spread rows to (T, …) packed ones: the shared prefix is taken from the first document."""
        if not self.shared_prefix:
            return x
        places = self.on(x.device)
        return _Rows.apply(x, places.packed, places.gradient_of_gather)  # type: ignore[no-untyped-call, no-any-return]


class Places(NamedTuple):
    """Indices between T packed rows, with the shared prefix once, and S spread rows, with it in every document."""

    starts: Tensor
    """(documents + 1,) int32: where documents begin, and the end, among the spread rows."""
    sources: Tensor
    """(S,) int64: which packed row each spread row is. Empty without a shared prefix, as those below."""
    packed: Tensor
    """(T,) int64: which spread row each packed row is; one of the shared prefix, that of the first document."""
    prefixes: Tensor
    """(documents, shared_prefix) int64: the spread rows of the shared prefix."""

    def gradient_of_spread(self, grad: Tensor) -> Tensor:
        """(S, …) to (T, …): a row of the shared prefix gets the sum over the documents, in order and in float32.

        PyTorch's own gradient of a look-up adds in the dtype of ``grad`` and, on a GPU, in an order that changes.
        """
        out = grad.index_select(0, self.packed)
        by_document = grad.index_select(0, self.prefixes.flatten()).view(*self.prefixes.shape, *grad.shape[1:])
        out[: self.prefixes.shape[1]] = by_document.sum(0, dtype=torch.float32)
        return out

    def gradient_of_gather(self, grad: Tensor) -> Tensor:
        """(T, …) to (S, …): the prefix of the first document gets the gradient, those of the others get 0."""
        out = grad.index_select(0, self.sources)
        return out.index_fill_(0, self.prefixes[1:].flatten(), 0.0)


class _Rows(torch.autograd.Function):
    """Rows looked up by an index, with a gradient of our own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient(grad), None, None

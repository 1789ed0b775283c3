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
        window: A token sees this many tokens, itself included; ``None`` means all before it.
        shared_prefix: So many tokens that every document begins with come first, once; then the rest of each document.
    """

    def __init__(self, lengths: Sequence[int], window: int | None, shared_prefix: int = 0) -> None:
        self.lengths = list(lengths)
        self.shared_prefix = shared_prefix
        self.starts = torch.tensor([0, *lengths]).cumsum(0)
        self.window = window or (1 << 40)
        self._moved: dict[torch.device, Places] = {}

    def positions(self) -> Tensor:
        """Of the rows with the common ones before the rest of every document: which token of its document each is."""
        lengths = torch.tensor(self.lengths)
        return torch.arange(int(self.starts[-1])) - self.starts[:-1].repeat_interleave(lengths)

    def on(self, device: torch.device) -> Places:
        """The places as indices; moved once."""
        if device not in self._moved:
            self._moved[device] = Places(*(to_device(index, device) for index in self._places()))
        return self._moved[device]

    def copy(self, places: Places) -> Layout:
        """The same with other tensors."""
        twin = copy(self)
        twin._moved = {places.starts.device: places}
        return twin

    def _places(self) -> Places:
        starts, shared_prefix, place = self.starts.int(), self.shared_prefix, self.positions()
        if not shared_prefix:
            empty = torch.empty(0, dtype=torch.int64)
            return Places(starts, empty, empty, empty)
        document = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        # A document's rest lies where it would lie if all beginnings but the first were left out.
        given = torch.where(place < shared_prefix, place, torch.arange(len(place)) - shared_prefix * document)
        kept = ((place >= shared_prefix) | (document == 0)).nonzero()[:, 0]
        return Places(starts, given, kept, self.starts[:-1, None] + torch.arange(shared_prefix))

    def sizes(self, query: Tensor, key: Tensor) -> tuple[int | float, ...]:
        """The closing arguments of both kernels."""
        _, heads, size = query.shape
        return len(self.starts) - 1, self.shared_prefix, heads, key.shape[1], size, self.window, size**-0.5

    def spread(self, x: Tensor) -> Tensor:
        """Rows as they are given to rows with the common ones before the rest of every document."""
        if not self.shared_prefix:
            return x
        places = self.on(x.device)
        return _Rows.apply(x, places.given, places.add_up)  # type: ignore[no-untyped-call, no-any-return]

    def gather(self, x: Tensor) -> Tensor:
        """The other way: what the common rows are in the first document is what they are in all."""
        if not self.shared_prefix:
            return x
        places = self.on(x.device)
        return _Rows.apply(x, places.kept, places.put_back)  # type: ignore[no-untyped-call, no-any-return]


class Places(NamedTuple):
    """Where the rows of a layout are: of T rows as they are given and S that have the common ones in each document."""

    starts: Tensor
    """(documents + 1,) int32: where documents begin, and the end, among the S."""
    given: Tensor
    """(S,) int64: which of the T rows each is. Empty where nothing is common, as those below."""
    kept: Tensor
    """(T,) int64: where each is among the S; of a common one, in the first document."""
    beginnings: Tensor
    """(documents, common) int64: where the common rows are among the S."""

    def add_up(self, grad: Tensor) -> Tensor:
        """Gradients of the S rows to those of the T: what the documents want of a common one, in order, in float32."""
        out = grad.index_select(0, self.kept)
        wanted = grad.index_select(0, self.beginnings.flatten()).view(*self.beginnings.shape, *grad.shape[1:])
        out[: self.beginnings.shape[1]] = wanted.sum(0, dtype=torch.float32)
        return out

    def put_back(self, grad: Tensor) -> Tensor:
        """Gradients of the T rows to those of the S that they were taken from: looked up where PyTorch would add."""
        out = grad.index_select(0, self.given)
        return out.index_fill_(0, self.beginnings[1:].flatten(), 0.0)


class _Rows(torch.autograd.Function):
    """Rows looked up, with a gradient of our own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return x.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient(grad), None, None

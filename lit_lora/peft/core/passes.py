"""What a method may learn from the user's rows before it starts: passes of micro-batches, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Pass", "each_gradient", "mean_squares"]


class Pass(NamedTuple):
    """One micro-batch of the user's rows."""

    target_positions: Tensor
    """(T,) bool: the positions whose next token is learned."""
    run: Callable[[], None]
    """Runs it through the model: forward, and backward to whatever requires a gradient. Rows of padding may follow."""


def each_gradient(
    model: nn.Module, names: Iterable[str], passes: Iterable[Pass], take: Callable[[str, Tensor], None]
) -> None:
    """Hand over the gradient of each of some layers' weights after each pass, one at a time: none is kept.

    Args:
        model: Frozen; frozen again after.
        names: Of the layers.
        passes: The rows.
        take: Gets a layer's name and its gradient (out, in).
    """

    def hand_over(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        take(name, weight.grad)
        weight.grad = None

    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    hooks = [
        weight.requires_grad_().register_post_accumulate_grad_hook(partial(hand_over, name))  # type: ignore[no-untyped-call]
        for name, weight in weights.items()
    ]
    try:
        for one in passes:
            one.run()
    finally:
        for hook, weight in zip(hooks, weights.values(), strict=True):
            hook.remove()
            weight.requires_grad_(False)


def mean_squares(model: nn.Module, names: Iterable[str], passes: Iterable[Pass]) -> dict[str, tuple[Tensor, Tensor]]:
    """The squared gradients of some layers' weights, summed over all passes: their means over rows and over columns.

    Args:
        model: Frozen; frozen again after.
        names: Of the layers.
        passes: The rows, one in each for squares of single rows' gradients.

    Returns:
        By layer the means of each row (out,) and of each column (in,), float32.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, gradient: Tensor) -> None:
        squares = gradient.float().square()
        rows, columns = sums.get(name, (0, 0))
        sums[name] = rows + squares.mean(1), columns + squares.mean(0)

    each_gradient(model, names, passes, add)
    return sums

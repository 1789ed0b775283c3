"""Passes of the user's rows through the model before training, and the gradients that some methods take from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Pass", "each_gradient", "mean_squares"]


class Pass(NamedTuple):
    """One micro-batch of the user's rows."""

    target_positions: Tensor
    """(T,) bool: the positions whose next token is a target token."""
    run: Callable[[], None]
    """Runs it through the model, forward and, if anything requires a gradient, backward.

    Layers may see more than T positions, padding after the micro-batch's own."""


def each_gradient(
    model: nn.Module, names: Iterable[str], passes: Iterable[Pass], take: Callable[[str, Tensor], None]
) -> None:
    """Call ``take`` with the gradient of each layer's weight in each pass.

    Each gradient is dropped at once, so memory is needed for one at a time, not for those of the whole model.

    Args:
        model: Frozen; its layers require gradients during the passes.
        names: Names of the layers.
        passes: The rows.
        take: Called with a layer's name and its gradient (out, in).
    """

    def hand_over(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        take(name, weight.grad)
        weight.grad = None

    weights = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    hooks = []
    for name, weight in weights.items():
        weight.requires_grad_()
        # Called within the backward pass, as soon as this gradient is complete.
        hook = weight.register_post_accumulate_grad_hook(partial(hand_over, name))  # type: ignore[no-untyped-call]
        hooks.append(hook)
    try:
        for each in passes:
            each.run()
    finally:
        for hook, weight in zip(hooks, weights.values(), strict=True):
            hook.remove()
            weight.requires_grad_(False)


def mean_squares(model: nn.Module, names: Iterable[str], passes: Iterable[Pass]) -> dict[str, tuple[Tensor, Tensor]]:
    """The squared gradients of some layers' weights, summed over the passes and averaged within rows and columns.

    Args:
        model: Frozen; its layers require gradients during the passes.
        names: Names of the layers.
        passes: The rows, one per pass for the squares of single rows' gradients.

    Returns:
        By layer, the mean of each matrix row (out,) and of each column (in,), float32.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, gradient: Tensor) -> None:
        squares = gradient.float().square()
        row_sum, column_sum = sums.get(name, (0, 0))
        sums[name] = (row_sum + squares.mean(1), column_sum + squares.mean(0))

    each_gradient(model, names, passes, add)
    return sums

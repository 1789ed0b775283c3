"""Cross entropy over the learned tokens, without ever holding the logits of a whole batch.

The hidden states of target positions are gathered first; the head runs on them in chunks, forward and backward at
once, so that logits of prompt tokens are never computed and at most ``chunk`` rows of logits exist.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_lora import kernels

__all__ = ["IGNORE_INDEX", "Batch", "LanguageModel", "backward", "cross_entropy_sum", "evaluate"]

IGNORE_INDEX = -100
"""Label of a position that is not learned."""

CHUNK = 256
"""Rows of logits that exist at a time: 25 MB in bfloat16 for a vocabulary of 49k."""


class Batch(Protocol):
    """Documents packed into one row, with the token that each position must predict."""

    @property
    def input_ids(self) -> Tensor:
        """(1, T) int64."""

    @property
    def labels(self) -> Tensor:
        """(1, T) int64: the next token, or ``IGNORE_INDEX``."""

    @property
    def lengths(self) -> list[int]:
        """Tokens per document."""

    @property
    def rows(self) -> list[int]:
        """Dataset row of each document."""


class LanguageModel(Protocol):
    """What the loss needs of a model."""

    lm_head: Any

    def hidden_states(self, input_ids: Tensor, *, lengths: list[int]) -> Tensor:
        """(1, T) token ids to (1, T, D)."""


def backward(model: LanguageModel, batch: Batch, scale: float) -> float:
    """Add the gradients of ``scale * sum of token losses`` to the parameters' ``.grad``.

    Args:
        model: With trainable parameters anywhere, the head included.
        batch: One micro-batch.
        scale: Such as 1 / (target tokens of the whole step).

    Returns:
        The unscaled sum of token losses, in nats; 0.0 (and no gradient) when the batch has no target.
    """
    positions = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
    if positions.numel() == 0:
        return 0.0
    hidden = model.hidden_states(batch.input_ids, lengths=batch.lengths)[0]  # (T, D)
    targets = batch.labels[0, positions]
    # The graph is cut at the gathered states: each chunk's backward ends there and its logits are freed at once.
    leaf = hidden.detach()[positions].requires_grad_(hidden.requires_grad)
    total = 0.0
    for states, labels in zip(torch.split(leaf, CHUNK), torch.split(targets, CHUNK), strict=True):
        loss, scaled = cross_entropy_sum(model.lm_head(states), labels, scale)
        if scaled.requires_grad:
            torch.autograd.backward(scaled)
        total += float(loss)
    if leaf.grad is not None:
        gradient = torch.zeros_like(hidden).index_copy_(0, positions, leaf.grad)
        torch.autograd.backward(hidden, gradient)
    return total


@torch.no_grad()
def evaluate(model: LanguageModel, batch: Batch) -> tuple[float, int]:
    """The sum of token losses in nats, and how many target tokens it is over."""
    positions = (batch.labels[0] != IGNORE_INDEX).nonzero()[:, 0]
    if positions.numel() == 0:
        return 0.0, 0
    hidden = model.hidden_states(batch.input_ids, lengths=batch.lengths)[0][positions]
    targets = batch.labels[0, positions]
    chunks = zip(torch.split(hidden, CHUNK), torch.split(targets, CHUNK), strict=True)
    return sum(float(cross_entropy_sum(model.lm_head(states), labels)[0]) for states, labels in chunks), len(targets)


def cross_entropy_sum(logits: Tensor, labels: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Sum over rows of ``-log softmax(logits)[label]``, computed in float32, and ``scale`` times it.

    Only the second has a gradient. It is computed with the sum, in place of the logits where a kernel applies, so a
    chunk needs no second buffer and one pass fewer.

    Args:
        logits: (T, V); used up.
        labels: (T,) int64, none of them ``IGNORE_INDEX``.
        scale: Factor of the gradient.

    Returns:
        Two float32 scalars.
    """
    if kernels.usable(logits):
        return _CrossEntropySum.apply(logits, labels, scale)  # type: ignore[no-untyped-call, no-any-return]
    total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    return total.detach(), total * scale


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(labels), dtype=torch.float32)
        kernels.call("cross_entropy", logits, labels, losses, *logits.shape, scale)
        ctx.save_for_backward(logits)
        total = losses.sum()
        ctx.mark_non_differentiable(total)
        return total, total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient if float(grad) == 1.0 else gradient * grad, None, None

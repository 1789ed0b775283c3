"""Cross entropy over the learned tokens, without ever holding the logits of a whole batch.

The hidden states of target positions are gathered first; the head runs on them in chunks, forward and backward at
once, so that logits of prompt tokens are never computed and at most ``chunk`` rows of logits exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora import IGNORE_INDEX, kernels
from lit_lora.model.ops import to_device

__all__ = [
    "CHUNK",
    "GPU_CHUNK",
    "STEP",
    "Batch",
    "LanguageModel",
    "backward",
    "cross_entropy_backward",
    "cross_entropy_sum",
    "evaluate",
    "token_step",
]

CHUNK = 256
"""Rows of logits that exist at a time: 25 MB in bfloat16 for a vocabulary of 49k."""

GPU_CHUNK = 4096
"""The same on a GPU: 1 GB in bfloat16 for a vocabulary of 128k, and the products are large enough."""

STEP = 64
"""Targets of a micro-batch are rounded up to a multiple of this. Each new size costs the library compiled products, and
memory that later sizes cannot fill: without it the process grew by 13 MB a step."""


def token_step(device: str = "cpu") -> int:
    """What the tokens of a micro-batch are rounded up to a multiple of: our own products need less.

    On a GPU its products are fastest so, and their library chooses how to compute them only for few sizes.
    """
    return 128 if device == "cuda" else 16 if kernels.has("sum_of_products") else STEP


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
    def common(self) -> int:
        """The row begins with so many tokens that every document begins with; it holds them once."""

    @property
    def rows(self) -> list[int]:
        """Dataset row of each document."""


class LanguageModel(Protocol):
    """What the loss needs of a model."""

    lm_head: Any

    def parameters(self) -> Iterator[Tensor]:
        """All parameters; they are on one device."""

    def hidden_states(self, input_ids: Tensor, *, lengths: list[int], common: int) -> Tensor:
        """(1, T) token ids to (1, T, D)."""


def backward(model: LanguageModel, batch: Batch, scale: float) -> Tensor | float:
    """Add the gradients of ``scale * sum of token losses`` to the parameters' ``.grad``.

    Args:
        model: With trainable parameters anywhere, the head included.
        batch: One micro-batch.
        scale: Such as 1 / (target tokens of the whole step).

    Returns:
        The unscaled sum of token losses, in nats, as a scalar on the model's device, so that a GPU is not waited for;
        0.0 (and no gradient) when the batch has no target.
    """
    targets = _targets(batch, _device(model))
    if targets is None:
        return 0.0
    hidden = _hidden_states(model, batch)  # (T, D)
    positions, labels = targets
    # The graph is cut at the gathered states: each chunk's backward ends there and its logits are freed at once.
    leaf = hidden.detach()[positions].requires_grad_(hidden.requires_grad)
    total = torch.zeros((), device=leaf.device)
    for part, part_labels in _chunks(leaf, labels):
        total += cross_entropy_backward(model.lm_head(part), part_labels, scale)
    if leaf.grad is not None:
        gradient = torch.zeros_like(hidden).index_add_(0, positions, leaf.grad)
        torch.autograd.backward(hidden, gradient)
    return total


@torch.no_grad()
def evaluate(model: LanguageModel, batch: Batch) -> tuple[float, int]:
    """The sum of token losses in nats, and how many target tokens it is over."""
    targets = _targets(batch, _device(model))
    if targets is None:
        return 0.0, 0
    positions, labels = targets
    chunks = _chunks(_hidden_states(model, batch)[positions], labels)
    total = sum(float(cross_entropy_sum(model.lm_head(part), part_labels)) for part, part_labels in chunks)
    return total, int((labels != IGNORE_INDEX).sum())


def _chunks(states: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and labels in portions whose logits exist at a time."""
    size = GPU_CHUNK if kernels.device_type(states.device) == "cuda" else CHUNK
    return zip(torch.split(states, size), torch.split(labels, size), strict=True)


def _hidden_states(model: LanguageModel, batch: Batch) -> Tensor:
    """(T, D) with T rounded up by a document of padding that nobody looks at."""
    device = _device(model)
    filler = -batch.input_ids.shape[1] % token_step(kernels.device_type(device))
    ids = to_device(F.pad(batch.input_ids, (0, filler)), device)
    lengths = [*batch.lengths, batch.common + filler] if filler else batch.lengths
    return model.hidden_states(ids, lengths=lengths, common=batch.common)[0]


def _device(model: LanguageModel) -> torch.device:
    return next(iter(model.parameters())).device


def _targets(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Positions with a target and their labels, rounded up with ignored ones; ``None`` when there is no target."""
    labels = batch.labels[0]
    positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    if positions.numel() == 0:
        return None
    filler = -positions.numel() % STEP
    ignored = labels.new_full((filler,), IGNORE_INDEX)
    positions, labels = torch.cat((positions, positions.new_zeros(filler))), torch.cat((labels[positions], ignored))
    return to_device(positions, device), to_device(labels, device)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of ``-log softmax(logits)[label]``, computed in float32, without a gradient.

    Args:
        logits: (T, V); used up.
        labels: (T,) int64; a row with ``IGNORE_INDEX`` counts nothing.

    Returns:
        A float32 scalar.
    """
    if kernels.usable(logits, kernel="cross_entropy"):
        return _sum_by_kernel(logits.detach(), labels, 1.0)
    return F.cross_entropy(logits.detach().float(), labels, reduction="sum")


def cross_entropy_backward(logits: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
    """As :func:`cross_entropy_sum`, and the gradients of ``scale`` times it are added up where the logits came from.

    A kernel computes them with the sum, in place of the logits, so a chunk needs no second buffer and one pass fewer.

    Args:
        logits: (T, V); used up, their graph too.
        labels: (T,) int64; a row with ``IGNORE_INDEX`` counts nothing.
        scale: Factor of the gradient; a float32 scalar on the device of the logits where it may change later.

    Returns:
        The unscaled sum, a float32 scalar.
    """
    if not kernels.usable(logits, kernel="cross_entropy"):
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        if total.requires_grad:
            torch.autograd.backward(total * scale)
        return total.detach()
    gradient = logits.detach()  # of the same memory
    total = _sum_by_kernel(gradient, labels, scale)
    if logits.requires_grad:
        torch.autograd.backward(logits, gradient)
    return total


def _sum_by_kernel(logits: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
    """The logits become the gradients of ``scale`` times the sum."""
    losses = logits.new_empty(len(labels), dtype=torch.float32)
    factor = scale if logits.is_cuda else float(scale)
    kernels.call("cross_entropy", logits, labels, losses, *logits.shape, factor)
    return losses.sum()

"""Cross entropy over the target tokens, without ever holding the logits of a whole batch.

The hidden states of target positions are gathered first; the head runs on them in chunks, forward and backward at
once, so that logits of prompt tokens are never computed and only one chunk of logits exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_lora import IGNORE_INDEX, kernels
from lit_lora.model import LanguageModel
from lit_lora.model.ops import to_device

__all__ = [
    "CHUNK",
    "GPU_CHUNK",
    "STEP",
    "Batch",
    "Inputs",
    "backward",
    "backward_from",
    "cross_entropy_backward",
    "cross_entropy_sum",
    "evaluate",
    "inputs_of",
    "padded",
]

CHUNK = 256
"""Rows of logits that exist at a time: 25 MB in bfloat16 with a vocabulary of 49k."""

GPU_CHUNK = 4096
"""The same on a GPU, whose products must be larger: 1 GB in bfloat16 with a vocabulary of 128k."""

STEP = 64
"""The targets of a micro-batch are rounded up to a multiple of this. For each new size the library compiles products
and takes memory that later sizes cannot fill: without rounding the process grew by 13 MB per step."""


def padded(tokens: int, device: str = "cpu") -> int:
    """The size that the tokens of a micro-batch are rounded up to, so that few sizes occur.

    A GPU's products are fastest in multiples of 128, and each size needs a CUDA graph of its own, whose capture takes
    as long as two steps: 8 sizes between 4,096 and 8,192 tokens add 4 % of padding. Our own products on a CPU need
    less.
    """
    if device == "cuda":
        next_power_of_two = 1 << (tokens - 1).bit_length()
        return _round_up(tokens, max(128, next_power_of_two // 16))
    return _round_up(tokens, 16 if kernels.has("sum_of_products") else STEP)


def _round_up(count: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-count // step) * step


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
    def shared_prefix(self) -> int:
        """The number of tokens that every document begins with; the row holds them once, at its beginning."""

    @property
    def rows(self) -> list[int]:
        """Dataset row of each document."""


class Inputs(NamedTuple):
    """A micro-batch on its device, rounded up."""

    input_ids: Tensor
    """(1, T) int64; the last document may be padding, which nobody attends to."""
    lengths: list[int]
    """Tokens per document, the shared prefix included."""
    shared_prefix: int
    """As in :class:`Batch`."""
    positions: Tensor
    """(K,) int64: the positions of ``input_ids`` that predict a target."""
    labels: Tensor
    """(K,) int64: the targets; ``IGNORE_INDEX`` for padding."""


def inputs_of(batch: Batch, device: torch.device) -> Inputs | None:
    """A micro-batch as it is computed; ``None`` when it has no target."""
    _start_backward_thread(device)
    kind = kernels.device_type(device)
    labels = batch.labels[0]
    positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    tokens, targets = len(labels), len(positions)
    if targets == 0:
        return None

    # Tokens are filled up by one more document. Like all, it counts the shared prefix, which the row holds already.
    token_padding = padded(tokens, kind) - tokens
    input_ids = F.pad(batch.input_ids, (0, token_padding))
    lengths = list(batch.lengths)
    if token_padding:
        lengths.append(batch.shared_prefix + token_padding)

    # Targets are filled up by position 0 with a label that counts nothing.
    step = max(STEP, (tokens + token_padding) // 16) if kind == "cuda" else STEP
    target_padding = _round_up(targets, step) - targets
    padded_positions = F.pad(positions, (0, target_padding))
    padded_labels = F.pad(labels[positions], (0, target_padding), value=IGNORE_INDEX)
    return Inputs(
        to_device(input_ids, device),
        lengths,
        batch.shared_prefix,
        to_device(padded_positions, device),
        to_device(padded_labels, device),
    )


@lru_cache
def _start_backward_thread(device: torch.device) -> None:
    """Run something harmless in the thread that autograd has for each GPU, once.

    cuBLAS has no context there yet, and PyTorch warns when the very first operation is a product.
    """
    if device.type == "cuda":
        with torch.enable_grad():
            torch.autograd.backward(torch.ones((), device=device, requires_grad=True) * 1)


def backward(model: LanguageModel, batch: Batch, scale: float) -> Tensor | float:
    """Add the gradients of ``scale * sum of token losses`` to the parameters' ``.grad``.

    Args:
        model: With trainable parameters anywhere, the head included.
        batch: One micro-batch.
        scale: Such as 1 / (target tokens of the whole step).

    Returns:
        The unscaled sum of token losses, in nats, as a scalar on the model's device, because reading it would wait for
        a GPU; 0.0, without a gradient, when the batch has no target.
    """
    inputs = inputs_of(batch, _device(model))
    if inputs is None:
        return 0.0
    return backward_from(model, _hidden_states(model, inputs), inputs, scale)


def backward_from(model: LanguageModel, hidden: Tensor, inputs: Inputs, scale: float | Tensor) -> Tensor:
    """The rest of :func:`backward`, from the hidden states (T, D) on."""
    # The graph is cut at the gathered states: each chunk's backward ends there and its logits are freed at once.
    targets = hidden.detach()[inputs.positions].requires_grad_(hidden.requires_grad)
    total = torch.zeros((), device=targets.device)
    for states, labels in _chunks(targets, inputs.labels):
        total += cross_entropy_backward(model.logits(states), labels, scale)

    if targets.grad is not None:
        gradient = torch.zeros_like(hidden).index_add_(0, inputs.positions, targets.grad)
        torch.autograd.backward(hidden, gradient)
    return total


@torch.no_grad()
def evaluate(model: LanguageModel, batch: Batch) -> tuple[float, int]:
    """The sum of token losses, in nats, and the number of target tokens."""
    inputs = inputs_of(batch, _device(model))
    if inputs is None:
        return 0.0, 0

    targets = _hidden_states(model, inputs)[inputs.positions]
    total = 0.0
    for states, labels in _chunks(targets, inputs.labels):
        total += float(cross_entropy_sum(model.logits(states), labels))
    return total, int((batch.labels != IGNORE_INDEX).sum())


def _chunks(states: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and labels, as many at a time as may have logits."""
    size = GPU_CHUNK if kernels.device_type(states.device) == "cuda" else CHUNK
    return zip(torch.split(states, size), torch.split(labels, size), strict=True)


def _hidden_states(model: LanguageModel, inputs: Inputs) -> Tensor:
    """(T, D)."""
    return model.hidden_states(inputs.input_ids, lengths=inputs.lengths, shared_prefix=inputs.shared_prefix)[0]


def _device(model: LanguageModel) -> torch.device:
    return next(model.parameters()).device


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of ``-log softmax(logits)[label]``, computed in float32, without a gradient.

    Args:
        logits: (T, V); may be overwritten.
        labels: (T,) int64; a row with ``IGNORE_INDEX`` counts nothing.

    Returns:
        A float32 scalar.
    """
    return cross_entropy_backward(logits.detach(), labels, 1.0)


def cross_entropy_backward(logits: Tensor, labels: Tensor, scale: float | Tensor) -> Tensor:
    """As :func:`cross_entropy_sum`, with the backward pass of ``scale`` times it.

    A kernel writes the gradient over the logits while it computes the sum: no second buffer, and one pass fewer.

    Args:
        logits: (T, V); may be overwritten, and their graph is freed.
        labels: (T,) int64; a row with ``IGNORE_INDEX`` counts nothing.
        scale: Factor of the gradient. For a CUDA graph, whose replays have other factors, a float32 scalar on the
            device of the logits.

    Returns:
        The unscaled sum, a float32 scalar.
    """
    if not kernels.usable(logits, kernel="cross_entropy"):
        total = F.cross_entropy(logits.float(), labels, reduction="sum")
        if total.requires_grad:
            torch.autograd.backward(total * scale)
        return total.detach()

    gradient = logits.detach()  # the same memory: the kernel writes the gradient over the logits
    losses = logits.new_empty(len(labels), dtype=torch.float32)
    factor = scale if logits.is_cuda else float(scale)
    kernels.call("cross_entropy", gradient, labels, losses, *logits.shape, factor)
    if logits.requires_grad:
        torch.autograd.backward(logits, gradient)
    return losses.sum()

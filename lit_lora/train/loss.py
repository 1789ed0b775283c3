"""Cross entropy over the learned tokens, without ever holding the logits of a whole batch.

The hidden states of target positions are gathered first; the head runs on them in chunks, forward and backward at
once, so that logits of prompt tokens are never computed and at most ``chunk`` rows of logits exist.
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
"""Rows of logits that exist at a time: 25 MB in bfloat16 for a vocabulary of 49k."""

GPU_CHUNK = 4096
"""The same on a GPU: 1 GB in bfloat16 for a vocabulary of 128k, and the products are large enough."""

STEP = 64
"""Targets of a micro-batch are rounded up to a multiple of this. Each new size costs the library compiled products, and
memory that later sizes cannot fill: without it the process grew by 13 MB a step."""


def padded(tokens: int, device: str = "cpu") -> int:
    """What the tokens of a micro-batch are rounded up to, so that few sizes occur.

    A GPU's products are fastest in multiples of 128, and each size is recorded anew, which takes as long as two steps:
    8 sizes from 4,096 to 8,192 tokens cost 4 % more of them. Our own products on a CPU need less.
    """
    if device == "cuda":
        return _up(tokens, max(128, (1 << (tokens - 1).bit_length()) // 16))
    return _up(tokens, 16 if kernels.has("sum_of_products") else STEP)


def _up(count: int, step: int) -> int:
    """The next multiple."""
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
        """The row begins with so many tokens that every document begins with; it holds them once."""

    @property
    def rows(self) -> list[int]:
        """Dataset row of each document."""


class Inputs(NamedTuple):
    """A micro-batch on its device, rounded up."""

    input_ids: Tensor
    """(1, T) int64; a last document may be padding that nobody looks at."""
    lengths: list[int]
    """Tokens per document, the common ones included."""
    shared_prefix: int
    """So many tokens that every document begins with stand in the row once, at its beginning."""
    positions: Tensor
    """(K,) int64: where a token is to be predicted."""
    labels: Tensor
    """(K,) int64: which one; ``IGNORE_INDEX`` where it is padding."""


def inputs_of(batch: Batch, device: torch.device) -> Inputs | None:
    """A micro-batch as it is computed; ``None`` when it has no target."""
    _start_backward_thread(device)
    labels, kind = batch.labels[0], kernels.device_type(device)
    positions = (labels != IGNORE_INDEX).nonzero()[:, 0]
    tokens, count = len(labels), len(positions)
    if count == 0:
        return None
    filler = padded(tokens, kind) - tokens
    step = max(STEP, (tokens + filler) // 16) if kind == "cuda" else STEP
    ids = F.pad(batch.input_ids, (0, filler))
    lengths = [*batch.lengths, batch.shared_prefix + filler] if filler else batch.lengths
    more = _up(count, step) - count
    wanted = F.pad(labels[positions], (0, more), value=IGNORE_INDEX)
    moved = (to_device(x, device) for x in (F.pad(positions, (0, more)), wanted))
    return Inputs(to_device(ids, device), lengths, batch.shared_prefix, *moved)


@lru_cache
def _start_backward_thread(device: torch.device) -> None:
    """Autograd has a thread for each GPU, in which PyTorch warns when the very first operation is a product."""
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
        The unscaled sum of token losses, in nats, as a scalar on the model's device, so that a GPU is not waited for;
        0.0 (and no gradient) when the batch has no target.
    """
    inputs = inputs_of(batch, _device(model))
    return 0.0 if inputs is None else backward_from(model, _hidden_states(model, inputs), inputs, scale)


def backward_from(model: LanguageModel, hidden: Tensor, inputs: Inputs, scale: float | Tensor) -> Tensor:
    """The rest of :func:`backward`, from the hidden states (T, D) on."""
    # The graph is cut at the gathered states: each chunk's backward ends there and its logits are freed at once.
    leaf = hidden.detach()[inputs.positions].requires_grad_(hidden.requires_grad)
    total = torch.zeros((), device=leaf.device)
    for part, labels in _chunks(leaf, inputs.labels):
        total += cross_entropy_backward(model.logits(part), labels, scale)
    if leaf.grad is not None:
        gradient = torch.zeros_like(hidden).index_add_(0, inputs.positions, leaf.grad)
        torch.autograd.backward(hidden, gradient)
    return total


@torch.no_grad()
def evaluate(model: LanguageModel, batch: Batch) -> tuple[float, int]:
    """The sum of token losses in nats, and how many target tokens it is over."""
    inputs = inputs_of(batch, _device(model))
    if inputs is None:
        return 0.0, 0
    chunks = _chunks(_hidden_states(model, inputs)[inputs.positions], inputs.labels)
    total = sum(float(cross_entropy_sum(model.logits(part), labels)) for part, labels in chunks)
    return total, int((batch.labels != IGNORE_INDEX).sum())


def _chunks(states: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Hidden states and labels in portions whose logits exist at a time."""
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
        logits: (T, V); used up.
        labels: (T,) int64; a row with ``IGNORE_INDEX`` counts nothing.

    Returns:
        A float32 scalar.
    """
    return cross_entropy_backward(logits.detach(), labels, 1.0)


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
    gradient = logits.detach()  # of the same memory: the kernel writes it over the logits
    losses = logits.new_empty(len(labels), dtype=torch.float32)
    factor = scale if logits.is_cuda else float(scale)
    kernels.call("cross_entropy", gradient, labels, losses, *logits.shape, factor)
    if logits.requires_grad:
        torch.autograd.backward(logits, gradient)
    return losses.sum()

"""The parts of a decoder layer: RMS norm and gated MLP.

A module's children have the names that its family gives them, so a parameter is called here what its checkpoint calls
it. A module keeps these names and looks a child up by them, because methods put other modules in the children's places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_lora.model.config import ModelConfig
from lit_lora.model.ops import add_rms_norm, linear, swiglu

__all__ = ["MLP", "Linear", "RMSNorm", "add_part", "checkpointed", "project", "recomputed"]

R = TypeVar("R")


class Linear(nn.Linear):
    """A linear layer that is fast for one token, as in decoding; see :func:`lit_lora.model.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight`` of the residual stream, after adding to it.

    The output of attention or an MLP reaches the stream here and not where it is computed: adding and norming are one
    pass over memory instead of two. So a layer hands on the stream ``x`` and, as ``delta``, what is still to be added.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x + delta`` and its norm, each (..., D) in the dtype of ``x``."""
        return add_rms_norm(x, delta, self.weight, self.eps)


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``. Source: arXiv:2002.05202 (SwiGLU).

    Args:
        config: Sizes and names.
        inner: The width of the product; ``config.intermediate_size`` if omitted.
    """

    def __init__(self, config: ModelConfig, inner: int | None = None) -> None:
        super().__init__()
        names, width = config.names, config.hidden_size
        inner = inner or config.intermediate_size
        self._gate = add_part(self, names.mlp_gate, Linear(width, inner, bias=config.mlp_bias))
        self._up = add_part(self, names.mlp_in, Linear(width, inner, bias=config.mlp_bias))
        self._down = add_part(self, names.mlp_out, Linear(inner, width, bias=config.mlp_bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate, value = project(x, getattr(self, self._gate), getattr(self, self._up))
        inner = swiglu(gate, value)
        with recomputed(inner, lambda: swiglu(gate, value)):
            out: Tensor = getattr(self, self._down)(inner)
        return out


def add_part(parent: nn.Module, name: str, part: nn.Module) -> str:
    """Make ``part`` a child of ``parent``, in place, called by the last part of ``name``; returns what it is called."""
    last = name.rpartition(".")[2]
    parent.add_module(last, part)
    return last


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of several layers for one input.

    Layers of one type that has a static ``forward_together(layers, x)`` compute them at once: a seam for the modules by
    which a finetuning method replaces linear layers.
    """
    kind = type(layers[0])
    forward_together = getattr(kind, "forward_together", None)
    if forward_together is not None and all(type(layer) is kind for layer in layers):
        outputs: tuple[Tensor, ...] = forward_together(layers, x)
        return outputs
    return tuple(layer(x) for layer in layers)


@contextmanager
def recomputed(value: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Inside the block, ``value`` is not saved for the backward pass but computed again there.

    For what is cheap to compute from tensors that are saved anyway: a gate's output, a norm's. It must not be changed
    in place, and ``compute`` must give the same bits.

    Args:
        value: (..., D).
        compute: Gives it again, from tensors that the backward pass has.
    """
    if not torch.is_grad_enabled() or _CHECKPOINTED.get():
        yield
        return

    # Autograd calls `pack` for each tensor that an operation in the block saves, and `unpack` when the backward pass
    # wants it. A linear layer that reads `value` saves a view of it, flattened perhaps: another Python object with the
    # same storage. It is recognized by where it lies, and its shape alone is saved in its place.
    value_storage, value_size = _storage(value), value.numel()

    def pack(tensor: Tensor) -> Tensor | tuple[int, ...]:
        is_value = _storage(tensor) == value_storage and tensor.numel() == value_size and tensor.is_contiguous()
        return tuple(tensor.shape) if is_value else tensor

    def unpack(saved: Tensor | tuple[int, ...]) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with torch.no_grad():
            return compute().view(saved)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


_CHECKPOINTED: ContextVar[bool] = ContextVar("_CHECKPOINTED", default=False)
"""Whether a checkpoint is open. Its own hooks save nothing, and PyTorch asks only the innermost hooks: with those of
:func:`recomputed` inside it, tensors that the checkpoint drops would be saved after all."""


def checkpointed(function: Callable[..., R], *arguments: Any) -> R:
    """Call ``function`` and save only its arguments; the backward pass calls it again.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    if not torch.is_grad_enabled():
        return function(*arguments)

    def call(*arguments: Any) -> R:
        token = _CHECKPOINTED.set(True)
        try:
            return function(*arguments)
        finally:
            _CHECKPOINTED.reset(token)

    result: R = checkpoint(call, *arguments, use_reentrant=False)
    return result


def _storage(tensor: Tensor) -> tuple[int, int]:
    """The tensor's storage and the offset in it; unlike an address, they exist on the meta device too."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())

"""The parts of a decoder layer: RMS norms and gated MLP.

A module's children have the names that its family gives them, so a parameter is called here what its checkpoint calls
it. A module keeps these names and looks a child up by them, because methods put other modules in the children's places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_lora.model.config import Activation, ModelConfig
from lit_lora.model.ops import add_rms_norm, geglu, linear, swiglu

__all__ = [
    "GATED",
    "MLP",
    "AddRMSNorm",
    "Linear",
    "Projections",
    "RMSNorm",
    "ScaledEmbedding",
    "add_part",
    "checkpointed",
    "project",
    "recomputed",
]

R = TypeVar("R")


class Linear(nn.Linear):
    """A linear layer that is fast for one token, as in decoding; see :func:`lit_lora.model.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * (offset + weight)``.

    Args:
        width: Of what is normed, D.
        config: Its ``rms_norm_eps``, and the family's offset.
    """

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, config.block.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D) in the dtype of ``x``."""
        return add_rms_norm(x, None, self.weight, self.eps, self.offset)[1]


class AddRMSNorm(RMSNorm):
    """:class:`RMSNorm` of the residual stream, after adding to it.

    The output of attention or an MLP reaches the stream here and not where it is computed: adding and norming are one
    pass over memory instead of two. So a layer hands on the stream ``x`` and, as ``delta``, what is still to be added.
    """

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``x + delta`` and its norm, each (..., D) in the dtype of ``x``."""
        return add_rms_norm(x, delta, self.weight, self.eps, self.offset)


class ScaledEmbedding(nn.Embedding):
    """An embedding times the root of its width, rounded to the dtype of its weight as transformers does it."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed (...,) int64 to (..., D)."""
        return super().forward(input) * self.embed_scale

    @property
    def embed_scale(self) -> Tensor:
        """The factor, a scalar."""
        return torch.tensor(self.embedding_dim**0.5, dtype=self.weight.dtype, device=self.weight.device)


class MLP(nn.Module):
    """``down(activation(gate(x)) * up(x))``. Source: arXiv:2002.05202.

    Args:
        config: Sizes and names.
        inner: The width of the product; ``config.intermediate_size`` if omitted.
    """

    def __init__(self, config: ModelConfig, inner: int | None = None) -> None:
        super().__init__()
        names, width = config.names, config.hidden_size
        inner = inner or config.intermediate_size
        self.gated = GATED[config.hidden_act]
        gate_and_up = names.mlp_gate, names.mlp_in
        self._gate_and_up = Projections(self, gate_and_up, width, (inner, inner), bias=config.mlp_bias)
        self._down = add_part(self, names.mlp_out, Linear(inner, width, bias=config.mlp_bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate, value = self._gate_and_up(self, x)
        inner = self.gated(gate, value)
        with recomputed(inner, lambda: self.gated(gate, value)):
            out: Tensor = getattr(self, self._down)(inner)
        return out


def _geglu_exact(gate: Tensor, value: Tensor) -> Tensor:
    return F.gelu(gate) * value


GATED: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": swiglu,
    "swish": swiglu,
    "gelu": _geglu_exact,
    "gelu_pytorch_tanh": geglu,
}
"""``activation(gate) * value`` of two tensors of one shape, by the name of the activation."""


class Projections:
    """Linear layers of one input; if they have one name, they are fused: one layer, whose output is theirs in order.

    Args:
        parent: Gets the layers as children, in place.
        names: The name of each.
        width: Of the input, D.
        sizes: The size of each one's output.
        bias: Whether they have a bias.
    """

    def __init__(
        self, parent: nn.Module, names: Sequence[str], width: int, sizes: Sequence[int], *, bias: bool
    ) -> None:
        self.sizes = list(sizes)
        widths = dict(zip(names, sizes, strict=True)) if len(set(names)) > 1 else {names[0]: sum(sizes)}
        self.children = [add_part(parent, name, Linear(width, size, bias=bias)) for name, size in widths.items()]

    def __call__(self, parent: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        """Map (..., D) to the outputs, (..., size) each, by the children that ``parent`` has now."""
        outputs = project(x, *[getattr(parent, child) for child in self.children])
        if len(outputs) == len(self.sizes):
            return outputs
        (fused,) = outputs
        return tuple(part.contiguous() for part in torch.split(fused, self.sizes, dim=-1))  # as kernels take them


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

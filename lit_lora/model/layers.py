"""The parts of a decoder layer: RMS norm and gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_lora.model.ops import add_rms_norm, swiglu

__all__ = ["MLP", "RMSNorm", "project"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight``, of the residual stream after adding to it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``x + delta`` and its norm, each (..., D) in the dtype of ``x``."""
        return add_rms_norm(x, delta, self.weight, self.eps)


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``. Source: arXiv:2002.05202 (SwiGLU)."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.down_proj(swiglu(*project(x, self.gate_proj, self.up_proj)))
        return out


def project(x: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """The outputs of several layers for one input.

    Layers of one type that has a static ``forward_together(layers, x)`` compute them at once: a seam for modules that a
    finetuning method puts in the place of linear layers.
    """
    together = getattr(type(layers[0]), "forward_together", None)
    if together is not None and all(type(layer) is type(layers[0]) for layer in layers):
        outputs: tuple[Tensor, ...] = together(layers, x)
        return outputs
    return tuple(layer(x) for layer in layers)

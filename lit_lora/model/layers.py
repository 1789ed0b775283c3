"""The parts of a decoder layer: RMS norm, rotation, gated MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MLP", "RMSNorm", "rotate"]


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) * weight``, computed in float32. Source: arXiv:1910.07467 eq. 4."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of (..., D); the result has the dtype of ``x``."""
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normal.to(x.dtype) * self.weight


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``. Source: arXiv:2002.05202 (SwiGLU)."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair ``(x_i, x_{i+H/2})`` by its position's angle.

    Args:
        x: (T, heads, H).
        cosine: (T, H/2) float32.
        sine: (T, H/2) float32.

    Returns:
        (T, heads, H) in the dtype of ``x``.
    """
    first, second = x.chunk(2, dim=-1)  # (T, heads, H/2) each
    cosine, sine = cosine[:, None].to(x.dtype), sine[:, None].to(x.dtype)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)

"""A matrix as codes plus a low-rank remainder, ``W = Q + L R`` with ``Q`` quantized, by alternating fits.

Each iteration quantizes ``W - L R`` to ``Q``, and then fits ``L R`` to ``W - Q``. The error may rise from one iteration
to the next, so the best one is returned. Source: LoftQ, arXiv:2310.08659, algorithm 1; LQ-LoRA, arXiv:2311.12023,
algorithm 2 and section 3.3 (weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_lora.peft.core.svd import Weights, low_rank
from lit_lora.quantize import Quantized

__all__ = ["Decomposed", "decompose"]


@dataclass(frozen=True)
class Decomposed:
    """``W`` as codes plus ``left @ right``."""

    quantized: Quantized
    left: Tensor
    """(out, R) float32."""
    right: Tensor
    """(R, in) float32."""
    error: float
    """Norm of the difference to ``W``, weighted, relative to that of ``W``."""


def decompose(
    weight: Tensor,
    quantize: Callable[[Tensor], Quantized],
    rank: int,
    iterations: int,
    *,
    weights: Weights | None = None,
    least_gain: float = 0.0,
) -> Decomposed:
    """Codes and a low-rank remainder whose sum approximates ``weight``.

    Args:
        weight: (out, in).
        quantize: Returns the codes of a matrix of this shape.
        rank: R, at most the shorter side.
        iterations: Maximum number; the best is returned.
        weights: Weights of the errors; all equal if omitted.
        least_gain: Stop after an iteration that lowers the error by less than this share; 0 to do all.
    """
    full = weight.detach().float()
    size = max(_norm(full, weights), 1e-38)
    to_quantize = full
    best: Decomposed | None = None
    for _ in range(iterations):
        quantized = quantize(to_quantize)
        lost = full - quantized.dequantize(torch.float32)
        left, right = low_rank(lost, rank, weights)
        product = left @ right
        error = _norm(lost.sub_(product), weights) / size

        gained_little = best is not None and error > best.error * (1 - least_gain)
        if best is None or error < best.error:
            best = Decomposed(quantized, left, right, error)
        if gained_little and least_gain > 0:
            break
        to_quantize = full - product
    assert best is not None
    return best


def _norm(matrix: Tensor, weights: Weights | None) -> float:
    weighted = matrix if weights is None else weights.apply(matrix)
    return float(weighted.norm())

"""A matrix as codes plus a low-rank remainder: ``W = Q + L R`` with ``Q`` quantised, in turns.

``Q`` quantises what ``L R`` leaves over, ``L R`` is the best approximation of what ``Q`` loses; their error is not sure
to fall from turn to turn, so the best turn is kept. Source: LoftQ, arXiv:2310.08659, algorithm 1; LQ-LoRA,
arXiv:2311.12023, algorithm 2 and section 3.3 (weights).
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
    """Norm of what is lost, weighted, relative to that of ``W``."""


def decompose(
    weight: Tensor,
    quantize: Callable[[Tensor], Quantized],
    rank: int,
    turns: int,
    *,
    weights: Weights | None = None,
    least_gain: float = 0.0,
) -> Decomposed:
    """Codes and a low-rank remainder that together come near ``weight``.

    Args:
        weight: (out, in).
        quantize: Gives the codes of a matrix of this shape.
        rank: R, at most the shorter side.
        turns: How many times at most; the best is returned.
        weights: Where errors matter more.
        least_gain: A turn that lowers the error by less than this share is the last.
    """
    full = weight.detach().float()
    size = _norm(full, weights)
    rest, best = full, None
    for _ in range(turns):
        quantized = quantize(rest)
        lost = full - quantized.dequantize(torch.float32)
        left, right = low_rank(lost, rank, weights)
        product = left @ right
        error = _norm(lost.sub_(product), weights) / max(size, 1e-38)
        last = best is not None and error > best.error * (1 - least_gain)
        if best is None or error < best.error:
            best = Decomposed(quantized, left, right, error)
        if last and least_gain:
            break
        rest = full - product
    assert best is not None
    return best


def _norm(matrix: Tensor, weights: Weights | None) -> float:
    return float((matrix if weights is None else weights.apply(matrix)).norm())

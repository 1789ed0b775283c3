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

from lit_lora.quantize import Quantized

__all__ = ["Decomposed", "Weights", "decompose", "low_rank"]

# Up to this side the eigenvectors of the Gram matrix are cheaper than passes over random vectors, and exact.
_EXACT = 1024
_OVERSAMPLING, _PASSES = 10, 8


@dataclass(frozen=True)
class Weights:
    """How much errors in each row and in each column of a matrix matter: an error at (i, j) counts rows_i * columns_j.

    Args:
        rows: (out,), positive.
        columns: (in,), positive.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of_squares(cls, rows: Tensor, columns: Tensor) -> Weights:
        """From the means of squared gradients over each row (out,) and over each column (in,)."""
        rows, columns = (mean.float().clamp(min=1e-4 * float(mean.max()) + 1e-38) for mean in (rows, columns))
        return cls(rows.sqrt(), (columns / rows.mean()).sqrt())

    def apply(self, matrix: Tensor) -> Tensor:
        """``matrix`` (out, in), weighted."""
        return self.rows[:, None] * matrix * self.columns


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


def low_rank(matrix: Tensor, rank: int, weights: Weights | None = None) -> tuple[Tensor, Tensor]:
    """The best approximation of ``rank`` to a float32 matrix, as factors (out, R) and (R, in) of equal size.

    With weights, the best one of the weighted matrix, with the weights divided out again: exact for weights of rows and
    of columns. The same on every call.
    """
    E = matrix if weights is None else weights.apply(matrix)
    if min(E.shape) > _EXACT and rank + _OVERSAMPLING < min(E.shape):
        with torch.random.fork_rng(devices=[E.device] if E.device.type == "cuda" else []):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(E, q=rank + _OVERSAMPLING, niter=_PASSES)
        root = S[:rank].sqrt()
        left, right = U[:, :rank] * root, (V[:, :rank] * root).T
    else:
        wide = E.shape[0] <= E.shape[1]
        gram = E @ E.T if wide else E.T @ E
        vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # of the largest singular values
        other = vectors.T @ E if wide else E @ vectors  # singular values times the other side's vectors
        root = other.norm(dim=1 if wide else 0).clamp(min=1e-30).sqrt()
        left, right = (vectors * root, other / root[:, None]) if wide else (other / root, (vectors * root).T)
    if weights is not None:
        left, right = left / weights.rows[:, None], right / weights.columns
    return left.contiguous(), right.contiguous()


def _norm(matrix: Tensor, weights: Weights | None) -> float:
    return float((matrix if weights is None else weights.apply(matrix)).norm())

"""The best low-rank approximation of a matrix, as factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Weights", "low_rank"]

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

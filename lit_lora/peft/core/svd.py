"""The best low-rank approximation of a matrix, as factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Weights", "low_rank"]

# Up to this side, the eigenvectors of the Gram matrix cost less than a randomized SVD, and are exact.
_EXACT = 1024

# Of the randomized SVD: vectors beyond the rank, and power iterations.
_OVERSAMPLING = 10
_PASSES = 8


@dataclass(frozen=True)
class Weights:
    """Weights of the errors in a matrix: an error at (i, j) is multiplied by rows_i * columns_j.

    Args:
        rows: (out,), positive.
        columns: (in,), positive.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def of_squares(cls, rows: Tensor, columns: Tensor) -> Weights:
        """From the mean squared gradients of each row (out,) and of each column (in,).

        The square of an error's weight is the rank-1 estimate ``rows_i * columns_j / mean`` of its squared gradient.
        """

        def bounded(means: Tensor) -> Tensor:
            # The factors are divided by the weights in the end, so none may be zero or nearly so.
            return means.float().clamp(min=1e-4 * float(means.max()) + 1e-38)

        rows = bounded(rows)
        columns = bounded(columns)
        return cls(rows.sqrt(), (columns / rows.mean()).sqrt())

    def apply(self, matrix: Tensor) -> Tensor:
        """``matrix`` (out, in), weighted."""
        return self.rows[:, None] * matrix * self.columns


def low_rank(matrix: Tensor, rank: int, weights: Weights | None = None) -> tuple[Tensor, Tensor]:
    """The best approximation of rank R to a float32 matrix, as factors (out, R) and (R, in) of equal norms.

    With weights, that of the weighted matrix, divided by the weights: the weighted error is then the smallest possible,
    because each weight is a product of one for the row and one for the column. Deterministic.
    """
    E = matrix if weights is None else weights.apply(matrix)
    if min(E.shape) > _EXACT and rank + _OVERSAMPLING < min(E.shape):
        left, right = _randomized(E, rank)
    elif E.shape[0] <= E.shape[1]:
        left, right = _by_rows(E, rank)
    else:
        left, right = _by_columns(E, rank)
    if weights is not None:
        left = left / weights.rows[:, None]
        right = right / weights.columns
    return left.contiguous(), right.contiguous()


def _randomized(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors by a randomized SVD, whose random vectors are the same on each call and leave the RNG unchanged."""
    with torch.random.fork_rng(devices=[E.device] if E.device.type == "cuda" else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(E, q=rank + _OVERSAMPLING, niter=_PASSES)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, (V[:, :rank] * root).T


def _by_rows(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors from the left singular vectors U, the eigenvectors of ``E Eᵀ``; ``Uᵀ E`` is then ``S Vᵀ``."""
    U = _largest(E @ E.T, rank)
    SVt = U.T @ E
    root = SVt.norm(dim=1).clamp(min=1e-30).sqrt()
    return U * root, SVt / root[:, None]


def _by_columns(E: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Both factors from the right singular vectors V, the eigenvectors of ``Eᵀ E``; ``E V`` is then ``U S``."""
    V = _largest(E.T @ E, rank)
    US = E @ V
    root = US.norm(dim=0).clamp(min=1e-30).sqrt()
    return US / root, (V * root).T


def _largest(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, in columns, the largest first; ``eigh`` sorts them ascending."""
    eigenvectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return eigenvectors[:, -rank:].flip(1)

"""Initializations of LoRA from the weight itself, in the directions in which it is largest instead of at zero.

The initial factors are stored and their product is subtracted, ``y = W x + s (B A - B0 A0) x``. So nothing changes
until the first step, the base keeps its values bit for bit, and the adapter is a plain LoRA of twice the rank for the
original base, ``[B, -B0] [A; A0]``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["WeightInit", "start_factors"]

WeightInit = Literal["pissa", "olora"]


@torch.no_grad()
def start_factors(init: WeightInit, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The initial ``A`` (R, in) and ``B`` (out, R), float32.

    Args:
        init: ``pissa``: the largest singular values, so that ``s B A`` is the rank-R matrix nearest to ``W`` (Meng et
            al. 2024, "PiSSA", equations 2 and 3). ``olora``: the first columns of Q and rows of R of ``W = Q R``
            (Büyükakyüz 2024, "OLoRA", algorithm 1).
        weight: (out, in).
        rank: R, at most the smaller side of the weight.
        scaling: ``s``.
    """
    weight = weight.detach()
    if init == "olora":
        Q, R = torch.linalg.qr(weight.float())
        return R[:rank].contiguous(), Q[:, :rank].contiguous()

    # An SVD of the weight, with out <= in, by the eigenvectors of its small Gram matrix: much faster. In float64, for
    # eigenvalues are squares of singular values, and small ones would be lost in float32.
    matrix = weight.double()
    is_tall = matrix.shape[0] > matrix.shape[1]
    if is_tall:
        matrix = matrix.T
    eigenvalues, eigenvectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending
    U = eigenvectors[:, -rank:].flip(1)  # (smaller side, R)
    S = eigenvalues[-rank:].flip(0).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    V = matrix.T @ U / S  # (larger side, R)

    left, right = (V, U) if is_tall else (U, V)
    size = (S / scaling).sqrt()  # each factor takes the root of what s B A must be: S
    A = size[:, None] * right.T
    B = left * size
    return A.float(), B.float()

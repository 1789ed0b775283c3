"""Starts of LoRA taken from the weight itself: the update begins where the weight is largest, not at zero.

The start factors are kept and their product is taken off again, ``y = W x + s (B A - B0 A0) x``, so nothing changes
until the first step, the base keeps its values bit for bit, and the adapter is a plain LoRA of twice the rank,
``[B, -B0] [A; A0]``, for the original base.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["WeightInit", "start_factors"]

WeightInit = Literal["pissa", "olora"]


@torch.no_grad()
def start_factors(init: WeightInit, weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Where ``A`` (R, in) and ``B`` (out, R) start, float32.

    Args:
        init: ``pissa``: the largest singular values, so that ``s B A`` is the nearest matrix of the rank to ``W`` (Meng
            et al. 2024, "PiSSA", equations 2 and 3). ``olora``: the first columns of Q and rows of R of ``W = Q R``
            (Büyükakyüz 2024, "OLoRA", algorithm 1).
        weight: (out, in).
        rank: R, at most the smaller side of the weight.
        scaling: ``s``.
    """
    weight = weight.detach()
    if init == "olora":
        Q, R = torch.linalg.qr(weight.float())
        return R[:rank].contiguous(), Q[:, :rank].contiguous()
    wide = weight.double()
    tall = wide.shape[0] > wide.shape[1]
    short = wide.T if tall else wide  # its Gram matrix is the small one
    values, vectors = torch.linalg.eigh(short @ short.T)
    U = vectors[:, -rank:].flip(1)  # (small side, R)
    roots = values[-rank:].flip(0).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    V = short.T @ U / roots  # (large side, R)
    left, right = (V, U) if tall else (U, V)
    size = (roots / scaling).sqrt()
    return (size[:, None] * right.T).float(), (left * size).float()

"""Sums of matrix products, ``start + a1 @ b1 + a2 @ b2 + …``: linear layers and their low-rank updates.

On CPUs that multiply bfloat16 without a matrix unit a kernel adds all terms in float32 and rounds once; elsewhere each
term is added by a product of PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_lora import kernels

__all__ = ["sum_of_products"]


def sum_of_products(
    *terms: tuple[Tensor, Tensor], start: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``start + a @ b + …`` over the terms.

    Put small terms first: where terms are added one by one, each sum is rounded, and a base output that is rounded
    before a small update is added to it loses half of the updates of the first steps.

    Args:
        terms: Pairs of ``a`` (T, K) and ``b`` (K, N), K their own. Floating point, of one dtype.
        start: (T, N) or (N,), of the same dtype. One of shape (T, N) may be used up.
        dtype: Of the result; that of the terms by default.

    Returns:
        (T, N).
    """
    if start is not None and start.dim() == 2 and not start.is_contiguous():
        start = start.contiguous()
    if _kernel_takes(terms, start):
        return _by_kernel(terms, start, dtype)
    (a, b), *rest = terms
    if dtype == torch.float32 and not rest and start is None and a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    if start is None:
        total = a @ b
    elif start.dim() == 1:
        total = (a @ b).add_(start)
    else:
        total = _accumulate(start, a, b)
    for a, b in rest:
        _accumulate(total, a, b)
    return total if dtype is None else total.to(dtype)


def _kernel_takes(terms: tuple[tuple[Tensor, Tensor], ...], start: Tensor | None) -> bool:
    if terms[0][0].is_cuda:
        return False
    tensors = [tensor for term in terms for tensor in term]
    if not kernels.usable(*tensors, *([] if start is None else [start]), kernel="sum_of_products", gaps=True):
        return False
    return all(
        a.shape[1] % 2 == a.stride(0) % 2 == 0 and a.stride(1) == 1 and 1 in b.stride() and max(b.stride()) % 2 == 0
        for a, b in terms
    )


def _by_kernel(terms: tuple[tuple[Tensor, Tensor], ...], start: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    (rows, columns), numbers = (terms[0][0].shape[0], terms[0][1].shape[1]), list[Tensor | int]()
    for a, b in terms:
        transposed = b.stride(1) != 1
        numbers += [a, a.stride(0), b, b.stride(0 if not transposed else 1), a.shape[1], int(transposed)]
    out = terms[0][0].new_empty(rows, columns, dtype=dtype)
    step = 0 if start is None or start.dim() == 1 else columns
    wide = int(out.dtype == torch.float32)
    kernels.call("sum_of_products", numbers, len(terms), start, step, out, rows, columns, wide)
    return out


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``total += left @ right``, in place.

    oneDNN gives a bfloat16 product of 513 to 1,400 rows and few columns to one of two threads (1.1 instead of 1.7 to
    2.3 TFLOP/s), so that one goes in parts of at most 512 rows: 8 % of a step of 860 tokens.
    """
    rows, columns = total.shape
    if total.device.type != "cpu" or not 512 < rows < 1408 or columns >= 1024:
        return total.addmm_(left, right)
    size = -(-rows // -(-rows // 512))
    for part, part_left in zip(torch.split(total, size), torch.split(left, size), strict=True):
        part.addmm_(part_left, right)
    return total

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
        start: (T, N) or (N,), of the same dtype. One of shape (T, N) may be overwritten.
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
        return torch.mm(a, b, out_dtype=dtype)  # adds in float32 and, unlike `(a @ b).float()`, never rounds

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
    if start is not None:
        tensors.append(start)
    if not kernels.usable(*tensors, kernel="sum_of_products", gaps=True):
        return False
    return all(_fits(a, b) for a, b in terms)


def _fits(a: Tensor, b: Tensor) -> bool:
    """Whether the strides of a term are those that the kernel reads.

    It takes bfloat16 in pairs, as its instruction does, so inner size and steps between rows are even. ``b`` may be
    transposed, as the weight of a linear layer is.
    """
    row_major = a.stride(1) == 1 and a.stride(0) % 2 == 0
    either_way = 1 in b.stride() and max(b.stride()) % 2 == 0
    return a.shape[1] % 2 == 0 and row_major and either_way


def _by_kernel(terms: tuple[tuple[Tensor, Tensor], ...], start: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    rows, columns = terms[0][0].shape[0], terms[0][1].shape[1]

    # The kernel reads six numbers per term: both addresses, the step of each, the inner size, whether b is transposed.
    packed_terms: list[Tensor | int] = []
    for a, b in terms:
        transposed = b.stride(1) != 1
        b_step = b.stride(1) if transposed else b.stride(0)
        packed_terms += [a, a.stride(0), b, b_step, a.shape[1], int(transposed)]

    out = terms[0][0].new_empty(rows, columns, dtype=dtype)
    start_step = 0 if start is None or start.dim() == 1 else columns  # with step 0 every row starts from the same bias
    wide = int(out.dtype == torch.float32)
    kernels.call("sum_of_products", packed_terms, len(terms), start, start_step, out, rows, columns, wide)
    return out


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``total += left @ right``, in place.

    oneDNN computes a bfloat16 product of 513 to 1,400 rows and few columns in one of two threads (1.1 instead of 1.7 to
    2.3 TFLOP/s), so such a product is cut into parts of at most 512 rows: 8 % of a step of 860 tokens.
    """
    rows, columns = total.shape
    if total.device.type != "cpu" or not 512 < rows < 1408 or columns >= 1024:
        return total.addmm_(left, right)

    parts = -(-rows // 512)
    size = -(-rows // parts)
    for part, part_left in zip(torch.split(total, size), torch.split(left, size), strict=True):
        part.addmm_(part_left, right)
    return total

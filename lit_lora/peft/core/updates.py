"""The change that finetuning makes to one tensor of the base model, independent of any module: its merge rule.

An update returns the merged rows of its tensor a few at a time, in float32, so merging needs memory for a few rows
only. Merging, task switching and adapter files all exchange a dictionary of base tensor names to updates.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["LowRank", "Magnitude", "Replace", "Rows", "Scaled", "Update", "Updates"]


@dataclass(frozen=True)
class LowRank:
    """``W + scaling * left @ right``; several such terms, concatenated along the rank, are one.

    A stack of matrices, such as the weights of experts, has a product for each matrix.

    Args:
        left: (rows, R), or (E, rows, R) for a stack.
        right: (R, columns), or (E, R, columns).
        scaling: Factor of the product.
    """

    left: Tensor
    right: Tensor
    scaling: float

    def rows(self, base: int) -> int:
        """Number of rows of the result, given that of the base tensor."""
        return base

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows, or matrices, ``start`` to ``stop`` of the updated ``weight``, in its shape and float32."""
        rows = weight[start:stop].float()
        return self.product(start, stop).view_as(rows).add_(rows)  # a convolution's rows have more dimensions

    def product(self, start: int, stop: int) -> Tensor:
        """Rows, or matrices, ``start`` to ``stop`` of the change, float32."""
        right = self.right if self.right.dim() == 2 else self.right[start:stop]
        return (self.left[start:stop].float() @ right.float()).mul_(self.scaling)

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change, without computing the whole matrix."""
        # ||L R||² = tr(Rᵀ Lᵀ L R) = sum of (Lᵀ L) * (R Rᵀ): two Gram matrices of R x R. In float64, because the terms
        # cancel; rounding can still leave a sum near zero below it.
        left, right = self.left.double(), self.right.double()
        square = ((left.mT @ left) * (right @ right.mT)).sum()
        return abs(self.scaling) * float(square.clamp(min=0).sqrt())

    def negative(self) -> LowRank:
        """The update that reverses this one."""
        return replace(self, scaling=-self.scaling)

    def plus(self, other: LowRank) -> LowRank:
        """The sum of both updates: their factors concatenated along the rank."""
        # One update has one factor, so each one's own moves into its left matrix.
        left = torch.cat([self.left.float() * self.scaling, other.left.float() * other.scaling], dim=-1)
        right = torch.cat([self.right.float(), other.right.float()], dim=-2)
        return LowRank(left, right, scaling=1.0)


@dataclass(frozen=True)
class Replace:
    """New values for the whole tensor: of a module trained in full, or a bias.

    Args:
        tensor: The new values; an embedding may have more rows than the base.
    """

    tensor: Tensor

    def rows(self, base: int) -> int:
        """Number of rows of the result, given that of the base tensor."""
        return self.tensor.shape[0]

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the new tensor, float32."""
        return self.tensor[start:stop].float()

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change; rows beyond the base count in full."""
        base_rows = weight.shape[0]
        change = self.tensor[:base_rows].float() - weight.float().to(self.tensor.device)
        added = self.tensor[base_rows:].float()
        return float(torch.hypot(change.norm(), added.norm()))


@dataclass(frozen=True)
class Rows:
    """New values for single rows of an embedding or head, those of trained tokens; other rows stay bit for bit.

    Args:
        ids: Token ids, ascending; new ones follow the base's rows without a gap.
        values: (n, D), one row per id.
    """

    ids: tuple[int, ...]
    values: Tensor

    def rows(self, base: int) -> int:
        """Number of rows of the result, given that of the base tensor: never fewer."""
        return max(base, self.ids[-1] + 1)

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` with the trained ones in place, (stop - start, D) float32."""
        out = torch.zeros(stop - start, *weight.shape[1:])
        base_rows = weight[start : min(stop, weight.shape[0])]
        out[: base_rows.shape[0]] = base_rows.float()
        first, last = bisect_left(self.ids, start), bisect_left(self.ids, stop)
        out[[token - start for token in self.ids[first:last]]] = self.values[first:last].float().cpu()
        return out

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change; rows beyond the base count in full."""
        in_base = bisect_left(self.ids, weight.shape[0])
        before = weight[list(self.ids[:in_base])].float().to(self.values.device)
        change = self.values[:in_base].float() - before
        added = self.values[in_base:].float()
        return float(torch.hypot(change.norm(), added.norm()))


@dataclass(frozen=True)
class Magnitude:
    """The rows of ``W + scaling * left @ right``, rescaled to given lengths.

    Args:
        low: The low-rank update.
        lengths: (rows,).
    """

    low: LowRank
    lengths: Tensor

    def rows(self, base: int) -> int:
        """Number of rows of the result, given that of the base tensor."""
        return base

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the updated ``weight``, (stop - start, columns) float32."""
        rows = self.low.apply(weight, start, stop)
        factors = self.lengths[start:stop].float() / rows.norm(dim=1)
        return rows.mul_(factors[:, None])

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change."""
        return _change(self, weight.to(self.lengths.device))


@dataclass(frozen=True)
class Scaled:
    """``W * (1 + factor) + offset``, elementwise; without one of them, it counts as zero.

    Args:
        factor: Its product is (rows, columns), or (rows, 1) for a vector ``W``.
        offset: A product of the same shape.
    """

    factor: LowRank | None = None
    offset: LowRank | None = None

    def rows(self, base: int) -> int:
        """Number of rows of the result, given that of the base tensor."""
        return base

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the updated ``weight``, in its shape and float32."""
        rows = weight[start:stop].float()
        result = rows.clone()
        if self.factor is not None:
            result += rows * self.factor.product(start, stop).view_as(rows)
        if self.offset is not None:
            result += self.offset.product(start, stop).view_as(rows)
        return result

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change."""
        return _change(self, weight)


def _change(update: Magnitude | Scaled, weight: Tensor, rows: int = 1024) -> float:
    """Frobenius norm of the change that ``update`` makes to ``weight``, computed on ``rows`` rows at a time."""
    norms = []
    for start in range(0, len(weight), rows):
        stop = start + rows
        change = update.apply(weight, start, stop) - weight[start:stop].float()
        norms.append(float(change.norm()))
    return math.hypot(*norms)


Update = LowRank | Replace | Rows | Magnitude | Scaled
Updates = Mapping[str, Update]

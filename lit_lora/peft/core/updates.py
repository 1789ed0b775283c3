"""What finetuning does to one tensor of the base model, apart from any module: the rule by which it merges.

An update gives the finished rows of its tensor, some at a time and in float32, so merging needs memory for some rows
only. Merging, task switching and adapter files all speak in a dictionary of base tensor names to updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["LowRank", "Magnitude", "Replace", "Rows", "Scaled", "Update", "Updates"]


@dataclass(frozen=True)
class LowRank:
    """``W + scaling * left @ right``, for any number of such terms laid side by side along the rank.

    Args:
        left: (rows, R).
        right: (R, columns).
        scaling: Factor of the product.
    """

    left: Tensor
    right: Tensor
    scaling: float

    def rows(self, base: int) -> int:
        """Rows of the result, of a base tensor with ``base`` rows."""
        return base

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the updated ``weight``, in its shape and float32."""
        rows = weight[start:stop].float()
        return self.product(start, stop).view_as(rows).add_(rows)

    def product(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the change, (stop - start, columns) float32."""
        return (self.left[start:stop].float() @ self.right.float()).mul_(self.scaling)

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change; costs R x R products and not a whole matrix."""
        left, right = self.left.double(), self.right.double()
        square = ((left.T @ left) * (right @ right.T)).sum()
        return abs(self.scaling) * float(square.clamp(min=0).sqrt())

    def negative(self) -> LowRank:
        """The update that takes this one back."""
        return replace(self, scaling=-self.scaling)

    def plus(self, other: LowRank) -> LowRank:
        """Both updates as one: their factors side by side along the rank."""
        left = torch.cat([self.left.float() * self.scaling, other.left.float() * other.scaling], dim=1)
        return LowRank(left, torch.cat([self.right.float(), other.right.float()]), 1.0)


@dataclass(frozen=True)
class Replace:
    """Another tensor in the place of the base one: a module trained as a whole, or a bias.

    Args:
        tensor: The new values; an embedding may have more rows than the base has.
    """

    tensor: Tensor

    def rows(self, base: int) -> int:
        """Rows of the result, of a base tensor with ``base`` rows."""
        return self.tensor.shape[0]

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the new tensor, float32."""
        return self.tensor[start:stop].float()

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change, rows beyond the base counted from zero."""
        known = weight.shape[0]
        change = self.tensor[:known].float() - weight.float().to(self.tensor.device)
        return float(torch.hypot(change.norm(), self.tensor[known:].float().norm()))


@dataclass(frozen=True)
class Rows:
    """New values for single rows of an embedding or head: trained tokens. Other rows stay bit for bit.

    Args:
        ids: Token ids, ascending; those beyond the base's rows follow it without a gap.
        values: (n, D), a row for each id.
    """

    ids: tuple[int, ...]
    values: Tensor

    def rows(self, base: int) -> int:
        """Rows of the result, of a base tensor with ``base`` rows: never fewer."""
        return max(base, self.ids[-1] + 1)

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` with the trained ones in place, (stop - start, D) float32."""
        out = torch.zeros(stop - start, *weight.shape[1:])
        known = weight[start : min(stop, weight.shape[0])]
        out[: known.shape[0]] = known.float()
        slots = [slot for slot, token in enumerate(self.ids) if start <= token < stop]
        out[[self.ids[slot] - start for slot in slots]] = self.values[slots].float().cpu()
        return out

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change, rows beyond the base counted from zero."""
        old = [slot for slot, token in enumerate(self.ids) if token < weight.shape[0]]
        new = [slot for slot, token in enumerate(self.ids) if token >= weight.shape[0]]
        before = weight[[self.ids[slot] for slot in old]].float().to(self.values.device)
        change = self.values[old].float() - before
        return float(torch.hypot(change.norm(), self.values[new].float().norm()))


@dataclass(frozen=True)
class Magnitude:
    """The rows of ``W + scaling * left @ right`` at lengths of their own.

    Args:
        low: The low-rank update.
        lengths: (rows,).
    """

    low: LowRank
    lengths: Tensor

    def rows(self, base: int) -> int:
        """Rows of the result, of a base tensor with ``base`` rows."""
        return base

    def apply(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the updated ``weight``, (stop - start, columns) float32."""
        rows = self.low.apply(weight, start, stop)
        return rows.mul_((self.lengths[start:stop].float() / rows.norm(dim=1))[:, None])

    def norm(self, weight: Tensor) -> float:
        """Frobenius norm of the change."""
        return _change(self, weight.to(self.lengths.device))


@dataclass(frozen=True)
class Scaled:
    """``W * (1 + factor) + offset``, elementwise; each may be missing.

    Args:
        factor: Whose product is (rows, columns), or (rows, 1) for a vector ``W``.
        offset: Of the same shape.
    """

    factor: LowRank | None = None
    offset: LowRank | None = None

    def rows(self, base: int) -> int:
        """Rows of the result, of a base tensor with ``base`` rows."""
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
    """Frobenius norm of what ``update`` does to ``weight``, some rows at a time."""
    starts = range(0, len(weight), rows)
    parts = [update.apply(weight, start, start + rows) - weight[start : start + rows].float() for start in starts]
    return math.hypot(*(float(part.norm()) for part in parts))


Update = LowRank | Replace | Rows | Magnitude | Scaled
Updates = Mapping[str, Update]

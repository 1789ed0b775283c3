"""What finetuning does to one tensor of the base model, apart from any module: the rule by which it merges.

An update gives the finished rows of its tensor, some at a time and in float32, so merging needs memory for some rows
only. Merging, task switching and adapter files all speak in a dictionary of base tensor names to updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["LowRank", "Replace", "Rows", "Update", "Updates"]


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
        """Rows ``start`` to ``stop`` of the updated ``weight``, (stop - start, columns) float32."""
        product = self.left[start:stop].float() @ self.right.float()
        return product.mul_(self.scaling).add_(weight[start:stop].float())

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


Update = LowRank | Replace | Rows
Updates = Mapping[str, Update]

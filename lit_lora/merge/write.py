"""Tensors merged some rows at a time: in float32, rounded once, and measured on the way.

Memory: the rounded tensor and a few megabytes of rows; base and adapter are mapped from their files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_lora.errors import NumericalError
from lit_lora.merge.plan import MergePlan
from lit_lora.peft.core.updates import LowRank, Update
from lit_lora.quantize import Groups, Quantized, quantize

__all__ = ["TensorProof", "Totals", "measure", "merged_tensors", "totals"]

_CHUNK_VALUES = 1 << 22


@dataclass
class TensorProof:
    """How much of one tensor's update is in the stored tensor."""

    name: str
    """The tensor."""
    dtype: torch.dtype
    """Dtype in which it is stored."""
    values: int = 0
    """Values that the update changes."""
    changed: int = 0
    """Those whose stored value differs from the base's; the rest lost their update to rounding."""
    update_square: float = 0.0
    """Squared norm of the exact update."""
    error_square: float = 0.0
    """Squared norm of stored minus exact."""

    @property
    def relative_error(self) -> float:
        """Norm of the rounding error relative to the norm of the update."""
        return math.sqrt(self.error_square / self.update_square) if self.update_square else 0.0

    @property
    def kept(self) -> float:
        """Share of the values to change that did change."""
        return self.changed / self.values if self.values else 1.0


@dataclass(frozen=True)
class Totals:
    """The same over all tensors."""

    relative_error: float
    """Norm of all rounding errors relative to the norm of the whole update."""
    kept: float
    """Share of the values to change that did change."""


def totals(proofs: list[TensorProof]) -> Totals:
    """Sum up the tensors' proofs."""
    total = TensorProof("all", torch.float32)
    for proof in proofs:
        total.values += proof.values
        total.changed += proof.changed
        total.update_square += proof.update_square
        total.error_square += proof.error_square
    return Totals(total.relative_error, total.kept)


def merged_tensors(plan: MergePlan) -> Iterator[tuple[str, Tensor | Quantized, TensorProof | None]]:
    """Every tensor of the result with its proof, which is ``None`` for a tensor without an update.

    Raises:
        NumericalError: A value overflows the dtype.
    """
    for name in plan.names:
        if plan.packs(name):
            packed, proof = _packed(plan, name)
            yield name, packed, proof
            continue

        weight = plan.base[name]
        dtype = plan.target(name)
        update = plan.updates.get(name)
        if update is None:
            tensor = weight.to(dtype)
            proof = None
        else:
            proof = TensorProof(name, dtype)
            tensor = torch.empty(plan.rows(name), *weight.shape[1:], dtype=dtype)
            for start, stop, exact in _exact_rows(weight, update, len(tensor)):
                tensor[start:stop] = _measured(proof, weight, start, stop, exact)
        if dtype == torch.float16 and weight.dtype != dtype and torch.isinf(tensor).any():
            raise NumericalError(f"{name}: values beyond the range of float16", hint="use --dtype bf16 or fp32")
        yield name, tensor, proof


def _packed(plan: MergePlan, name: str) -> tuple[Quantized, TensorProof | None]:
    """A quantized tensor with its update merged in as well as codes allow, and the proof of it."""
    update = plan.updates.get(name)
    if update is None or plan.quantize is None:
        return plan.base.packed(name), None
    codes = plan.base.packed(name)
    weight = plan.base[name].float()
    exact = torch.cat([rows for _, _, rows in _exact_rows(weight, update, plan.rows(name))])
    packed = _shifted(codes, update) or quantize(exact, codes.config, name=name)
    stored = packed.dequantize(torch.float32)

    proof = TensorProof(name, torch.float32)
    to_change = exact != weight
    proof.values = int(to_change.sum())
    # A new scale changes every value of a block, so here a value counts as changed if it came nearer to its target.
    proof.changed = int((to_change & ((stored - exact).abs() < (weight - exact).abs())).sum())
    proof.error_square = float((stored - exact).square().sum(dtype=torch.float64))
    proof.update_square = float((exact - weight).square().sum(dtype=torch.float64))
    return packed, proof


def _shifted(packed: Quantized, update: Update) -> Quantized | None:
    """The same codes with the update in their zeros; ``None`` unless it is constant within each group."""
    if isinstance(packed, Groups) and isinstance(update, LowRank):
        return packed.plus(update.left * update.scaling, update.right)
    return None


def measure(plan: MergePlan, dtype: torch.dtype) -> Totals:
    """What merging into ``dtype`` would keep, without writing anything."""
    total = TensorProof("all", dtype)
    for name, update in plan.updates.items():
        weight = plan.base[name]
        for start, stop, exact in _exact_rows(weight, update, plan.rows(name)):
            _measured(total, weight, start, stop, exact)
    return Totals(total.relative_error, total.kept)


def _exact_rows(weight: Tensor, update: Update, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """Updated rows in float32, a chunk at a time, each with its first row and the one after its last."""
    step = max(1, _CHUNK_VALUES // max(1, weight[:1].numel()))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield start, stop, update.apply(weight, start, stop)


def _measured(proof: TensorProof, weight: Tensor, start: int, stop: int, exact: Tensor) -> Tensor:
    """The exact rows rounded as they are stored; ``proof`` is updated in place."""
    stored = exact.to(proof.dtype)
    old = torch.zeros_like(exact)  # rows that the update adds count as zeros before
    base_rows = weight[start:stop]
    old[: len(base_rows)] = base_rows
    to_change = exact != old
    proof.values += int(to_change.sum())
    proof.changed += int((to_change & (stored != old.to(proof.dtype))).sum())
    proof.error_square += float((stored.float() - exact).square_().sum(dtype=torch.float64))
    proof.update_square += float((exact - old).square_().sum(dtype=torch.float64))
    return stored

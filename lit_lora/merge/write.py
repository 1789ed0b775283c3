"""Tensors merged some rows at a time: in float32, rounded once, and measured while they pass.

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
    """As it is stored."""
    values: int = 0
    """Values that the update changes."""
    changed: int = 0
    """Those that are stored as something else than the base's value: the rest lost their update."""
    update_square: float = 0.0
    """Squared norm of the exact update."""
    error_square: float = 0.0
    """Squared norm of stored minus exact."""

    @property
    def relative_error(self) -> float:
        """Norm of what rounding did to the update, relative to the update."""
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
    whole = TensorProof("all", torch.float32)
    for proof in proofs:
        whole.values += proof.values
        whole.changed += proof.changed
        whole.update_square += proof.update_square
        whole.error_square += proof.error_square
    return Totals(whole.relative_error, whole.kept)


def merged_tensors(plan: MergePlan) -> Iterator[tuple[str, Tensor | Quantized, TensorProof | None]]:
    """Every tensor of the result with its proof; ``None`` for a tensor without an update.

    Raises:
        NumericalError: A value overflows the dtype.
    """
    for name in plan.names:
        if plan.packs(name):
            yield (name, *_packed(plan, name))
            continue
        weight, dtype = plan.base[name], plan.target(name)
        update = plan.updates.get(name)
        if update is None:
            tensor, proof = weight.to(dtype), None
        else:
            proof = TensorProof(name, dtype)
            tensor = torch.empty(plan.rows(name), *weight.shape[1:], dtype=dtype)
            for start, stop, exact in _exact_rows(weight, update, len(tensor)):
                tensor[start:stop] = _measured(proof, weight, start, stop, exact)
        if dtype == torch.float16 and weight.dtype != dtype and torch.isinf(tensor).any():
            raise NumericalError(f"{name}: values beyond {dtype}'s range", hint="choose bf16 or fp32")
        yield name, tensor, proof


def _packed(plan: MergePlan, name: str) -> tuple[Quantized, TensorProof | None]:
    """A tensor quantised again with its update in it, as far as the codes can say it."""
    update = plan.updates.get(name)
    if update is None or plan.quantize is None:
        return plan.base.packed(name), None
    weight, proof = plan.base[name].float(), TensorProof(name, torch.float32)
    exact = torch.cat([rows for _, _, rows in _exact_rows(weight, update, plan.rows(name))])
    codes = plan.base.packed(name)
    packed = _shifted(codes, update) or quantize(exact, codes.config, name=name)
    stored = packed.dequantize(torch.float32)
    wanted = exact != weight
    proof.values = int(wanted.sum())
    # Another scale changes every value of a block: kept is what came nearer to where it should be.
    proof.changed = int((wanted & ((stored - exact).abs() < (weight - exact).abs())).sum())
    proof.error_square = float((stored - exact).square().sum(dtype=torch.float64))
    proof.update_square = float((exact - weight).square().sum(dtype=torch.float64))
    return packed, proof


def _shifted(packed: Quantized, update: Update) -> Quantized | None:
    """Codes with the update in their zeros, where it is constant within each group."""
    if isinstance(packed, Groups) and isinstance(update, LowRank):
        return packed.plus(update.left * update.scaling, update.right)
    return None


def measure(plan: MergePlan, dtype: torch.dtype) -> Totals:
    """What merging into ``dtype`` would keep, without writing anything."""
    whole = TensorProof("all", dtype)
    for name, update in plan.updates.items():
        weight = plan.base[name]
        for start, stop, exact in _exact_rows(weight, update, plan.rows(name)):
            _measured(whole, weight, start, stop, exact)
    return Totals(whole.relative_error, whole.kept)


def _exact_rows(weight: Tensor, update: Update, rows: int) -> Iterator[tuple[int, int, Tensor]]:
    """Updated rows in float32, a chunk at a time."""
    step = max(1, _CHUNK_VALUES // max(1, weight[:1].numel()))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield start, stop, update.apply(weight, start, stop)


def _measured(proof: TensorProof, weight: Tensor, start: int, stop: int, exact: Tensor) -> Tensor:
    """The rows as they are stored; ``proof`` is added to."""
    stored = exact.to(proof.dtype)
    old = torch.zeros_like(exact)
    known = weight[start:stop]
    old[: len(known)] = known
    wanted = exact != old
    proof.values += int(wanted.sum())
    proof.changed += int((wanted & (stored != old.to(proof.dtype))).sum())
    proof.error_square += float((stored.float() - exact).square_().sum(dtype=torch.float64))
    proof.update_square += float((exact - old).square_().sum(dtype=torch.float64))
    return stored

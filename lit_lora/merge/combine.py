"""Several LoRA adapters as one: a weighted sum of what they do. A negative weight takes a task away.

``sum_i w_i s_i B_i A_i`` is itself low-rank: with the factors side by side it is exact, ``B = [w_1 s_1 B_1, ...]`` and
``A = [A_1; ...]``. Source: Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 2, the sum; Hu et al.
2021, "LoRA", section 4, the form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_lora.checkpoint.load import empty_model, load_model
from lit_lora.errors import InputError, UsageError
from lit_lora.open.folders import find_adapter, find_base
from lit_lora.peft import base_tensors, freeze, save_adapter
from lit_lora.peft.core.added import AddedMethod
from lit_lora.peft.core.modules import model_updates
from lit_lora.peft.core.updates import LowRank
from lit_lora.peft.files.adapter import Adapter, read_adapter
from lit_lora.peft.files.load import check_base
from lit_lora.peft.lora.file import LoRAFile

__all__ = ["Combined", "How", "combine"]

How = Literal["concatenate", "linear", "svd"]


@dataclass(frozen=True)
class Combined:
    """What a combination came to."""

    out: Path
    base: Path
    modules: int
    ranks: tuple[int, int]
    """The smallest and the largest."""
    lost: float
    """Norm of what the result lacks of the exact sum, relative to the sum's."""


def combine(
    sources: Sequence[Path],
    weights: Sequence[float],
    out: Path,
    *,
    how: How = "concatenate",
    rank: int | None = None,
    base: Path | None = None,
) -> Combined:
    """Write the weighted sum of LoRA adapters as one adapter, in PEFT's format.

    Args:
        sources: Run folders or adapter folders.
        weights: A factor for each.
        out: The folder to write.
        how: ``concatenate``: the exact sum, of the ranks' sum. ``svd``: the nearest of ``rank`` to it. ``linear``: the
            factors themselves are summed, which keeps the rank and adds cross terms; PEFT's ``linear``.
        rank: Of ``svd``.
        base: Their base model, where it is not the one that the first names.

    Raises:
        InputError: An adapter is broken, of another base, or not low-rank.
        UsageError: Weights or rank do not fit, or the ranks differ where they must not.
        DiskError: ``out`` cannot be written.
    """
    if len(weights) != len(sources) or not all(map(math.isfinite, weights)):
        raise UsageError(f"expected a weight for each of the {len(sources)} adapters, got {list(weights)}")
    if (how == "svd") != (rank is not None):
        raise UsageError("a rank goes with svd, and svd needs one")
    adapters = [read_adapter(find_adapter(source)) for source in sources]
    folder = base or find_base(Path(sources[0]), hint="give it with --base FOLDER")
    for adapter in adapters:
        if isinstance(adapter.config, AddedMethod):
            raise InputError(
                f"{adapter.folder}: {adapter.config.about} computes beside the base's weights, it has no update to sum"
            )
    if any(adapter.quantize != adapters[0].quantize for adapter in adapters):
        raise InputError("the adapters were trained over bases that are held differently, such as in 4 and in 16 bits")
    model = load_model(folder, quantize=adapters[0].quantize)
    parts: dict[str, list[tuple[float, LowRank]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        updates = check_base(adapter, base_tensors(model), empty_model(model.config))
        for name, update in updates.items():
            parts.setdefault(name, []).append((weight, _low_rank(adapter, name, update)))
    exact = {name: _concatenated(terms) for name, terms in parts.items()}
    if how == "concatenate":
        combined = exact
    elif how == "linear":
        combined = {name: _linear(name, terms) for name, terms in parts.items()}
    else:
        combined = {name: _nearest(update, rank or 1) for name, update in exact.items()}
    ranks = {name.removesuffix(".weight"): update.right.shape[0] for name, update in combined.items()}
    least, most = min(ranks.values()), max(ranks.values())
    settings = LoRAFile(  # alpha is the rank: the factors have all of the scaling
        rank=most, alpha=most, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=ranks
    )
    freeze(model)
    settings.apply(model)
    for name, update in model_updates(model).items():
        assert isinstance(update, LowRank)
        update.left.copy_(combined[name].left)  # views of the adapter's parameters
        update.right.copy_(combined[name].right)
    data = ", ".join(f"{weight:g} x {adapter.folder}" for weight, adapter in zip(weights, adapters, strict=True))
    save_adapter(model, settings, out, base=folder, data=f"{how} of {data}")
    return Combined(Path(out), folder, len(combined), (least, most), _lost(exact, combined))


def _low_rank(adapter: Adapter, name: str, update: object) -> LowRank:
    """An update that can be summed.

    Raises:
        InputError: It is of another kind.
    """
    if not isinstance(update, LowRank):
        raise InputError(
            f"{adapter.folder}: {name} is not a low-rank update, so it cannot be summed with others",
            hint="merge the adapters one after the other: lit-lora merge A --out M, then lit-lora merge B --base M",
        )
    return update


def _concatenated(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """The exact sum, of the sum of the ranks."""
    left = [weight * update.scaling * update.left.float() for weight, update in terms]
    return LowRank(torch.cat(left, dim=1), torch.cat([update.right.float() for _, update in terms]), 1.0)


def _linear(name: str, terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """Each factor summed, with the root of its weight and scaling; the sign goes to the right one.

    Raises:
        UsageError: The ranks differ.
    """
    ranks = {update.right.shape[0] for _, update in terms}
    if len(ranks) > 1:
        raise UsageError(f"linear: the adapters have ranks {sorted(ranks)} for {name}; concatenate takes any")
    roots = [math.sqrt(abs(weight * update.scaling)) for weight, update in terms]
    left = [root * update.left.float() for root, (_, update) in zip(roots, terms, strict=True)]
    right = [
        math.copysign(root, weight * update.scaling) * update.right.float()
        for root, (weight, update) in zip(roots, terms, strict=True)
    ]
    return LowRank(_sum(left), _sum(right), 1.0)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def _nearest(update: LowRank, rank: int) -> LowRank:
    """The nearest update of a rank, from the singular values of the product, which is never formed."""
    left, small_left = torch.linalg.qr(update.left.double())
    right, small_right = torch.linalg.qr(update.right.double().T)
    U, values, V = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    return LowRank((left @ U[:, :kept] * roots).float(), (roots[:, None] * (V[:kept] @ right.T)).float(), 1.0)


def _lost(exact: dict[str, LowRank], combined: dict[str, LowRank]) -> float:
    """Norm of the difference of all updates, relative to that of the exact ones."""
    nothing = torch.empty(0)
    whole = math.hypot(*(update.norm(nothing) for update in exact.values()))
    gap = math.hypot(*(exact[name].plus(combined[name].negative()).norm(nothing) for name in exact))
    return gap / whole if whole else 0.0

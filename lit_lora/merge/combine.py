"""Several LoRA adapters as one: the weighted sum of their updates. A negative weight takes a task away.

``sum_i w_i s_i B_i A_i`` is low-rank itself. With the factors side by side it is exact: ``B = [w_1 s_1 B_1, ...]`` and
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

from lit_lora.checkpoint.load import AnyModel, empty_model, load_model
from lit_lora.errors import InputError, UsageError
from lit_lora.open.folders import find_adapter, find_base
from lit_lora.peft import base_tensors, freeze, save_adapter
from lit_lora.peft.core.added import AddedMethod
from lit_lora.peft.core.modules import model_updates
from lit_lora.peft.core.updates import LowRank
from lit_lora.peft.files.adapter import Adapter, read_adapter
from lit_lora.peft.files.load import check_base
from lit_lora.peft.lora.file import LoRAFile
from lit_lora.peft.lora.parameters import adaptable_parameters

__all__ = ["Combined", "How", "combine"]

How = Literal["concatenate", "linear", "svd"]


@dataclass(frozen=True)
class Combined:
    """The result of a combination."""

    out: Path
    base: Path
    modules: int
    ranks: tuple[int, int]
    """The smallest and the largest rank."""
    lost: float
    """Norm of the difference from the exact sum, relative to the norm of the sum."""


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
        how: ``concatenate``: the exact sum, whose rank is the sum of the ranks. ``svd``: the matrix of ``rank`` nearest
            to it. ``linear``: the sum of the factors themselves, PEFT's ``linear``, which keeps the rank and adds cross
            terms.
        rank: Rank of the result, for ``svd`` only.
        base: Their base model, if it is not the one that the first adapter names.

    Raises:
        InputError: An adapter is broken, of another base, or not low-rank.
        UsageError: Weights or rank do not fit, or ``linear`` was asked for with different ranks.
        DiskError: ``out`` cannot be written.
    """
    if len(weights) != len(sources) or not all(map(math.isfinite, weights)):
        raise UsageError(f"expected one finite weight for each of the {len(sources)} adapters, got {list(weights)}")
    if how == "svd" and rank is None:
        raise UsageError("svd needs a rank")
    if how != "svd" and rank is not None:
        raise UsageError(f"rank {rank}: has no effect with {how}, only with svd")

    adapters = _read_adapters(sources)
    folder = base or find_base(Path(sources[0]), hint="give it with --base FOLDER")
    model = load_model(folder, quantize=adapters[0].quantize)
    terms = _terms(model, adapters, weights)
    exact = {name: _concatenated(of_tensor) for name, of_tensor in terms.items()}
    if how == "concatenate":
        combined = exact
    elif how == "linear":
        combined = {name: _linear(name, of_tensor) for name, of_tensor in terms.items()}
    else:
        combined = {name: _nearest(update, rank or 1) for name, update in exact.items()}

    parameters = [name for name in adaptable_parameters(model) if name in combined]
    modules = [name.removesuffix(".weight") for name in combined if name not in parameters]
    ranks = {
        name if name in parameters else name.removesuffix(".weight"): update.right.shape[-2]
        for name, update in combined.items()
    }
    smallest = min(ranks.values())
    largest = max(ranks.values())
    settings = LoRAFile(  # alpha is the rank: the factors have all of the scaling
        rank=largest,
        alpha=largest,
        target_modules=modules,
        target_parameters=parameters,
        rank_pattern=ranks,
        alpha_pattern=ranks,
    )

    freeze(model)
    settings.apply(model)
    for name, update in model_updates(model).items():
        assert isinstance(update, LowRank)
        update.left.copy_(combined[name].left)  # views of the adapter's parameters
        update.right.copy_(combined[name].right)
    data = ", ".join(f"{weight:g} x {adapter.folder}" for weight, adapter in zip(weights, adapters, strict=True))
    save_adapter(model, settings, out, base=folder, data=f"{how} of {data}")
    return Combined(Path(out), folder, len(combined), (smallest, largest), _lost(exact, combined))


def _read_adapters(sources: Sequence[Path]) -> list[Adapter]:
    """The adapters, all of them updates of weights, over bases in the same precision.

    Raises:
        InputError: They are not.
    """
    adapters = [read_adapter(find_adapter(source)) for source in sources]
    for adapter in adapters:
        if isinstance(adapter.config, AddedMethod):
            raise InputError(
                f"{adapter.folder}: {adapter.config.about} computes beside the base's weights, so it has no update to "
                "sum"
            )
    if any(adapter.quantize != adapters[0].quantize for adapter in adapters):
        raise InputError("the adapters were trained over differently quantized bases, such as 4 and 16 bits")
    return adapters


def _terms(
    model: AnyModel, adapters: Sequence[Adapter], weights: Sequence[float]
) -> dict[str, list[tuple[float, LowRank]]]:
    """The weight and the update of each adapter, by tensor.

    Raises:
        InputError: An adapter is of another base, or not low-rank.
    """
    terms: dict[str, list[tuple[float, LowRank]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        updates = check_base(adapter, base_tensors(model), empty_model(model.config))
        for name, update in updates.items():
            terms.setdefault(name, []).append((weight, _low_rank(adapter, name, update)))
    return terms


def _low_rank(adapter: Adapter, name: str, update: object) -> LowRank:
    """``update``, if it is one that can be summed.

    Raises:
        InputError: It is not low-rank.
    """
    if not isinstance(update, LowRank):
        raise InputError(
            f"{adapter.folder}: {name} is not a low-rank update, so it cannot be summed with others",
            hint="merge the adapters one after the other: lit-lora merge A --out M, then lit-lora merge B --base M",
        )
    return update


def _concatenated(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """The exact sum, whose rank is the sum of the ranks."""
    left = [weight * update.scaling * update.left.float() for weight, update in terms]
    right = [update.right.float() for _, update in terms]
    return LowRank(torch.cat(left, dim=-1), torch.cat(right, dim=-2), 1.0)


def _linear(name: str, terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """The factors summed, each times the root of weight and scaling; a negative sign goes to the right factor.

    Raises:
        UsageError: The ranks differ.
    """
    ranks = {update.right.shape[-2] for _, update in terms}
    if len(ranks) > 1:
        raise UsageError(f"linear: the adapters have ranks {sorted(ranks)} for {name}; concatenate takes any")
    left = []
    right = []
    for weight, update in terms:
        factor = weight * update.scaling
        root = math.sqrt(abs(factor))
        left.append(root * update.left.float())
        right.append(math.copysign(root, factor) * update.right.float())
    return LowRank(_sum(left), _sum(right), 1.0)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def _nearest(update: LowRank, rank: int) -> LowRank:
    """The nearest update of a rank, by the SVD of the product, without forming the product itself.

    With ``left = Q_1 R_1`` and ``right^T = Q_2 R_2`` the product is ``Q_1 (R_1 R_2^T) Q_2^T``, and the SVD of the small
    matrix in the middle gives that of the product.
    """
    left, small_left = torch.linalg.qr(update.left.double())
    right, small_right = torch.linalg.qr(update.right.double().mT)
    U, values, V = torch.linalg.svd(small_left @ small_right.mT, full_matrices=False)
    roots = values[..., :rank].sqrt()
    nearest_left = left @ U[..., :rank] * roots[..., None, :]
    nearest_right = roots[..., None] * (V[..., :rank, :] @ right.mT)
    return LowRank(nearest_left.float(), nearest_right.float(), 1.0)


def _lost(exact: dict[str, LowRank], combined: dict[str, LowRank]) -> float:
    """Norm of the difference over all tensors, relative to the norm of the exact updates."""
    no_weight = torch.empty(0)  # the norm of a low-rank update does not depend on the weight
    total = math.hypot(*(update.norm(no_weight) for update in exact.values()))
    differences = [exact[name].plus(combined[name].negative()) for name in exact]
    difference = math.hypot(*(update.norm(no_weight) for update in differences))
    return difference / total if total else 0.0

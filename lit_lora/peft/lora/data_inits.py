"""Starts of LoRA taken from the user's rows: what layers read (EVA), or how the loss falls (LoRA-GA).

Rows come as passes, which run one micro-batch through the model when asked, so nothing here knows of data or of a loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.core.passes import Pass, each_gradient
from lit_lora.peft.core.svd import low_rank
from lit_lora.quantize import QuantizedLinear

__all__ = ["Components", "gradient_factors", "principal_inputs", "share_ranks", "sum_gradients"]

_OVERSAMPLING, _PASSES = 8, 4


class Components:
    """The largest principal components of vectors that come in portions, without keeping them.

    Source: Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 2.2: the new portion is set
    below the components so far, weighted by their singular values, with a row for the shift of the mean.

    Args:
        count: How many are kept, k.
    """

    def __init__(self, count: int) -> None:
        self.count, self.seen = count, 0
        self._squares = 0.0
        self._mean = self._rows = torch.empty(0)

    @property
    def directions(self) -> Tensor:
        """(at most k, D) float32, orthonormal, the largest first."""
        return nn.functional.normalize(self._rows[: self.count], dim=1)

    @property
    def shares(self) -> list[float]:
        """Of all variance, what each explains."""
        squares = self._rows[: self.count].double().square().sum(1)
        return [float(square) / max(self._squares, 1e-30) for square in squares]

    def add(self, vectors: Tensor) -> None:
        """Take a portion in, (n, D)."""
        batch, n = vectors.float(), len(vectors)
        if n == 0:
            return
        mean = batch.mean(0)
        batch = batch - mean
        self._squares += float(batch.square().sum(dtype=torch.float64))
        if self.seen == 0:
            self._mean, rows = mean, batch
        else:
            shift = (self._mean - mean) * (self.seen * n / (self.seen + n)) ** 0.5
            self._squares += float(shift.square().sum(dtype=torch.float64))
            self._mean = (self._mean * self.seen + mean * n) / (self.seen + n)
            rows = torch.cat([self._rows, batch, shift[None]])
        self.seen += n
        sizes, directions = _largest(rows, self.count + _OVERSAMPLING)  # more than asked for: less is lost on the way
        real = sizes > 1e-6 * sizes[:1]  # n vectors span less than n directions beside their mean
        self._rows = sizes[real, None] * directions[real]


def _largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values (k,) of a float32 matrix (n, D), and their right vectors (k, D); always the same."""
    if min(rows.shape) <= 4 * count:
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
        return S[:count], Vh[:count]
    with torch.random.fork_rng(devices=[rows.device] if rows.device.type == "cuda" else []):
        torch.manual_seed(0)
        _, S, V = torch.svd_lowrank(rows, q=count, niter=_PASSES)
    return S[:count], V[:, :count].T


def principal_inputs(
    model: nn.Module, names: Iterable[str], count: int, passes: Iterable[Pass]
) -> dict[str, Components]:
    """The principal components of what each of some layers reads at learned positions.

    Layers that are called one after the other with the same tensor, such as q, k and v, share theirs.

    Args:
        model: In training mode or not; its parameters stay as they are.
        names: Of the layers.
        count: How many components.
        passes: The rows.
    """
    found: dict[str, Components] = {}
    target_positions = latest = torch.empty(0)
    latest_components = Components(count)

    def look(name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal latest, latest_components
        x: Tensor = arguments[0]
        if x is not latest:
            latest, latest_components = x, found.get(name) or Components(count)
            flat = x.detach().reshape(-1, x.shape[-1])
            latest_components.add(flat[: len(target_positions)][target_positions.to(x.device)])
        found[name] = latest_components

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in names]
    try:
        for one in passes:
            target_positions = one.target_positions
            with torch.no_grad():
                one.run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def share_ranks(ranks: Mapping[str, int], most: Mapping[str, int], found: Mapping[str, Components]) -> dict[str, int]:
    """As many ranks in all, given to the layers whose components explain the largest shares of their inputs' variance.

    Source: Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", section 3.2.

    Args:
        ranks: Of each layer, before.
        most: That a layer may get.
        found: The components of each.

    Returns:
        Rank by layer, 0 for some.

    Raises:
        UsageError: The rows gave too few components.
    """
    shares = [(share, name) for name in ranks for share in found[name].shares[: most[name]]]
    if len(shares) < sum(ranks.values()):
        seen = min(components.seen for components in found.values())
        raise UsageError(
            f"peft.init: eva has seen {seen} learned tokens, which span too few directions for rank "
            f"{max(ranks.values())}",
            hint="raise peft.init_rows, or give more rows",
        )
    chosen = sorted(shares, key=lambda item: -item[0])[: sum(ranks.values())]
    return {name: sum(name == other for _, other in chosen) for name in ranks}


def sum_gradients(model: nn.Module, names: Iterable[str], passes: Iterable[Pass]) -> dict[str, Tensor]:
    """The gradients of some layers' weights, summed over all passes, float32 on the CPU: as much as the weights are.

    Raises:
        UsageError: A layer is quantised, or has no gradient.
    """
    sums: dict[str, Tensor] = {}
    names = list(names)
    quantized = [name for name in names if isinstance(model.get_submodule(name), QuantizedLinear)]
    if quantized:
        raise UsageError(
            f"peft.init: lora-ga starts from gradients of the weights, but {quantized[0]} is quantised",
            hint="take recipe: lora, or another init",
        )

    def add(name: str, gradient: Tensor) -> None:
        sums[name] = sums[name].add_(gradient.cpu()) if name in sums else gradient.float().cpu()

    each_gradient(model, names, passes, add)
    for name in names:
        if name not in sums or not bool(sums[name].isfinite().all()) or not bool(sums[name].any()):
            raise UsageError(f"peft.init: lora-ga found no finite gradient of {name} on the rows it looked at")
    return sums


def gradient_factors(gradient: Tensor, rank: int, *, gamma: float = 16.0) -> tuple[Tensor, Tensor]:
    """Where ``A`` (R, in) and ``B`` (out, R) start, float32, so that their first step goes as full finetuning's would.

    ``A`` takes the first R right singular vectors of the gradient, ``B`` the left ones from R + 1 to 2 R, both times
    ``out^(1/4) / sqrt(gamma)``. Source: Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
    section 3 and algorithm 1.

    Args:
        gradient: (out, in) float32.
        rank: R, at most half of the shorter side.
        gamma: The larger, the smaller the start.
    """
    left, right = low_rank(gradient / gradient.abs().max(), 2 * rank)
    U, V = (nn.functional.normalize(factor, dim=dim) for factor, dim in ((left, 0), (right, 1)))
    size = gradient.shape[0] ** 0.25 / gamma**0.5
    return V[:rank] * size, U[:, rank:] * size

"""Initializations of LoRA from the user's rows: from the inputs of layers (EVA) or from gradients (LoRA-GA).

Rows come as passes, each of which runs one micro-batch through the model, so this file is independent of data and loop.
"""

from __future__ import annotations

from collections import Counter
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

# Of the randomized SVD: vectors beyond those asked for, and power iterations.
_OVERSAMPLING = 8
_PASSES = 4


class Components:
    """The largest principal components of vectors that come in batches, without storing the vectors.

    Source: Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 2.2: the new batch is stacked
    below the components so far, weighted by their singular values, with one more row for the shift of the mean.

    Args:
        count: Number of components, k.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self._squares = 0.0  # sum of squared distances from the mean
        self._mean = torch.empty(0)
        self._rows = torch.empty(0)  # (at most k + _OVERSAMPLING, D): directions times singular values

    @property
    def directions(self) -> Tensor:
        """(at most k, D) float32, orthonormal, the largest first."""
        return nn.functional.normalize(self._rows[: self.count], dim=1)

    @property
    def shares(self) -> list[float]:
        """The share of the total variance that each explains."""
        squares = self._rows[: self.count].double().square().sum(1)
        return [float(square) / max(self._squares, 1e-30) for square in squares]

    def add(self, vectors: Tensor) -> None:
        """Include a batch of vectors, (n, D), in the components, in place."""
        n = len(vectors)
        if n == 0:
            return

        batch = vectors.float()
        mean = batch.mean(0)
        rows = batch - mean
        self._squares += float(rows.square().sum(dtype=torch.float64))
        if self.seen == 0:
            self._mean = mean
        else:
            # The scatter about the common mean is that of both sets about their own means, plus this row's.
            shift = (self._mean - mean) * (self.seen * n / (self.seen + n)) ** 0.5
            self._squares += float(shift.square().sum(dtype=torch.float64))
            self._mean = (self._mean * self.seen + mean * n) / (self.seen + n)
            rows = torch.cat([self._rows, rows, shift[None]])
        self.seen += n

        # More components than asked for, so that less is lost between batches.
        sizes, directions = _largest(rows, self.count + _OVERSAMPLING)
        nonzero = sizes > 1e-6 * sizes[:1]  # n vectors less their mean span fewer than n directions
        self._rows = sizes[nonzero, None] * directions[nonzero]


def _largest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest singular values (k,) of a float32 matrix (n, D), and their right vectors (k, D); deterministic."""
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
    """The principal components of some layers' inputs at the positions before target tokens, by layer.

    Layers that are called one after another with the same tensor, such as q, k and v, share theirs.

    Args:
        model: In training mode or not; its parameters do not change.
        names: Names of the layers.
        count: Number of components.
        passes: The rows.
    """
    components: dict[str, Components] = {}
    target_positions = torch.empty(0)  # of the pass that is running
    latest_input = torch.empty(0)
    latest_components = Components(count)

    def add_input(name: str, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal latest_input, latest_components
        x: Tensor = arguments[0]
        if x is not latest_input:  # else the layer before this one has added it
            latest_input = x
            latest_components = components.get(name) or Components(count)
            without_padding = x.detach().reshape(-1, x.shape[-1])[: len(target_positions)]
            latest_components.add(without_padding[target_positions.to(x.device)])
        components[name] = latest_components

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(add_input, name)) for name in names]
    try:
        for each in passes:
            target_positions = each.target_positions
            with torch.no_grad():
                each.run()
    finally:
        for hook in hooks:
            hook.remove()
    return components


def share_ranks(
    ranks: Mapping[str, int], max_ranks: Mapping[str, int], components: Mapping[str, Components]
) -> dict[str, int]:
    """Redistribute ranks, keeping their sum, to the components that explain most of their layer's input variance.

    Source: Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation", section 3.2.

    Args:
        ranks: The rank of each layer before.
        max_ranks: The highest rank that each layer may get.
        components: The principal components of each layer's inputs.

    Returns:
        Rank by layer, 0 for some.

    Raises:
        UsageError: The rows gave too few components.
    """
    total = sum(ranks.values())
    candidates: list[tuple[float, str]] = []  # one per component: the share it explains, and its layer
    for name in ranks:
        shares = components[name].shares[: max_ranks[name]]
        candidates += [(share, name) for share in shares]
    if len(candidates) < total:
        seen = min(each.seen for each in components.values())
        raise UsageError(
            f"peft.init: eva has seen {seen} target tokens, which span too few directions for rank "
            f"{max(ranks.values())}",
            hint="raise peft.init_rows, or give more rows",
        )
    candidates.sort(key=lambda candidate: -candidate[0])  # stable: equal shares stay in the order of layers
    counts = Counter(name for _, name in candidates[:total])
    return {name: counts[name] for name in ranks}


def sum_gradients(model: nn.Module, names: Iterable[str], passes: Iterable[Pass]) -> dict[str, Tensor]:
    """The gradients of some layers' weights, summed over all passes, float32 on the CPU.

    They take as much memory there as these weights in float32.

    Raises:
        UsageError: A layer is quantized, or its gradient is zero or not finite.
    """
    sums: dict[str, Tensor] = {}
    names = list(names)
    quantized = [name for name in names if isinstance(model.get_submodule(name), QuantizedLinear)]
    if quantized:
        raise UsageError(
            f"peft.init: lora-ga starts from gradients of the weights, but {quantized[0]} is quantized",
            hint="use recipe: lora, or another init",
        )

    def add(name: str, gradient: Tensor) -> None:
        if name in sums:
            sums[name].add_(gradient.cpu())
        else:
            sums[name] = gradient.float().cpu()

    each_gradient(model, names, passes, add)
    for name in names:
        if name not in sums or not bool(sums[name].isfinite().all()) or not bool(sums[name].any()):
            raise UsageError(
                f"peft.init: on these rows, the gradient of {name} is zero or not finite: lora-ga needs one"
            )
    return sums


def gradient_factors(gradient: Tensor, rank: int, *, gamma: float = 16.0) -> tuple[Tensor, Tensor]:
    """The initial ``A`` (R, in) and ``B`` (out, R), float32, whose first step approximates that of full finetuning.

    ``A`` takes the first R right singular vectors of the gradient, ``B`` the left ones from R + 1 to 2 R, both times
    ``out^(1/4) / sqrt(gamma)``. Source: Wang et al. 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation",
    section 3 and algorithm 1.

    Args:
        gradient: (out, in) float32.
        rank: R, at most half of the shorter side.
        gamma: The larger, the smaller the initial values.
    """
    # Scaled first: squares of small gradients would underflow in float32, and the factors are normalized anyway.
    left, right = low_rank(gradient / gradient.abs().max(), 2 * rank)
    U = nn.functional.normalize(left, dim=0)  # (out, 2 R)
    V = nn.functional.normalize(right, dim=1)  # (2 R, in)
    size = gradient.shape[0] ** 0.25 / gamma**0.5
    return V[:rank] * size, U[:, rank:] * size

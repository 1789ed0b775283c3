"""Which of several quantisations each matrix gets, so that all of them fit into a budget and lose least.

A multiple-choice knapsack: combine matrix by matrix, keep only combinations that no other beats in size and in loss.
That is exact; beyond ``_MOST`` such combinations some, evenly over the sizes, stand for all, and the result is near the
best. Source: the integer program of LQ-LoRA, arXiv:2311.12023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["choose"]

_MOST = 4096


def choose(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice for each matrix with the least sum of losses, whose sizes add up to at most ``budget``.

    Args:
        losses: Of every choice, by matrix.
        sizes: Likewise.
        budget: At most this; at least the sum of the smallest sizes.
    """
    rest = [sum(min(row) for row in sizes[index + 1 :]) for index in range(len(sizes))]
    size, loss = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[torch.Tensor] = []
    for row_losses, row_sizes, still in zip(losses, sizes, rest, strict=True):
        all_sizes = (size[:, None] + torch.tensor(row_sizes, dtype=torch.int64)).flatten()
        all_losses = (loss[:, None] + torch.tensor(row_losses, dtype=torch.float64)).flatten()
        order = torch.argsort(all_losses, stable=True)
        order = order[torch.argsort(all_sizes[order], stable=True)]  # by size, then by loss
        order = order[all_sizes[order] + still <= budget]
        sorted_losses = all_losses[order]
        better = torch.ones(len(order), dtype=torch.bool)
        better[1:] = sorted_losses[1:] < torch.cummin(sorted_losses, 0).values[:-1]
        order = order[better]
        if len(order) > _MOST:
            order = order[torch.linspace(0, len(order) - 1, _MOST, dtype=torch.float64).round().long()]
        size, loss = all_sizes[order], all_losses[order]
        steps.append(order)
    place, chosen = len(size) - 1, []
    for order, row_sizes in zip(reversed(steps), reversed(sizes), strict=True):
        place, choice = divmod(int(order[place]), len(row_sizes))
        chosen.append(choice)
    return chosen[::-1]

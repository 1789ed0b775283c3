"""Which of several quantizations each matrix gets, so that together they fit into a budget with the least loss.

A multiple-choice knapsack: go matrix by matrix and keep only the combinations that no other beats in both size and
loss. That is exact. Beyond ``_MAX_COMBINATIONS`` of them only a sample, spread evenly over the sizes, is kept, and the
result is close to the best. Source: the integer program of LQ-LoRA, arXiv:2311.12023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["choose"]

_MAX_COMBINATIONS = 4096


def choose(losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The choice for each matrix with the least total loss whose sizes add up to at most ``budget``.

    Args:
        losses: By matrix, the loss of every choice.
        sizes: By matrix, the size of every choice.
        budget: At least the sum of the smallest sizes.
    """
    # The least that the matrices after each one take: a combination must leave room for it.
    reserved = [sum(min(row) for row in sizes[index + 1 :]) for index in range(len(sizes))]

    # Every combination kept so far, from the smallest to the largest.
    size = torch.zeros(1, dtype=torch.int64)
    loss = torch.zeros(1, dtype=torch.float64)
    steps: list[torch.Tensor] = []  # by matrix, of each combination kept: former combination * choices + choice
    for row_losses, row_sizes, later in zip(losses, sizes, reserved, strict=True):
        all_sizes = (size[:, None] + torch.tensor(row_sizes, dtype=torch.int64)).flatten()
        all_losses = (loss[:, None] + torch.tensor(row_losses, dtype=torch.float64)).flatten()

        # By size, and by loss within a size: two stable sorts, the more important one last.
        order = torch.argsort(all_losses, stable=True)
        order = order[torch.argsort(all_sizes[order], stable=True)]
        order = order[all_sizes[order] + later <= budget]

        # A larger combination is worth keeping only if it loses less than all smaller ones.
        sorted_losses = all_losses[order]
        better = torch.ones(len(order), dtype=torch.bool)
        better[1:] = sorted_losses[1:] < torch.cummin(sorted_losses, 0).values[:-1]
        order = order[better]
        if len(order) > _MAX_COMBINATIONS:
            places = torch.linspace(0, len(order) - 1, _MAX_COMBINATIONS, dtype=torch.float64)
            order = order[places.round().long()]

        size = all_sizes[order]
        loss = all_losses[order]
        steps.append(order)

    # The last combination is the largest that fits, so it loses least; follow it back to each matrix's choice.
    combination = len(size) - 1
    chosen = []
    for order, row_sizes in zip(reversed(steps), reversed(sizes), strict=True):
        combination, choice = divmod(int(order[combination]), len(row_sizes))
        chosen.append(choice)
    return chosen[::-1]

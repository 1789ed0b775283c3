"""The optimizer that a config names, over the master weights of whatever requires a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from lit_lora.config import OneOf
from lit_lora.train.optim import optimizers
from lit_lora.train.optim.adamw import AdamWConfig
from lit_lora.train.optim.base import OptimizerConfig
from lit_lora.train.optim.master_weights import MasterWeights

__all__ = ["AdamWConfig", "AnyOptimizer", "OptimizerConfig", "build_optimizer", "state_bytes"]

AnyOptimizer: TypeAlias = Annotated[OptimizerConfig, OneOf(optimizers())]
"""The section ``optimizer`` of a config: ``name`` picks one of the table."""


def build_optimizer(
    config: OptimizerConfig, master_weights: MasterWeights, lr_factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over all masters: matrices with weight decay, vectors without.

    Args:
        config: Its settings.
        master_weights: The masters.
        lr_factors: Parameter name: factor of its learning rate, where that is not 1. Each group of the optimizer
            carries its own as ``lr_factor``.

    Raises:
        UsageError: This machine lacks what the optimizer needs.
    """
    factors = lr_factors or {}

    # Parameters of one weight decay and one factor form a group.
    members: dict[tuple[float, float], list[Tensor]] = {}
    for name, master in master_weights.masters.items():
        decay = config.weight_decay if master.dim() >= 2 else 0.0
        members.setdefault((decay, factors.get(name, 1.0)), []).append(master)

    groups = [
        {"params": masters, "weight_decay": decay, "lr": config.lr * factor, "lr_factor": factor}
        for (decay, factor), masters in members.items()
    ]
    return config.build(groups)


def state_bytes(config: OptimizerConfig, masters: Iterable[Tensor]) -> int:
    """Bytes of state that the optimizer keeps for ``masters`` from its first step on."""
    return config.state_bytes(masters)

"""Optimizers over the master weights of whatever requires a gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lit_lora import log
from lit_lora.config import Settings
from lit_lora.train.optim.adamw8bit import BLOCK, SMALL, SmallStateAdamW
from lit_lora.train.optim.master_weights import MasterWeights

__all__ = ["OptimizerConfig", "build_optimizer", "state_bytes"]


class OptimizerConfig(Settings):
    """Which optimizer, with its own settings."""

    name: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit", "sgd"] = Field(
        "adamw",
        description="AdamW; with 8-bit moments (2 bytes a trained number instead of 8); with moments that a CUDA "
        "device pages out when its memory is short; SGD with momentum.",
    )
    lr: float = Field(
        2e-4,
        gt=0,
        description="Peak learning rate; a method may bring its own. 1e-4…1e-3 where few weights train, 1e-5…5e-5 "
        "where all do.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW: decay of the first and second moment.")
    eps: float = Field(1e-8, gt=0, description="AdamW: added to the root of the second moment.")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum; 0 keeps no state.")


def build_optimizer(
    config: OptimizerConfig, master_weights: MasterWeights, lr_factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over all masters: matrices with weight decay, vectors without.

    Args:
        config: Its settings.
        master_weights: The masters.
        lr_factors: Parameter name: factor of its learning rate, where that is not 1. Each group of the optimizer
            carries its own as ``lr_factor``.
    """
    factors, members = lr_factors or {}, dict[tuple[float, float], list[Tensor]]()
    for name, tensor in master_weights.masters.items():
        decay = config.weight_decay if tensor.dim() >= 2 else 0.0
        members.setdefault((decay, factors.get(name, 1.0)), []).append(tensor)
    groups = [
        {"params": tensors, "weight_decay": decay, "lr": config.lr * factor, "lr_factor": factor}
        for (decay, factor), tensors in members.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    bits = 8 if config.name.endswith("8bit") else 32
    paged = config.name.startswith("paged") and next(iter(master_weights.masters.values())).device.type == "cuda"
    if config.name.startswith("paged") and not paged:
        plain = config.name.removeprefix("paged_")
        log.warn(f"optimizer.name={config.name}: only a CUDA device pages; here it is the same as {plain}")
    if bits == 8 or paged:
        return SmallStateAdamW(groups, bits=bits, paged=paged, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def state_bytes(config: OptimizerConfig, masters: Iterable[Tensor]) -> int:
    """Bytes of state that the optimizer keeps for ``masters`` from its first step on."""
    counts = [master.numel() for master in masters]
    if config.name == "sgd":
        return 4 * sum(counts) if config.momentum else 0
    if config.name.endswith("8bit"):
        return sum(2 * (n + 4 * -(-n // BLOCK)) if n >= SMALL else 8 * n for n in counts)
    return 8 * sum(counts)

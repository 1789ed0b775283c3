"""Stochastic gradient descent, with or without momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lit_lora.train.optim.base import OptimizerConfig

__all__ = ["SGDConfig"]


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent: no state, or 4 bytes per trainable parameter with momentum."""

    name: Literal["sgd"] = Field("sgd", description="The optimizer.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum; 0 keeps no state.")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """PyTorch's, with one kernel for many parameters."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, foreach=True)

    def state_bytes(self, masters: Iterable[Tensor]) -> int:
        """One float32 number per parameter, where there is momentum."""
        return 4 * sum(master.numel() for master in masters) if self.momentum else 0

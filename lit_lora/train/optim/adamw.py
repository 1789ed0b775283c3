"""AdamW with float32 state.

Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", arXiv:1711.05101, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lit_lora.train.optim.base import OptimizerConfig

__all__ = ["AdamWConfig"]


class AdamWConfig(OptimizerConfig):
    """AdamW with float32 state: 8 bytes per trainable parameter."""

    smaller_state: ClassVar[str | None] = "adamw8bit"

    name: Literal["adamw"] = Field("adamw", description="The optimizer.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Decay rates of the first and second moment.")
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """PyTorch's, with one fused kernel for all parameters."""
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def state_bytes(self, masters: Iterable[Tensor]) -> int:
        """Two float32 moments per parameter."""
        return 8 * sum(master.numel() for master in masters)

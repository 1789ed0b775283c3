"""AdamW with 8-bit state, on every device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lit_lora.train.optim.adamw import AdamWConfig
from lit_lora.train.optim.small_state import BLOCK, SMALL, SmallStateAdamW

__all__ = ["AdamW8bitConfig"]


class AdamW8bitConfig(AdamWConfig):
    """AdamW with 8-bit state: 2 bytes per trainable parameter instead of 8."""

    smaller_state: ClassVar[str | None] = None
    cpu_time_of: ClassVar[str | None] = "adamw8bit"

    name: Literal["adamw8bit"] = Field("adamw8bit", description="The optimizer.")  # type: ignore[assignment]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """With bitsandbytes' kernels on a GPU that has them, else in PyTorch."""
        return SmallStateAdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, bits=8)

    def state_bytes(self, masters: Iterable[Tensor]) -> int:
        """Two moments of one byte per parameter and a float32 scale per block; small tensors keep float32 moments."""
        counts = [master.numel() for master in masters]
        return sum(2 * (count + 4 * -(-count // BLOCK)) if count >= SMALL else 8 * count for count in counts)

"""MultiLoRA: several low-rank updates of one layer, each with trained scales that start at zero.

``y = W x + b + s sum_i c_i * (B_i A_i x)``. ``A_i`` and ``B_i`` start random, the scales ``c_i`` (out,) at zero; the
sum spreads over more directions than one update of the same size. Together they are one update of rank n R,
``B = [c_1 * B_1, ...]``, and are saved as such: as a LoRA that every program reads.
Source: Wang et al. 2023, "MultiLoRA: Democratizing LoRA for Better Multi-Task Learning", equation 4.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.peft.core.modules import device_of
from lit_lora.peft.core.updates import LowRank, Replace, Update
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.function import Part
from lit_lora.peft.lora.linear import Init, LoRALinear

__all__ = ["MultiLoRAConfig", "MultiLoRALinear"]


class MultiLoRALinear(LoRALinear):
    """A frozen linear layer plus several trained low-rank updates.

    Their factors are stacked: ``lora_A`` (n R, in) and ``lora_B`` (out, n R); ``scales`` is (out, n). All float32.

    Args:
        base_layer: The linear layer; it stays unchanged.
        rank: R, of one update.
        scaling: The factor of the updates, alpha / rank.
        dropout: Share of the updates' inputs that are zeroed in training.
        init: Initialization of every ``A_i``.
        train_bias: Train a float32 copy of the base layer's bias too.
        count: n.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        init: Init = "kaiming",
        *,
        train_bias: bool = False,
        count: int = 3,
    ) -> None:
        super().__init__(base_layer, count * rank, scaling, dropout, init, train_bias=train_bias)
        bound = 1 / math.sqrt(rank)  # Kaiming's, for each B_i separately
        nn.init.uniform_(self.lora_B, -bound, bound)
        scales = torch.zeros(base_layer.out_features, count, dtype=torch.float32, device=device_of(base_layer))
        self.scales = nn.Parameter(scales)

    def scaled_B(self) -> Tensor:
        """``[c_1 * B_1, ...]``, (out, n R)."""
        out, count = self.scales.shape
        return (self.lora_B.view(out, count, -1) * self.scales[..., None]).flatten(1)

    def _part(self, keep: float) -> Part:
        return super()._part(keep)._replace(B=self.scaled_B())

    def updates(self) -> dict[str, Update]:
        """All updates as one, and the trained bias."""
        low = LowRank(self.scaled_B().detach(), self.lora_A.detach(), self.scaling)
        updates: dict[str, Update] = {"weight": low}
        if self.trained_bias is not None:
            updates["bias"] = Replace(self.trained_bias.detach())
        return updates

    def file_tensors(self) -> dict[str, Tensor]:
        """The factors of all updates as one, and the trained bias."""
        return {**super().file_tensors(), "lora_B.weight": self.scaled_B()}


class MultiLoRAConfig(LoRAConfig):
    """MultiLoRA: several low-rank updates of each linear layer, for mixed tasks."""

    default_lr: ClassVar[float | None] = 6e-4
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    name: Literal["multilora"] = Field("multilora", description="The method.")  # type: ignore[assignment]
    updates: int = Field(3, ge=1, description="Number of updates per layer, each of the given rank.")

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "MultiLoRA"

    @property
    def about(self) -> str:
        """The method, the number of updates, their rank and alpha."""
        return f"MultiLoRA, {self.updates} updates of rank {self.rank}, alpha {self.base_alpha:g}"

    def linear(self, base: nn.Linear, rank: int, scaling: float, **settings: Any) -> LoRALinear:
        """The wrapper of a linear layer."""
        return MultiLoRALinear(base, rank, scaling, count=self.updates, **settings)

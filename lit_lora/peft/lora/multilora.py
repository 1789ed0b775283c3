"""MultiLoRA: several low-rank updates beside one layer, each with trained scales that start at zero.

``y = W x + b + s sum_i c_i * (B_i A_i x)``. ``A_i`` and ``B_i`` start random, the scales ``c_i`` (out,) at zero; the
sum spreads over more directions than one update of the same size. As a product, all of them are one update of rank n R,
``B = [c_1 * B_1, ...]``, and that is how it is saved: as a LoRA that every program reads.
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
    """A frozen linear layer with several low-rank updates beside it.

    Their factors are stacked: ``lora_A`` (n R, in) and ``lora_B`` (out, n R); ``scales`` is (out, n). All float32.

    Args:
        base_layer: The linear layer; it stays as it is.
        rank: R, of one update.
        scaling: The factor of the branch, alpha / rank.
        dropout: Share of the branch's inputs that are zeroed in training.
        init: How every ``A_i`` starts.
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
        nn.init.uniform_(self.lora_B, -1 / math.sqrt(rank), 1 / math.sqrt(rank))  # Kaiming, of each B_i by itself
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
        return updates if self.trained_bias is None else {**updates, "bias": Replace(self.trained_bias.detach())}

    def file_tensors(self) -> dict[str, Tensor]:
        """Factors of the one update, and the trained bias."""
        return {**super().file_tensors(), "lora_B.weight": self.scaled_B()}


class MultiLoRAConfig(LoRAConfig):
    """MultiLoRA: several low-rank updates beside each linear layer, for mixed tasks."""

    default_lr: ClassVar[float | None] = 6e-4
    adapts: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    name: Literal["multilora"] = Field("multilora", description="The method.")  # type: ignore[assignment]
    updates: int = Field(3, ge=1, description="Updates beside each layer, each of the given rank.")

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "MultiLoRA"

    @property
    def about(self) -> str:
        """The method and its size."""
        return f"MultiLoRA, {self.updates} updates of rank {self.rank}, alpha {self.base_alpha:g}"

    def linear(self, base: nn.Linear, rank: int, scaling: float, **settings: Any) -> LoRALinear:
        """The module that takes the place of a linear layer."""
        return MultiLoRALinear(base, rank, scaling, count=self.updates, **settings)

"""Tied-LoRA: the layers share the low-rank factors; each has two vectors of its own around them.

``y = W x + b + s v * (B (u * (A x)))`` with ``A`` and ``B`` tied over all layers of one name and shape, ``u`` (R,) and
``v`` (out,) per layer; any of the four trains or stays at its start. ``A`` starts random and ``u`` at one. Exactly one
factor is zero at the start, and it trains: ``B``, or ``v`` where ``B`` stays random.
Source: Renduchintala et al. 2023, "Tied-LoRA: Enhancing parameter efficiency of LoRA with weight tying", section 3.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lit_lora.peft.core.modules import OwnModule, device_of
from lit_lora.peft.core.targeted import TargetedMethod, check_rank
from lit_lora.peft.core.updates import LowRank, Update
from lit_lora.peft.lora.function import Part, lora_linears, stored_weight

__all__ = ["TiedLoRAConfig", "TiedLoRALinear"]

Tensors = Literal["A", "B", "u", "v"]


class TiedLoRALinear(OwnModule):
    """A frozen linear layer with a low-rank update whose factors other layers share, all float32.

    Args:
        base_layer: The linear layer; it stays as it is.
        tied_A: (R, in).
        tied_B: (out, R).
        scaling: The factor of the branch, alpha / rank.
        v_initial: Where ``v`` starts.
    """

    def __init__(
        self, base_layer: nn.Linear, tied_A: nn.Parameter, tied_B: nn.Parameter, scaling: float, v_initial: float
    ) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.tied_A, self.tied_B, self.scaling = tied_A, tied_B, scaling
        device = device_of(base_layer)
        self.u = nn.Parameter(torch.ones(tied_A.shape[0], device=device))
        self.v = nn.Parameter(torch.full((base_layer.out_features,), v_initial, device=device))

    @property
    def rank(self) -> int:
        """R."""
        return self.tied_A.shape[0]

    def _scaled_B(self) -> Tensor:
        """``diag(v) B diag(u)``, (out, R)."""
        return self.v[:, None] * self.tied_B * self.u

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        base = self.base_layer
        return lora_linears(x, [Part(stored_weight(base), base.bias, self.tied_A, self._scaled_B(), self.scaling)])[0]

    def updates(self) -> dict[str, Update]:
        """``W + s diag(v) B diag(u) A``."""
        return {"weight": LowRank(self._scaled_B().detach(), self.tied_A.detach(), self.scaling)}


class TiedLoRAConfig(TargetedMethod):
    """Tied-LoRA: low-rank factors shared by all layers of a kind, and two vectors per layer."""

    default_lr: ClassVar[float | None] = 6e-4
    peft_type: ClassVar[str] = "LIT_LORA_TIED"
    peft_keys: ClassVar[frozenset[str]] = frozenset(["r"])

    name: Literal["tied-lora"] = Field("tied-lora", description="The method.")
    rank: int = Field(8, ge=1, description="Rank of the update.")
    alpha: float | None = Field(None, gt=0, description="The update is scaled by alpha / rank; 2 x rank when omitted.")
    train: list[Tensors] = Field(
        ["A", "B", "u", "v"],
        min_length=1,
        description="What trains: the shared A and B, the layers' own u (of the rank's size) and v (of the outputs').",
    )

    @model_validator(mode="after")
    def _one_zero(self) -> TiedLoRAConfig:
        if not {"B", "v"} & set(self.train):
            raise ValueError("train: with B and v both at their start the update would change the model or stay zero")
        return self

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "Tied-LoRA"

    @property
    def about(self) -> str:
        """The method and its size."""
        return f"Tied-LoRA, rank {self.rank}, trains {', '.join(self.train)}"

    def wrapped(self, targets: Mapping[str, nn.Linear]) -> dict[str, OwnModule]:
        """An update for each target; those of one name (but for numbers) and shape share their factors.

        Raises:
            UsageError: The rank is too large for one.
        """
        pools: dict[tuple[str, int, int], tuple[nn.Parameter, nn.Parameter]] = {}
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        wrapped: dict[str, OwnModule] = {}
        for name, base in targets.items():
            out, wide = base.out_features, base.in_features
            check_rank(self.rank, name, (out, wide))
            key = (re.sub(r"\b\d+\b", "*", name), out, wide)
            A, B = pools.setdefault(key, self._factors(base))
            module = TiedLoRALinear(base, A, B, alpha / self.rank, 1.0 if "B" in self.train else 0.0)
            module.u.requires_grad_("u" in self.train)
            module.v.requires_grad_("v" in self.train)
            wrapped[name] = module
        return wrapped

    def _factors(self, base: nn.Linear) -> tuple[nn.Parameter, nn.Parameter]:
        out, wide = base.out_features, base.in_features
        A = torch.empty(self.rank, wide, dtype=torch.float32, device=device_of(base))
        B = torch.zeros(out, self.rank, dtype=torch.float32, device=device_of(base))
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if "B" not in self.train:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        return nn.Parameter(A, requires_grad="A" in self.train), nn.Parameter(B, requires_grad="B" in self.train)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name; PEFT has no such method."""
        return {**super().peft_config(model), "r": self.rank}

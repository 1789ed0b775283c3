"""Tied-LoRA: layers share the low-rank factors, and each has two vectors of its own.

``y = W x + b + s v * (B (u * (A x)))`` with ``A`` and ``B`` shared by all layers of one name and shape, ``u`` (R,) and
``v`` (out,) per layer; any of the four trains or keeps its initial value. ``A`` starts random and ``u`` at one. Exactly
one factor starts at zero, and it trains: ``B``, or ``v`` if ``B`` stays random.
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
    """A frozen linear layer plus a low-rank update whose factors other layers share, all float32.

    Args:
        base_layer: The linear layer; it stays unchanged.
        tied_A: (R, in).
        tied_B: (out, R).
        scaling: The factor of the update, alpha / rank.
        v_initial: Initial value of ``v``.
    """

    def __init__(
        self, base_layer: nn.Linear, tied_A: nn.Parameter, tied_B: nn.Parameter, scaling: float, v_initial: float
    ) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.tied_A = tied_A
        self.tied_B = tied_B
        self.scaling = scaling
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
        part = Part(stored_weight(base), base.bias, self.tied_A, self._scaled_B(), self.scaling)
        return lora_linears(x, [part])[0]

    def updates(self) -> dict[str, Update]:
        """``W + s diag(v) B diag(u) A``."""
        return {"weight": LowRank(self._scaled_B().detach(), self.tied_A.detach(), self.scaling)}


class TiedLoRAConfig(TargetedMethod):
    """Tied-LoRA: low-rank factors shared by all layers of a kind, and two vectors per layer."""

    default_lr: ClassVar[float | None] = 6e-4
    peft_type: ClassVar[str] = "LIT_LORA_TIED"
    peft_keys: ClassVar[frozenset[str]] = frozenset(["r"])

    name: Literal["tied-lora"] = Field("tied-lora", description="The method.")
    rank: int = Field(8, ge=1, description="Rank of the updates.")
    alpha: float | None = Field(
        None, gt=0, description="Scale of the updates, which are multiplied by alpha / rank; 2 x rank if omitted."
    )
    train: list[Tensors] = Field(
        ["A", "B", "u", "v"],
        min_length=1,
        description="Tensors to train: the shared A and B, and each layer's u (one value per rank) and v (per output).",
    )

    @model_validator(mode="after")
    def _one_zero(self) -> TiedLoRAConfig:
        if not {"B", "v"} & set(self.train):
            raise ValueError(f"train: expected B, v or both among them, got {', '.join(self.train)}")
        return self

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "Tied-LoRA"

    @property
    def about(self) -> str:
        """The method, its rank and what it trains."""
        return f"Tied-LoRA, rank {self.rank}, trains {', '.join(self.train)}"

    def rank_of(self, name: str) -> int:
        """The rank of every update."""
        return self.rank

    def wrapped(self, targets: Mapping[str, nn.Linear]) -> dict[str, OwnModule]:
        """The wrappers of the targets; those with the same name, apart from numbers, and shape share their factors.

        Raises:
            UsageError: The rank is too large for a target.
        """
        shared: dict[tuple[str, int, int], tuple[nn.Parameter, nn.Parameter]] = {}
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        v_initial = 1.0 if "B" in self.train else 0.0  # the factor that is zero: B if it trains, else v
        wrapped: dict[str, OwnModule] = {}
        for name, base in targets.items():
            check_rank(self.rank, name, (base.out_features, base.in_features))
            key = (re.sub(r"\b\d+\b", "*", name), base.out_features, base.in_features)
            A, B = shared.setdefault(key, self._factors(base))
            module = TiedLoRALinear(base, A, B, alpha / self.rank, v_initial)
            module.u.requires_grad_("u" in self.train)
            module.v.requires_grad_("v" in self.train)
            wrapped[name] = module
        return wrapped

    def _factors(self, base: nn.Linear) -> tuple[nn.Parameter, nn.Parameter]:
        """New factors for layers of this shape, (R, in) and (out, R)."""
        device = device_of(base)
        A = torch.empty(self.rank, base.in_features, dtype=torch.float32, device=device)
        B = torch.zeros(base.out_features, self.rank, dtype=torch.float32, device=device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        if "B" not in self.train:
            nn.init.kaiming_uniform_(B, a=math.sqrt(5))
        return nn.Parameter(A, requires_grad="A" in self.train), nn.Parameter(B, requires_grad="B" in self.train)

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` in our own format: PEFT has no such method."""
        return {**super().peft_config(model), "r": self.rank}

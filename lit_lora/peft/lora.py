"""LoRA: keep ``W``, learn a low-rank update beside it.

::

            x ────────────┬─────────────► W (out, in), frozen ────► + ──► y
                          │                                         ▲
                          └─► dropout ─► A (R, in) ─► B (out, R) ─► s

``y = W x + b + s B A x`` with ``s = alpha / rank``. ``B`` starts at zero, so nothing changes until the first step.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; the init of ``A`` follows
loralib (github.com/microsoft/LoRA), Kaiming-uniform with a = sqrt(5); rsLoRA is Kalajdzievski 2023.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.peft.base import Kind, Method, OwnModule, own_modules, replace_module, select
from lit_lora.peft.lora_function import lora_linear

__all__ = ["LoRAConfig", "LoRALinear"]

# Output heads by the last part of their name: "all-linear" leaves them alone.
_HEADS = {"lm_head", "score", "classifier", "qa_outputs"}
_PRESETS = {"q,v": ["q_proj", "v_proj"]}


class LoRALinear(OwnModule):
    """A frozen linear layer with a trained low-rank update beside it.

    ``lora_A`` (R, in) and ``lora_B`` (out, R) are float32 whatever the dtype of the base layer: in bfloat16 a small
    learning rate would round every update away.

    Args:
        base_layer: The linear layer; it stays as it is.
        rank: R.
        scaling: The factor of the branch, alpha / rank.
        dropout: Share of the branch's inputs that are zeroed in training.
        init: How ``lora_A`` starts; ``lora_B`` starts at zero.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        init: Literal["kaiming", "gaussian"] = "kaiming",
    ) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, dtype=torch.float32, device=device))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1 / rank)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        scaling, mask = self.scaling, None
        if self.training and self.dropout:
            mask = torch.rand(x.shape, device=x.device) >= self.dropout
            scaling = scaling / (1 - self.dropout)
        base = self.base_layer
        return lora_linear(x, base.weight, base.bias, self.lora_A, self.lora_B, scaling, mask)

    def extra_repr(self) -> str:
        """Rank, scaling and dropout."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class LoRAConfig(Method):
    """LoRA: a low-rank update beside frozen linear layers."""

    kind: ClassVar[Kind] = "low-rank"
    name: Literal["lora"] = Field("lora", description="The method.")
    rank: int = Field(8, ge=1, description="Rank of the update; more rank, more capacity and memory.")
    alpha: float | None = Field(None, gt=0, description="The update is scaled by alpha / rank; 2 x rank when omitted.")
    dropout: float = Field(0.05, ge=0, lt=1, description="Share of the branch's inputs zeroed in training.")
    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        "all-linear",
        description="Modules to adapt: all-linear (every linear layer but the output head), q,v (the paper's choice), "
        "or a list of names such as q_proj, mlp.up_proj or model.layers.*.v_proj.",
    )
    init: Literal["kaiming", "gaussian"] = Field("kaiming", description="How A starts; B starts at zero.")

    def apply(self, model: nn.Module) -> None:
        """Wrap the targets in place; only the LoRA parameters get ``requires_grad`` (call ``freeze`` first).

        Raises:
            UsageError: A target matches no module, or the model has an adapter already.
        """
        if own_modules(model):
            raise UsageError("peft: the model has an adapter already", hint="load the base model again")
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        for name in self._targets(model):
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            replace_module(model, name, LoRALinear(base, self.rank, alpha / self.rank, self.dropout, self.init))

    def _targets(self, model: nn.Module) -> list[str]:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if self.target_modules == "all-linear":
            names = [name for name in linears if name.rpartition(".")[2] not in _HEADS]
            if not names:
                raise UsageError("peft.target_modules: the model has no linear layer to adapt")
            return names
        patterns = _PRESETS.get(self.target_modules) if isinstance(self.target_modules, str) else self.target_modules
        return select(patterns or [], linears, key="peft.target_modules")

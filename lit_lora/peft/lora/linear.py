"""LoRA: freeze ``W`` and train a low-rank update of it.

::

            x ────────────┬─────────────► W (out, in), frozen ────► + ──► y
                          │                                         ▲
                          └─► dropout ─► A (R, in) ─► B (out, R) ─► s

``y = W x + b + s B A x`` with ``s = alpha / rank``. ``B`` starts at zero, so nothing changes until the first step.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; the init of ``A`` follows
loralib (github.com/microsoft/LoRA), Kaiming-uniform with a = sqrt(5); rsLoRA is Kalajdzievski 2023, LoRA+ Hayou et al.
2024, LoRA-FA Zhang et al. 2023 (a frozen ``A``: the backward pass needs ``A x`` instead of ``x``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lit_lora.peft.core.modules import OwnModule, device_of
from lit_lora.peft.core.updates import LowRank, Replace, Update
from lit_lora.peft.lora.function import Part, drop_inputs, lora_linears, stored_weight

__all__ = ["Init", "LoRALinear"]

Init = Literal["kaiming", "gaussian"]


class LoRALinear(OwnModule):
    """A frozen linear layer plus a trained low-rank update.

    ``lora_A`` (R, in) and ``lora_B`` (out, R) are float32 whatever the dtype of the base layer: in bfloat16, optimizer
    steps at a small learning rate would be rounded away.

    Args:
        base_layer: The linear layer; it stays unchanged.
        rank: R.
        scaling: The factor of the update, alpha / rank.
        dropout: Share of the update's inputs that are zeroed in training.
        init: Initialization of ``lora_A``; ``lora_B`` starts at zero.
        train_bias: Train a float32 copy of the base layer's bias too.
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
    ) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        device = device_of(base_layer)
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, dtype=torch.float32, device=device))
        if init == "kaiming":
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(self.lora_A, std=1 / rank)
        self.start_A: nn.Parameter | None = None
        self.start_B: nn.Parameter | None = None
        self.trained_bias: nn.Parameter | None = None
        if train_bias and base_layer.bias is not None:
            self.trained_bias = nn.Parameter(base_layer.bias.detach().to(torch.float32, copy=True))

    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Set the factors, in place, to float32 values whose product is subtracted again; see :mod:`.inits`."""
        # Copied into the parameters' own contiguous memory, the layout of the optimizer state in a resumed run.
        with torch.no_grad():
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        self.start_A = nn.Parameter(self.lora_A.detach().clone(), requires_grad=False)
        self.start_B = nn.Parameter(self.lora_B.detach().clone(), requires_grad=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` of the whole update; with initial values that are subtracted, of twice the rank."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        A = torch.cat([self.lora_A, self.start_A])
        B = torch.cat([self.lora_B, -self.start_B], dim=1)
        return A, B

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.forward_together([self], x)[0]

    @staticmethod
    def forward_together(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of layers that read the same input; see :func:`lit_lora.model.layers.project`."""
        keep, mask = drop_inputs(x, layers[0].dropout, layers[0].training)
        return lora_linears(x, [layer._part(keep) for layer in layers], mask)

    def _part(self, keep: float) -> Part:
        """The layer's tensors, the update scaled up for the share ``keep`` of its inputs that dropout leaves."""
        base = self.base_layer
        bias = base.bias if self.trained_bias is None else self.trained_bias
        return Part(stored_weight(base), bias, *self.factors(), self.scaling / keep)

    def updates(self) -> dict[str, Update]:
        """``W + s B A``, and the trained bias."""
        A, B = self.factors()
        updates: dict[str, Update] = {"weight": LowRank(B.detach(), A.detach(), self.scaling)}
        if self.trained_bias is not None:
            updates["bias"] = Replace(self.trained_bias.detach())
        return updates

    def file_tensors(self) -> dict[str, Tensor]:
        """Both factors, and the trained bias."""
        A, B = self.factors()
        tensors: dict[str, Tensor] = {"lora_A.weight": A, "lora_B.weight": B}
        if self.trained_bias is not None:
            tensors["base_layer.bias"] = self.trained_bias
        return tensors

    def extra_repr(self) -> str:
        """Rank, scaling and dropout."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"

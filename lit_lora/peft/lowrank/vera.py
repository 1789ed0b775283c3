"""VeRA: all layers share frozen random matrices, and each trains two vectors.

``y = W x + b + lambda_b * (B (lambda_d * (A x)))``. A layer uses the first columns of ``A`` (R, largest in) and the
first rows of ``B`` (largest out, R). ``lambda_b`` starts at zero.
Source: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", equation 2. The matrices are drawn as in
PEFT, Kaiming-uniform from a generator of their own, and are saved with the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.config import validate
from lit_lora.peft.core.adapter_method import CONFIG
from lit_lora.peft.core.modules import OwnModule, device_of
from lit_lora.peft.core.targeted import TargetedMethod
from lit_lora.peft.core.updates import LowRank, Update
from lit_lora.peft.lora.function import Part, drop_inputs, lora_linears, stored_weight

__all__ = ["VeRAConfig", "VeRALinear"]


class VeRALinear(OwnModule):
    """A frozen linear layer plus a low-rank update of shared random matrices and two trained vectors, all float32.

    Args:
        base_layer: The linear layer; it stays unchanged.
        vera_A: (R, at least in), shared and frozen.
        vera_B: (at least out, R), shared and frozen.
        d_initial: Initial value of ``vera_lambda_d`` (R,); ``vera_lambda_b`` (out,) starts at zero.
        dropout: Share of the update's inputs that are zeroed in training.
    """

    def __init__(
        self, base_layer: nn.Linear, vera_A: nn.Parameter, vera_B: nn.Parameter, d_initial: float, dropout: float
    ) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.vera_A = vera_A
        self.vera_B = vera_B
        self.dropout = dropout
        device = device_of(base_layer)
        self.vera_lambda_d = nn.Parameter(torch.full((vera_A.shape[0],), d_initial, device=device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(base_layer.out_features, device=device))

    @property
    def rank(self) -> int:
        """R."""
        return self.vera_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        # Both vectors scale B, so the update is an ordinary low-rank product with a frozen A.
        base = self.base_layer
        keep, mask = drop_inputs(x, self.dropout, self.training)
        part = Part(stored_weight(base), base.bias, self._A(), self._scaled_B(), 1 / keep)
        return lora_linears(x, [part], mask)[0]

    def _A(self) -> Tensor:
        """This layer's view of the shared ``A``, (R, in)."""
        return self.vera_A[:, : self.base_layer.in_features]

    def _scaled_B(self) -> Tensor:
        """``diag(lambda_b) B diag(lambda_d)`` with this layer's rows of the shared ``B``, (out, R)."""
        B = self.vera_B[: self.base_layer.out_features]
        return self.vera_lambda_b[:, None] * B * self.vera_lambda_d

    def updates(self) -> dict[str, Update]:
        """``W + diag(lambda_b) B diag(lambda_d) A``."""
        return {"weight": LowRank(self._scaled_B().detach(), self._A().detach(), 1.0)}

    def file_tensors(self) -> dict[str, Tensor]:
        """Both vectors, and the shared matrices under PEFT's names for them, which are full names."""
        return {
            "base_model.vera_A": self.vera_A,
            "base_model.vera_B": self.vera_B,
            "vera_lambda_b": self.vera_lambda_b,
            "vera_lambda_d": self.vera_lambda_d,
        }


class VeRAConfig(TargetedMethod):
    """VeRA: two trained vectors per layer, and random matrices shared by all."""

    default_lr: ClassVar[float | None] = 6e-3
    peft_type: ClassVar[str] = "VERA"
    peft_keys: ClassVar[frozenset[str]] = frozenset(
        ["r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection", "init_weights", "bias"]
    )

    name: Literal["vera"] = Field("vera", description="The method.")
    rank: int = Field(256, ge=1, description="Rank of the shared matrices; high, as it adds few trainable parameters.")
    d_initial: float = Field(0.1, description="Initial value of the inner vectors.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the updates' inputs to zero in training.")
    projection_seed: int = Field(0, ge=0, description="Seed of the shared matrices.")

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "VeRA"

    def wrapped(self, targets: Mapping[str, nn.Linear]) -> dict[str, OwnModule]:
        """The wrappers of the targets, with one pair of shared matrices as large as the largest target needs."""
        bases = list(targets.values())
        device = device_of(bases[0])
        columns = max(base.in_features for base in bases)
        rows = max(base.out_features for base in bases)

        generator = torch.Generator().manual_seed(self.projection_seed)
        A = nn.Parameter(_random((self.rank, columns), generator).to(device), requires_grad=False)
        B = nn.Parameter(_random((rows, self.rank), generator).to(device), requires_grad=False)
        return {name: VeRALinear(base, A, B, self.d_initial, self.dropout) for name, base in targets.items()}

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name."""
        return {
            **super().peft_config(model),
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "r": self.rank,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "save_projection": True,
            "bias": "none",
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> VeRAConfig:
        """Settings of an adapter that PEFT wrote, with full module names."""
        suffix = ".vera_lambda_b"
        settings = {
            "name": "vera",
            "rank": raw.get("r", 256),
            "target_modules": [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)],
            "dropout": raw.get("vera_dropout", 0.0),
            "d_initial": raw.get("d_initial", 0.1),
            "projection_seed": raw.get("projection_prng_key", 0),
        }
        return validate(settings, cls, name=CONFIG)


def _random(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with gain sqrt(2): bound sqrt(6 / columns)."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)

"""VeRA: random matrices that all layers share and that never train; each layer trains two vectors.

``y = W x + b + lambda_b * (B (lambda_d * (A x)))``. A layer takes the first columns of ``A`` (R, largest in) and the
first rows of ``B`` (largest out, R). ``lambda_b`` starts at zero.
Source: Kopiczko et al. 2024, "VeRA: Vector-based Random Matrix Adaptation", equation 2. The matrices are drawn as PEFT
draws them, Kaiming-uniform from a generator of their own, and are saved with the adapter.
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
    """A frozen linear layer with two trained vectors around shared random matrices, all float32.

    Args:
        base_layer: The linear layer; it stays as it is.
        vera_A: (R, at least in), shared and frozen.
        vera_B: (at least out, R), shared and frozen.
        d_initial: Where ``vera_lambda_d`` (R,) starts; ``vera_lambda_b`` (out,) starts at zero.
        dropout: Share of the branch's inputs that are zeroed in training.
    """

    def __init__(
        self, base_layer: nn.Linear, vera_A: nn.Parameter, vera_B: nn.Parameter, d_initial: float, dropout: float
    ) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.vera_A, self.vera_B, self.dropout = vera_A, vera_B, dropout
        device = device_of(base_layer)
        self.vera_lambda_d = nn.Parameter(torch.full((vera_A.shape[0],), d_initial, device=device))
        self.vera_lambda_b = nn.Parameter(torch.zeros(base_layer.out_features, device=device))

    @property
    def rank(self) -> int:
        """R."""
        return self.vera_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        base, (A, _) = self.base_layer, self._slices()
        keep, mask = drop_inputs(x, self.dropout, self.training)
        return lora_linears(x, [Part(stored_weight(base), base.bias, A, self._scaled_B(), 1 / keep)], mask)[0]

    def _scaled_B(self) -> Tensor:
        """``diag(lambda_b) B diag(lambda_d)``, (out, R)."""
        return self.vera_lambda_b[:, None] * self._slices()[1] * self.vera_lambda_d

    def _slices(self) -> tuple[Tensor, Tensor]:
        """Views of the shared matrices, (R, in) and (out, R)."""
        return self.vera_A[:, : self.base_layer.in_features], self.vera_B[: self.base_layer.out_features]

    def updates(self) -> dict[str, Update]:
        """``W + diag(lambda_b) B diag(lambda_d) A``."""
        return {"weight": LowRank(self._scaled_B().detach(), self._slices()[0].detach(), 1.0)}

    def file_tensors(self) -> dict[str, Tensor]:
        """Both vectors, and the shared matrices under the names that PEFT gives them."""
        shared = {"base_model.vera_A": self.vera_A, "base_model.vera_B": self.vera_B}
        return {**shared, "vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}


class VeRAConfig(TargetedMethod):
    """VeRA: two trained vectors per layer around shared random matrices."""

    default_lr: ClassVar[float | None] = 6e-3
    peft_type: ClassVar[str] = "VERA"
    peft_keys: ClassVar[frozenset[str]] = frozenset(
        ["r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection", "init_weights", "bias"]
    )

    name: Literal["vera"] = Field("vera", description="The method.")
    rank: int = Field(256, ge=1, description="Rank of the shared matrices; large, because it costs few parameters.")
    d_initial: float = Field(0.1, description="Where the inner vectors start.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the branch's inputs zeroed in training.")
    projection_seed: int = Field(0, ge=0, description="Of the shared matrices.")

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "VeRA"

    def wrapped(self, targets: Mapping[str, nn.Linear]) -> dict[str, OwnModule]:
        """Vectors for each target, around one pair of matrices for all."""
        bases = list(targets.values())
        generator = torch.Generator().manual_seed(self.projection_seed)
        device = device_of(bases[0])
        A = _random((self.rank, max(base.in_features for base in bases)), generator).to(device)
        B = _random((max(base.out_features for base in bases), self.rank), generator).to(device)
        shared = nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False)
        return {name: VeRALinear(base, *shared, self.d_initial, self.dropout) for name, base in targets.items()}

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name."""
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
        """Settings of an adapter that PEFT wrote, with full names."""
        end = ".vera_lambda_b"
        settings = {
            "name": "vera",
            "rank": raw.get("r", 256),
            "target_modules": [name.removesuffix(end) for name in tensors if name.endswith(end)],
            "dropout": raw.get("vera_dropout", 0.0),
            "d_initial": raw.get("d_initial", 0.1),
            "projection_seed": raw.get("projection_prng_key", 0),
        }
        return validate(settings, cls, name=CONFIG)


def _random(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming-uniform with gain sqrt(2): bound sqrt(6 / columns)."""
    bound = math.sqrt(6 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)

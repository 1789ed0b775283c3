"""IA3: a trained factor for every key, value and inner MLP channel, and nothing else.

``y = l * (W x + b)`` for keys and values, ``y = W (l * x) + b`` for the last layer of the MLP; ``l`` starts at one.
Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_lora.config import validate
from lit_lora.peft.core.adapter_method import CONFIG
from lit_lora.peft.core.matching import select, short_names
from lit_lora.peft.core.module_names import default_names
from lit_lora.peft.core.modules import OwnModule, device_of, own_modules
from lit_lora.peft.core.targeted import TargetedMethod, whole_modules
from lit_lora.peft.core.updates import LowRank, Scaled, Update

__all__ = ["IA3Config", "IA3Linear"]


class IA3Linear(OwnModule):
    """A frozen linear layer whose outputs, or inputs, are multiplied by ``ia3_l``, float32.

    Args:
        base_layer: The linear layer; it stays as it is.
        inputs: Multiply the inputs (in,) instead of the outputs (out,).
    """

    def __init__(self, base_layer: nn.Linear, *, inputs: bool) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.inputs = inputs
        size = base_layer.in_features if inputs else base_layer.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, dtype=torch.float32, device=device_of(base_layer)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        if self.inputs:
            y: Tensor = self.base_layer((x * self.ia3_l).to(x.dtype))
            return y
        y = self.base_layer(x)
        return (y * self.ia3_l).to(y.dtype)

    def updates(self) -> dict[str, Update]:
        """Columns of the weight times ``l``; or its rows, and the bias."""
        change = self.ia3_l.detach()[:, None] - 1  # (size, 1)
        ones = torch.ones_like(change[:1])
        if self.inputs:
            rows = torch.ones(self.base_layer.out_features, 1, device=change.device)
            return {"weight": Scaled(LowRank(rows, change.T, 1.0))}
        columns = ones.expand(1, self.base_layer.in_features)
        updates: dict[str, Update] = {"weight": Scaled(LowRank(change, columns, 1.0))}
        return updates if self.base_layer.bias is None else {**updates, "bias": Scaled(LowRank(change, ones, 1.0))}

    def file_tensors(self) -> dict[str, Tensor]:
        """PEFT's shapes: (1, in) or (out, 1)."""
        return {"ia3_l": self.ia3_l[None] if self.inputs else self.ia3_l[:, None]}


class IA3Config(TargetedMethod):
    """IA3: trained factors of keys, values and inner MLP channels."""

    default_lr: ClassVar[float | None] = 3e-3
    peft_type: ClassVar[str] = "IA3"
    peft_keys: ClassVar[frozenset[str]] = frozenset(["feedforward_modules", "init_ia3_weights"])

    name: Literal["ia3"] = Field("ia3", description="The method.")
    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        default_names("key", "value", "mlp_out"),
        description="Modules to adapt, by name; k_proj, v_proj, down_proj by default.",
    )
    feedforward_modules: list[str] = Field(
        default_names("mlp_out"), description="Those of the targets whose inputs are multiplied, not their outputs."
    )

    @property
    def title(self) -> str:
        """The method's name as one writes it."""
        return "IA3"

    def wrapped(self, targets: Mapping[str, nn.Linear]) -> dict[str, OwnModule]:
        """A factor for the channels of each target.

        Raises:
            UsageError: A name in ``feedforward_modules`` matches none.
        """
        inputs = set(select(self.feedforward_modules, targets, key="peft.feedforward_modules"))
        return {name: IA3Linear(base, inputs=name in inputs) for name, base in targets.items()}

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json``, but for the base model's name."""
        own = own_modules(model)
        vectors = {name: module for name, module in own.items() if isinstance(module, IA3Linear)}
        inputs = [name for name, module in vectors.items() if module.inputs]
        short, names = short_names(model, inputs), short_names(model, list(vectors))
        return {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": names if set(short) <= set(names) else list(vectors),
            "feedforward_modules": short if set(short) <= set(names) else inputs,
            "modules_to_save": whole_modules(model) or None,
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IA3Config:
        """Settings of an adapter that PEFT wrote: full names, by the shapes in its file."""
        vectors = {name.removesuffix(".ia3_l"): t for name, t in tensors.items() if name.endswith(".ia3_l")}
        whole = [name.rpartition(".")[0] for name in tensors if not name.endswith(".ia3_l")]
        settings = {
            "name": "ia3",
            "target_modules": list(vectors),
            "feedforward_modules": [name for name, vector in vectors.items() if vector.shape[0] == 1],
            "modules_to_save": list(dict.fromkeys(whole)),
        }
        return validate(settings, cls, name=CONFIG)

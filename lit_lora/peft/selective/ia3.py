"""IA3: one trained factor per channel of keys, values and the MLP's hidden layer.

``y = l * (W x + b)`` for keys and values, ``y = W (l * x) + b`` for the MLP's last layer; ``l`` starts at one.
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
        base_layer: The linear layer; it stays unchanged.
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
        """The weight's columns times ``l``; or its rows and the bias times ``l``."""
        change = self.ia3_l.detach()[:, None] - 1  # (size, 1), for W * (1 + change)
        if self.inputs:
            ones = torch.ones(self.base_layer.out_features, 1, device=change.device)
            return {"weight": Scaled(LowRank(ones, change.T, 1.0))}

        one = torch.ones_like(change[:1])  # (1, 1)
        ones = one.expand(1, self.base_layer.in_features)
        updates: dict[str, Update] = {"weight": Scaled(LowRank(change, ones, 1.0))}
        if self.base_layer.bias is not None:
            updates["bias"] = Scaled(LowRank(change, one, 1.0))
        return updates

    def file_tensors(self) -> dict[str, Tensor]:
        """PEFT's shapes: (1, in) or (out, 1)."""
        return {"ia3_l": self.ia3_l[None] if self.inputs else self.ia3_l[:, None]}


class IA3Config(TargetedMethod):
    """IA3: one trained factor per channel of keys, values and the MLP's hidden layer."""

    default_lr: ClassVar[float | None] = 3e-3
    peft_type: ClassVar[str] = "IA3"
    peft_keys: ClassVar[frozenset[str]] = frozenset(["feedforward_modules", "init_ia3_weights"])

    name: Literal["ia3"] = Field("ia3", description="The method.")
    target_modules: Literal["all-linear", "q,v"] | list[str] = Field(
        default_names("key", "value", "mlp_out"),
        description="Modules to adapt: all-linear, q,v or a list of names.",
    )
    feedforward_modules: list[str] = Field(
        default_names("mlp_out"), description="Targets whose inputs are multiplied instead of their outputs."
    )

    @property
    def title(self) -> str:
        """The method's name as written in text."""
        return "IA3"

    def wrapped(self, targets: Mapping[str, nn.Linear]) -> dict[str, OwnModule]:
        """The wrappers of the targets.

        Raises:
            UsageError: A name in ``feedforward_modules`` matches no target.
        """
        inputs = set(select(self.feedforward_modules, targets, key="peft.feedforward_modules"))
        return {name: IA3Linear(base, inputs=name in inputs) for name, base in targets.items()}

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` without the base model's name."""
        adapted = {name: module for name, module in own_modules(model).items() if isinstance(module, IA3Linear)}
        target_names = list(adapted)
        feedforward_names = [name for name, module in adapted.items() if module.inputs]
        short_targets = short_names(model, target_names)
        short_feedforward = short_names(model, feedforward_names)
        if set(short_feedforward) <= set(short_targets):  # PEFT refuses one that is not also a target
            target_names = short_targets
            feedforward_names = short_feedforward
        return {
            "peft_type": "IA3",
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "target_modules": target_names,
            "feedforward_modules": feedforward_names,
            "modules_to_save": whole_modules(model) or None,
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IA3Config:
        """Settings of an adapter that PEFT wrote, with full module names."""
        targets: list[str] = []
        feedforward: list[str] = []
        in_full: dict[str, None] = {}  # modules saved in full, in order and once each
        for name, tensor in tensors.items():
            module, _, parameter = name.rpartition(".")
            if parameter != "ia3_l":
                in_full[module] = None
                continue
            targets.append(module)
            if tensor.shape[0] == 1:  # (1, in) for inputs, (out, 1) for outputs
                feedforward.append(module)
        settings = {
            "name": "ia3",
            "target_modules": targets,
            "feedforward_modules": feedforward,
            "modules_to_save": list(in_full),
        }
        return validate(settings, cls, name=CONFIG)

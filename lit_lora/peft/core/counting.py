"""The number of trainable parameters, in total and by module: the table printed before training."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from lit_lora.peft.core.modules import OwnModule
from lit_lora.quantize import QuantizedLinear, QuantizedStack, count_quantized

__all__ = ["MatchedRow", "ParameterCount", "count_parameters", "matched_table"]


@dataclass(frozen=True)
class MatchedRow:
    """Trainable modules of one shape, such as all ``q_proj``: one row of the table printed before training."""

    pattern: str
    """Their name with every number replaced by ``*``."""
    count: int
    """Number of modules."""
    shape: str
    """Shape of the adapted weight, and the rank if it has one."""
    trainable: int
    """Trainable parameters of all the modules together."""


@dataclass(frozen=True)
class ParameterCount:
    """Number of parameters, trainable and in total."""

    trainable: int
    """Parameters that require a gradient."""
    total: int
    """All parameters of the model, quantized ones included, shared ones counted once."""

    @property
    def share(self) -> float:
        """Trainable share, from 0 to 1."""
        return self.trainable / max(self.total, 1)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the trainable parameters and all parameters."""
    trainable, total = 0, count_quantized(model)  # codes are no parameters of the module
    for parameter in model.parameters():
        total += parameter.numel()
        if parameter.requires_grad:
            trainable += parameter.numel()
    return ParameterCount(trainable, total)


def matched_table(model: nn.Module) -> list[MatchedRow]:
    """The trainable modules, one row per kind of module, in the model's order."""
    counts: dict[tuple[str, str], list[int]] = {}  # pattern and shape -> trainable parameters of each module
    seen: set[int] = set()  # a shared parameter counts for the first module that has it
    for name, module in model.named_modules():
        trainable = 0
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                trainable += parameter.numel()
        if trainable:
            pattern = re.sub(r"\b\d+\b", "*", name)
            counts.setdefault((pattern, _shape(module)), []).append(trainable)

    return [
        MatchedRow(pattern, count=len(modules), shape=shape, trainable=sum(modules))
        for (pattern, shape), modules in counts.items()
    ]


def _shape(module: nn.Module) -> str:
    """``576×576, rank 8``: the shape of the weight, or an added module's own description."""
    if isinstance(module, OwnModule) and not module.wraps:
        return module.extra_repr()
    base = module.base_layer if isinstance(module, OwnModule) else module
    if isinstance(base, QuantizedLinear):  # first: reading its weight would dequantize it
        shape = f"{base.out_features}×{base.in_features} {base.quantized.config}"
    elif isinstance(weight := getattr(base, "weight", None), Tensor):
        shape = _times(weight)
    elif isinstance(module, OwnModule):  # of a module with several parameters
        shape = ", ".join(f"{name} {_times(getattr(base, name))}" for name in module.updates())
    else:
        shape = ""

    rank = getattr(module, "rank", None)
    return shape if rank is None else f"{shape}, rank {rank}"


def _times(weight: Tensor | QuantizedStack) -> str:
    shape = "×".join(str(size) for size in weight.shape)
    return shape if isinstance(weight, Tensor) else f"{shape} {weight.quantized.config}"

"""How many parameters train, in which modules: what is printed before training."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn

from lit_lora.peft.core.modules import OwnModule
from lit_lora.quantize import QuantizedLinear, count_quantized

__all__ = ["MatchedRow", "ParameterCount", "count_parameters", "matched_table"]


@dataclass(frozen=True)
class MatchedRow:
    """Modules of one shape that train, such as all ``q_proj``: one row of the table printed before training."""

    pattern: str
    """Their name with every number replaced by ``*``."""
    count: int
    """How many there are."""
    shape: str
    """The shape of the weight that is adapted, and the rank where there is one."""
    trainable: int
    """Trainable parameters of all of them together."""


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers train, of how many."""

    trainable: int
    """Numbers that require a gradient."""
    total: int
    """All numbers of the model, shared ones once."""

    @property
    def share(self) -> float:
        """Trainable share, 0 to 1."""
        return self.trainable / max(self.total, 1)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the numbers that train and all of them."""
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCount(trainable, sum(parameter.numel() for parameter in parameters) + count_quantized(model))


def matched_table(model: nn.Module) -> list[MatchedRow]:
    """What trains, one row per kind of module, in the model's order."""
    rows: dict[tuple[str, str], list[int]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(id(parameter) for parameter in own)
        if own:
            key = (re.sub(r"\b\d+\b", "*", name), _shape(module))
            rows.setdefault(key, []).append(sum(parameter.numel() for parameter in own))
    return [MatchedRow(pattern, len(counts), shape, sum(counts)) for (pattern, shape), counts in rows.items()]


def _shape(module: nn.Module) -> str:
    if isinstance(module, OwnModule) and not module.wraps:
        return module.extra_repr()
    base = module.base_layer if isinstance(module, OwnModule) else module
    if isinstance(base, QuantizedLinear):
        shape = f"{base.out_features}×{base.in_features} {base.quantized.config}"
    else:
        weight = getattr(base, "weight", None)
        shape = "×".join(str(size) for size in weight.shape) if isinstance(weight, Tensor) else ""
    rank = getattr(module, "rank", None)
    return f"{shape}, rank {rank}" if rank is not None else shape

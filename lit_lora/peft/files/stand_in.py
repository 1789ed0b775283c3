"""A model whose tensors stay where they are, such as in files: for adapters that are looked at and not run."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from lit_lora.peft.core.base_tensors import Base
from lit_lora.peft.core.modules import replace_module

__all__ = ["stand_in"]


class _StoredLinear(nn.Linear):
    """A linear layer of a base model that is not loaded: its weight is read each time it is asked for, never kept.

    Few methods ask: DoRA for the lengths of the rows, GLoRA for what the weight makes of a bias. Among the parameters
    is a stand-in of the same shape, for those that count or copy them.

    Args:
        base: The base's tensors.
        name: Of the layer.
        weight: (out, in), the stand-in.
        bias: (out,), the stand-in of a bias.
    """

    def __init__(self, base: Base, name: str, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self._stored, self._name = base, f"{name}.weight"
        self._parameters["weight"] = weight  # the property of that name is in the way of register_parameter
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, (out, in), as the base has it."""
        return self._stored[self._name]


def stand_in(model: nn.Module, base: Base) -> None:
    """Give a model, in place, parameters of the base's shapes that take no memory: one zero each, on the CPU.

    Args:
        model: Such as on the meta device.
        base: The base's tensors by name; none is read before the weight of a linear layer is asked for.
    """
    stand_ins: dict[int, nn.Parameter] = {}
    uses: Counter[int] = Counter()
    for name, module in model.named_modules():
        for last, parameter in list(module.named_parameters(recurse=False)):
            full = f"{name}.{last}" if name else last
            shape = base.shape(full) if full in base else tuple(parameter.shape)
            zero = torch.zeros(()).expand(shape)  # of any shape, and of four bytes
            shared = stand_ins.setdefault(id(parameter), nn.Parameter(zero, requires_grad=False))
            uses[id(shared)] += 1
            setattr(module, last, shared)
    for name, module in list(model.named_modules()):
        # A head that is tied to its embedding is known by their one parameter.
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear) and "weight" in parameters and uses[id(parameters["weight"])] == 1:
            replace_module(model, name, _StoredLinear(base, name, parameters["weight"], parameters.get("bias")))

"""A model whose tensors stay in their files: to check and merge adapters without loading the base."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from lit_lora.peft.core.base_tensors import Base
from lit_lora.peft.core.modules import replace_module

__all__ = ["stand_in"]


class _StoredLinear(nn.Linear):
    """A linear layer of a base model that is not loaded: every read of its weight reads the base's tensor anew.

    Few methods read it: DoRA for the lengths of its rows, GLoRA for its product with a change of the bias. A stand-in
    of the same shape is among the parameters, for code that counts or copies them.

    Args:
        base: The base's tensors.
        name: The layer's name.
        weight: (out, in), the stand-in.
        bias: (out,), the stand-in for a bias.
    """

    def __init__(self, base: Base, name: str, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self._base = base
        self._weight_name = f"{name}.weight"
        self._parameters["weight"] = weight  # register_parameter refuses a name that is a property
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, (out, in), read from the base."""
        return self._base[self._weight_name]


def stand_in(model: nn.Module, base: Base) -> None:
    """Replace a model's parameters, in place, by stand-ins with the base's shapes: one zero each, on the CPU.

    Args:
        model: May be on the meta device.
        base: The base's tensors by name; none is read until the weight of a linear layer is.
    """
    stand_ins: dict[int, nn.Parameter] = {}  # by the id of the original, so that tied parameters stay tied
    uses: Counter[int] = Counter()
    for module_name, module in model.named_modules():
        for parameter_name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            shape = base.shape(full_name) if full_name in base else tuple(parameter.shape)
            zero = torch.zeros(()).expand(shape)  # any shape in four bytes
            shared = stand_ins.setdefault(id(parameter), nn.Parameter(zero, requires_grad=False))
            uses[id(shared)] += 1
            setattr(module, parameter_name, shared)

    for module_name, module in list(model.named_modules()):
        parameters = dict(module.named_parameters(recurse=False))
        if not isinstance(module, nn.Linear) or "weight" not in parameters:
            continue
        # A head tied to its embedding stays a plain layer: it is recognized by the parameter that they share.
        if uses[id(parameters["weight"])] == 1:
            stored = _StoredLinear(base, module_name, parameters["weight"], parameters.get("bias"))
            replace_module(model, module_name, stored)

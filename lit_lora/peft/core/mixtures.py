"""The mixtures of experts in a model: stacked weights and routers, which are no linear layers and easily overlooked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.modules import OwnModule, model_updates, own_modules
from lit_lora.quantize import QuantizedStack, quantized_stacks

__all__ = ["Mixtures", "find_mixtures", "short_name", "trained_weights"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BASE = ".base_layer"


@dataclass(frozen=True)
class Mixtures:
    """The weights of a model's experts and routers, by their names without an adapter."""

    experts: dict[str, nn.Parameter | QuantizedStack]
    """Stacks of matrices, one matrix per expert."""
    routers: dict[str, nn.Parameter]
    """Weights with one row per expert."""

    def matching(self, pattern: str) -> list[str]:
        """The weights that a pattern matches by their own name or that of their module."""
        names = [*self.experts, *self.routers]
        return [name for name in names if matches(pattern, name) or matches(pattern, name.rpartition(".")[0])]


def short_name(parameter: str) -> str:
    """The last two parts of a parameter's name, as in ``target_parameters``: ``experts.down_proj``."""
    return ".".join(parameter.split(".")[-2:])


def find_mixtures(model: nn.Module) -> Mixtures:
    """The mixtures of experts of a model, with an adapter or without; both empty if it has none.

    Experts are a module with stacks of matrices, and their router is a module beside it with a row per expert.
    """
    experts: dict[str, nn.Parameter | QuantizedStack] = {}
    routers: dict[str, nn.Parameter] = {}
    if not any(_stacks(module) for module in model.modules()):  # most models; names take long in a large one
        return Mixtures(experts, routers)
    modules = dict(_base_modules(model))
    for name, module in modules.items():
        stacks = {f"{name}.{key}": stack for key, stack in _stacks(module).items()}
        if not stacks:
            continue
        experts |= stacks
        count = len(next(iter(stacks.values())))
        parent = name.rpartition(".")[0]
        for sibling, other in modules.items():
            if sibling.rpartition(".")[0] != parent or sibling == name or isinstance(other, nn.Linear):
                continue
            for key, parameter in other.named_parameters(recurse=False):
                if parameter.dim() == 2 and len(parameter) == count:
                    routers[f"{sibling}.{key}"] = parameter
    return Mixtures(experts, routers)


def trained_weights(model: nn.Module, mixtures: Mixtures) -> set[str]:
    """The names of the experts' and routers' weights that train, by an update or themselves."""
    weights = mixtures.experts | mixtures.routers
    updated = model_updates(model)
    trained = {name for name, weight in weights.items() if isinstance(weight, nn.Parameter) and weight.requires_grad}
    return trained | (weights.keys() & updated.keys())


def _stacks(module: nn.Module) -> dict[str, nn.Parameter | QuantizedStack]:
    """A module's parameters that are stacks of matrices, quantized or not."""
    if isinstance(module, _CONVOLUTIONS):
        return {}
    weights: dict[str, nn.Parameter | QuantizedStack] = dict(module.named_parameters(recurse=False))
    weights.update(quantized_stacks(module))
    return {name: weight for name, weight in weights.items() if len(weight.shape) == 3 and min(weight.shape) > 1}


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The base model's modules by their names without an adapter."""
    own = own_modules(model)
    for name, module in model.named_modules():
        of_method = any(name.startswith(f"{o}.") and not f"{name}.".startswith(f"{o}{_BASE}.") for o in own)
        if not isinstance(module, OwnModule) and not of_method:
            yield name.replace(_BASE, ""), module

"""The modules that a method puts into a model: their base class, and how they get in and out."""

from __future__ import annotations

import itertools
from abc import abstractmethod

import torch
from torch import Tensor, nn

from lit_lora.peft.core.updates import Rows, Update

__all__ = [
    "OwnModule",
    "device_of",
    "freeze",
    "model_updates",
    "own_modules",
    "remove",
    "replace_module",
    "trainable_state",
]


class OwnModule(nn.Module):
    """Base of the modules that a method puts in; all parameters outside its ``base_layer`` are the method's own.

    One without a ``base_layer`` wraps nothing: it stands in the module that it acts on, and has ``leave``.
    """

    base_layer: nn.Module
    owner: str = ""
    """Which method put it in, where several can be in one model."""

    @property
    def weight(self) -> Tensor:
        """The base layer's, for models that look at it for its dtype."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def wraps(self) -> bool:
        """Whether it stands in the place of a module, its ``base_layer``, rather than within one."""
        return "base_layer" in self._modules

    @abstractmethod
    def updates(self) -> dict[str, Update]:
        """What merging does to the parameters of ``base_layer``, by their names in it."""

    def file_tensors(self) -> dict[str, Tensor]:
        """Its parameters by the ends of their names in an adapter file, as views in the file's shapes."""
        return dict(self.named_parameters(recurse=False))

    def leave(self, host: nn.Module) -> None:
        """Take the module out of its host, where it wraps nothing."""
        raise NotImplementedError


def freeze(model: nn.Module) -> None:
    """Let no parameter require a gradient; gradients that are there are dropped."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name, detached; a shared one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def device_of(module: nn.Module) -> torch.device:
    """Where a module's tensors are."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()))
    return tensor.device


def own_modules(model: nn.Module) -> dict[str, OwnModule]:
    """The modules that a method put in, by the name that the module they wrap had before."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OwnModule)}


def model_updates(model: nn.Module) -> dict[str, Update]:
    """What the adapter in ``model`` does to the base tensors, by their names in the base model.

    Rows of tokens that a tied head shares with its embedding are one update under both names.
    """
    updates: dict[str, Update] = {}
    rows: dict[int, Rows] = {}
    for name, module in own_modules(model).items():
        for parameter, update in module.updates().items():
            if isinstance(update, Rows):
                update = rows.setdefault(update.values.data_ptr(), update)
            updates[f"{name}.{parameter}"] = update
    return updates


def remove(model: nn.Module) -> None:
    """Take the adapter out: every wrapped module goes back to its place, as it was."""
    for name, module in own_modules(model).items():
        if module.wraps:
            replace_module(model, name, module.base_layer)
        else:
            module.leave(model.get_submodule(name.rpartition(".")[0]))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one called ``name``, with the same training mode."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)

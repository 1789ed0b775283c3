"""The modules that a method puts into a model: their base class, and how they are inserted and removed."""

from __future__ import annotations

import itertools
from abc import abstractmethod

import torch
from torch import Tensor, nn

from lit_lora.peft.core.updates import Rows, Update

__all__ = [
    "OwnModule",
    "device_of",
    "embed_scale",
    "freeze",
    "model_updates",
    "not_wrappable",
    "own_modules",
    "remove",
    "replace_module",
    "trainable_state",
]


class OwnModule(nn.Module):
    """Base class of the modules that a method puts in; all parameters outside ``base_layer`` are the method's own.

    A module either takes the place of another, its ``base_layer``, or wraps nothing: then it is a child of the module
    it acts on and implements ``leave``.
    """

    base_layer: nn.Module
    owner: str = ""
    """Name of the method that put it in, where one model can contain several."""

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for models that read its dtype."""
        weight = self.base_layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def wraps(self) -> bool:
        """Whether it takes the place of a module, its ``base_layer``, instead of being a child of one."""
        return "base_layer" in self._modules

    @abstractmethod
    def updates(self) -> dict[str, Update]:
        """The changes that merging makes to the parameters of ``base_layer``, by their names in it."""

    def file_tensors(self) -> dict[str, Tensor]:
        """Its parameters as views in the shapes of an adapter file, by the last parts of their names in it."""
        return dict(self.named_parameters(recurse=False))

    def leave(self, host: nn.Module) -> None:
        """Remove the module from its host, in place; for a module that wraps nothing."""
        raise NotImplementedError


def freeze(model: nn.Module) -> None:
    """Let no parameter require a gradient, and drop gradients, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, detached; a shared one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's tensors; they are all on one."""
    tensor = next(itertools.chain(module.parameters(), module.buffers()))
    return tensor.device


def embed_scale(embedding: nn.Module) -> Tensor | float:
    """The factor by which an embedding, wrapped or not, multiplies the rows that it looks up; in most families 1."""
    while isinstance(embedding, OwnModule):
        embedding = embedding.base_layer
    scale: Tensor | float = getattr(embedding, "embed_scale", 1.0)
    return scale


def not_wrappable(model: nn.Module) -> frozenset[str]:
    """Names of the linear layers that a method leaves alone; see :class:`lit_lora.model.LanguageModel`.

    None in an encoder, which does not say.
    """
    names: frozenset[str] = getattr(model, "not_wrappable", frozenset())
    return names


def own_modules(model: nn.Module) -> dict[str, OwnModule]:
    """The modules that methods put in, by name, which is that of the module they wrap if they wrap one."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OwnModule)}


def model_updates(model: nn.Module) -> dict[str, Update]:
    """The changes that merging the adapter in ``model`` makes to base tensors, by their names in the base model.

    Token rows that a tied head shares with its embedding are one update object under both names.
    """
    updates: dict[str, Update] = {}
    row_updates: dict[int, Rows] = {}  # by the address of their values, which is how shared rows are recognized
    for name, module in own_modules(model).items():
        for parameter, update in module.updates().items():
            if isinstance(update, Rows):
                update = row_updates.setdefault(update.values.data_ptr(), update)
            updates[f"{name}.{parameter}"] = update
    return updates


def remove(model: nn.Module) -> None:
    """Remove the adapter in place: every wrapped module returns to its place, unchanged."""
    for name, module in own_modules(model).items():
        if module.wraps:
            replace_module(model, name, module.base_layer)
        else:
            module.leave(model.get_submodule(name.rpartition(".")[0]))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called ``name`` by ``module``, which gets its training mode, in place."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)

"""Modules that a method adds beside those of the base, which keep their places and names.

An added module becomes a child of the module it acts on, its host, and changes the host's inputs (``before``) or its
output (``after``) through PyTorch's forward hooks. So it can share a model with a low-rank update, it works on any tree
of ``nn.Module``, and removing it restores the base exactly.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.model import LanguageModel
from lit_lora.peft.core.adapter_method import OWN, AdapterMethod
from lit_lora.peft.core.method import Kind
from lit_lora.peft.core.modules import OwnModule, own_modules
from lit_lora.peft.core.updates import Update

__all__ = ["AddedMethod", "AddedModule", "blocks", "decoder_of", "own_state", "width_of"]


class AddedModule(OwnModule):
    """Base class of the added modules; all its parameters are the method's own, float32 and trainable."""

    child: ClassVar[str] = "adapter"
    """Its name in its host."""
    prefix_length = 0
    """How many positions it takes up before every document."""

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments to call the host with instead of ``args``."""

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The host's output instead of ``output``."""

    def updates(self) -> dict[str, Update]:
        """None: what it computes cannot be merged into a weight of the base."""
        return {}

    def join(self, host: nn.Module) -> None:
        """Become a child of ``host``, in place.

        Raises:
            UsageError: It already has a child of this name, or calls all of its children one after the other.
        """
        if isinstance(host, nn.Sequential):
            raise UsageError(
                "peft.target_modules: a sequence of layers cannot hold an adapter, as it would call it as one of them",
                hint="name its last layer instead",
            )
        if hasattr(host, self.child):
            raise UsageError(f"peft: the model already has a module named {self.child}", hint="load the base again")
        parameter = next(host.parameters(), None)
        if parameter is not None:
            self.to(parameter.device)
        self.train(host.training)
        host.add_module(self.child, self)
        if self.prefix_length:
            # The decoder subtracts it from the context that is left for documents.
            host.prefix_length = self.prefix_length  # type: ignore[assignment]

        # A hook costs time in every forward pass, so only overridden methods become hooks. PyTorch passes them the
        # host, so this module needs no reference to it, which would be a cycle in the module tree.
        self._hooks = []
        if type(self).before is not AddedModule.before:
            self._hooks.append(host.register_forward_pre_hook(self.before))
        if type(self).after is not AddedModule.after:
            self._hooks.append(host.register_forward_hook(self.after))

    def leave(self, host: nn.Module) -> None:
        """Remove it from its host, in place."""
        for hook in self._hooks:
            hook.remove()
        if self.prefix_length:
            host.prefix_length = 0  # type: ignore[assignment]
        delattr(host, self.child)


class AddedMethod(AdapterMethod):
    """Settings of a method that adds modules; ``apply`` puts them in.

    A method that PEFT lacks is saved as its settings and all its parameters, by their names in the model.
    """

    kind: ClassVar[Kind] = "added"
    as_written: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The method's name, which marks the modules it puts in."""
        return self.name

    def apply(self, model: nn.Module) -> None:
        """Put the method's modules in, in place, and mark them as its own."""
        modules_before = set(own_modules(model).values())
        self.add(model)
        for module in own_modules(model).values():
            if module not in modules_before:
                module.owner = self.label

    @abstractmethod
    def add(self, model: nn.Module) -> None:
        """Put the method's modules in, in place.

        Raises:
            UsageError: The settings do not fit this model.
        """

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` in our own format: the settings."""
        return {"peft_type": OWN + self.label.upper(), "settings": self.model_dump(mode="json")}

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The method's parameters by their names in the model."""
        return own_state(model, self.label)


def own_state(model: nn.Module, *owners: str) -> dict[str, Tensor]:
    """The parameters that some methods put in, or all methods, by name, trainable or not, detached."""
    prefixes = tuple(f"{name}." for name, module in own_modules(model).items() if not owners or module.owner in owners)
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        # What a module of a method wraps lies inside it, and is the base's.
        if name.startswith(prefixes) and ".base_layer." not in name
    }


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by name, in its order.

    A language model says which they are. In another model they are the entries of its longest ``nn.ModuleList``, or of
    several of the same length (encoder, decoder); lists within blocks do not count.

    Raises:
        UsageError: It has none.
    """
    if isinstance(model, LanguageModel):
        return model.blocks()

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise UsageError("peft: the model has no nn.ModuleList, which its layers are looked for in")
    inside = tuple(f"{name}." for name in lists)
    outermost = {name: entries for name, entries in lists.items() if not name.startswith(inside)}
    longest = max(len(entries) for entries in outermost.values())

    chosen: dict[str, nn.Module] = {}
    for name, entries in outermost.items():
        if len(entries) == longest:
            chosen |= {f"{name}.{index}": block for index, block in enumerate(entries)}
    return chosen


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module of a decoder that accepts a prefix before every document.

    Raises:
        UsageError: The model has none.
    """
    decoder = model.get_decoder() if isinstance(model, LanguageModel) else None
    if decoder is None or not hasattr(decoder, "prefix_length"):
        raise UsageError(
            "peft: this method puts tokens before every document, which the attention of this model does not accept",
            hint="lora, ia3 and bottleneck adapters work on every decoder",
        )
    names = {module: name for name, module in model.named_modules()}
    return names[decoder], decoder


def width_of(host: nn.Module) -> int:
    """Width of a module's output, taken from the last linear layer in it, else from its last parameter.

    A mixture of experts puts out what its router takes in.
    """
    weights = [parameter for child in host.children() for parameter in child.parameters(recurse=False)]
    routers = [weight for weight in weights if weight.ndim == 2]
    if routers and any(weight.ndim == 3 for weight in weights):
        return routers[0].shape[1]
    linears = [module for module in host.modules() if hasattr(module, "out_features")]
    if linears:
        return int(linears[-1].out_features)  # type: ignore[arg-type]
    return int(list(host.parameters())[-1].shape[0])

"""Modules that a method adds beside those of the base, which keep their places and names.

An added module becomes a child of the module it acts on, its host, and changes what goes into it (``before``) or what
comes out of it (``after``) by PyTorch's forward hooks. So it stands beside a low-rank update in the same model, on any
tree of ``nn.Module``, and taking it out leaves the base as it was.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from lit_lora.errors import UsageError
from lit_lora.model import LanguageModel
from lit_lora.peft.core.adapter_method import OWN, AdapterMethod
from lit_lora.peft.core.method import Kind
from lit_lora.peft.core.modules import OwnModule, own_modules
from lit_lora.peft.core.updates import Update

__all__ = ["AddedMethod", "AddedModule", "Attend", "blocks", "decoder_of", "own_state", "width_of"]


class Attend(Protocol):
    """What a decoder's attention layers are given; see :class:`lit_lora.model.attention.attend.Attend`."""

    prefix_length: int

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(T, N, H), (T, K, H), (T, K, H) -> (T, N, H)."""

    def rotate(self, x: Tensor) -> Tensor:
        """(T, heads, H) turned by the positions of its rows."""

    def with_prefix(self, prefix_length: int, *, rotated: bool = False) -> Attend:
        """The same, with ``prefix_length`` tokens before every document."""


class AddedModule(OwnModule):
    """Base of the added modules; every parameter in it is the method's own, float32, and trains."""

    child: ClassVar[str] = "adapter"
    """Its name in its host."""
    prefix_length = 0
    """How many positions it takes up before every document."""

    def before(self, host: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What the host is called with in the place of ``args``."""

    def after(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What the host gives in the place of ``output``."""

    def updates(self) -> dict[str, Update]:
        """None: what it computes cannot be put into a weight of the base."""
        return {}

    def join(self, host: nn.Module) -> None:
        """Become a part of ``host``, in place.

        Raises:
            UsageError: It has such a part already.
        """
        if hasattr(host, self.child):
            raise UsageError(f"peft: the model has a part called {self.child} already", hint="load the base again")
        parameter = next(host.parameters(), None)
        if parameter is not None:
            self.to(parameter.device)
        self.train(host.training)
        host.add_module(self.child, self)
        if self.prefix_length:
            host.prefix_length = self.prefix_length  # type: ignore[assignment]
        self._hooks = []
        if type(self).before is not AddedModule.before:
            self._hooks.append(host.register_forward_pre_hook(self.before))
        if type(self).after is not AddedModule.after:
            self._hooks.append(host.register_forward_hook(self.after))

    def leave(self, host: nn.Module) -> None:
        """Take it out of its host, in place."""
        for hook in self._hooks:
            hook.remove()
        if self.prefix_length:
            host.prefix_length = 0  # type: ignore[assignment]
        delattr(host, self.child)


class AddedMethod(AdapterMethod):
    """Settings of a method that adds modules; ``apply`` puts them in.

    One that PEFT does not have is saved as its settings and every own parameter by its name in the model.
    """

    kind: ClassVar[Kind] = "added"
    as_written: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The method's name, which marks the modules that it puts in."""
        return self.name

    def apply(self, model: nn.Module) -> None:
        """Put the method's modules in, in place, and mark them as its own."""
        before = set(own_modules(model).values())
        self.add(model)
        for module in own_modules(model).values():
            if module not in before:
                module.owner = self.label

    @abstractmethod
    def add(self, model: nn.Module) -> None:
        """Put the method's modules in, in place.

        Raises:
            UsageError: The settings do not fit this model.
        """

    def peft_config(self, model: nn.Module) -> dict[str, Any]:
        """``adapter_config.json`` in a form of ours: the settings."""
        return {"peft_type": OWN + self.label.upper(), "settings": self.model_dump(mode="json")}

    def file_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The method's parameters by their names in the model."""
        return own_state(model, self.label)


def own_state(model: nn.Module, *owners: str) -> dict[str, Tensor]:
    """The parameters of some methods by name, or of all, trained or not, detached."""
    own = [name for name, module in own_modules(model).items() if not owners or module.owner in owners]
    names = tuple(f"{name}." for name in own)
    inside = {n: p.detach() for n, p in model.named_parameters() if n.startswith(names)}
    return {name: value for name, value in inside.items() if ".base_layer." not in name}


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks of a model by name: what it says, or the entries of its longest list of modules.

    There may be several such lists (encoder, decoder); lists within the blocks of another are parts of these blocks.

    Raises:
        UsageError: It has none.
    """
    if isinstance(model, LanguageModel):
        return model.blocks()
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    lists = {name: entries for name, entries in lists.items() if not name.startswith(tuple(f"{n}." for n in lists))}
    if not lists:
        raise UsageError("peft: the model has no list of layers")
    longest = max(map(len, lists.values()))
    return {
        f"{name}.{index}": block
        for name, entries in lists.items()
        if len(entries) == longest
        for index, block in enumerate(entries)
    }


def decoder_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a decoder that can let tokens stand before every document.

    Raises:
        UsageError: There is none.
    """
    decoder = model.get_decoder() if isinstance(model, LanguageModel) else None
    if decoder is not None and hasattr(decoder, "prefix_length"):
        return next((name, module) for name, module in model.named_modules() if module is decoder)
    raise UsageError("peft: this method needs a decoder of this package, whose attention takes what stands before")


def width_of(host: nn.Module) -> int:
    """Width of a module's output: that of the last layer in it."""
    widths = [width for width in (getattr(module, "out_features", None) for module in host.modules()) if width]
    return int(widths[-1]) if widths else int(list(host.parameters())[-1].shape[0])

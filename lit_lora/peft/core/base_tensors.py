"""The tensors of the base model by the names they have without an adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lit_lora.peft.core.modules import OwnModule
from lit_lora.quantize import QuantizedLinear, QuantizedStack

__all__ = ["Base", "BaseTensors", "base_tensors"]


class Base(Mapping[str, Tensor]):
    """A base model's tensors by name; reading one may cost time and memory."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name, without reading it as ``Mapping`` would."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized, so that its values differ from those of the original model."""


class BaseTensors(Base):
    """The parameters of the base model under the names they have without an adapter; tied ones under each name.

    A quantized weight is dequantized anew on each read.

    Args:
        model: With or without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stored = dict(_base_tensors(model, ""))

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        return stored if isinstance(stored, Tensor) else stored.dequantize()

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def stored(self) -> Iterator[tuple[str, Tensor | QuantizedLinear | QuantizedStack]]:
        """Each name with its tensor as the model stores it; for a quantized weight, its module instead."""
        yield from self._stored.items()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without dequantizing it."""
        stored = self._stored[name]
        if isinstance(stored, QuantizedLinear):
            return stored.out_features, stored.in_features
        return tuple(stored.shape)

    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized."""
        return not isinstance(self._stored[name], Tensor)


def base_tensors(model: nn.Module) -> BaseTensors:
    """The parameters of the base model; see :class:`BaseTensors`."""
    return BaseTensors(model)


def _base_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor | QuantizedLinear | QuantizedStack]]:
    # A method's module has no name of its own in the base: what it wraps takes its place, or nothing does.
    if isinstance(module, OwnModule):
        if module.wraps:
            yield from _base_tensors(module.base_layer, prefix)
        return
    if isinstance(module, QuantizedStack):
        yield prefix.removesuffix("."), module
    if isinstance(module, QuantizedLinear):
        yield f"{prefix}weight", module
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter.detach()
    for name, child in module.named_children():
        yield from _base_tensors(child, f"{prefix}{name}.")

"""The tensors of the base model by the names they have without an adapter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lit_lora.peft.core.modules import OwnModule
from lit_lora.quantize import QuantizedLinear

__all__ = ["Base", "BaseTensors", "base_tensors"]


class Base(Mapping[str, Tensor]):
    """A base model's tensors by name; reading one may cost time and memory."""

    @abstractmethod
    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of this name, at no cost: a mapping's own would read it."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, at no cost."""

    @abstractmethod
    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantised, so that its values are not those of the original model."""


class BaseTensors(Base):
    """The parameters of the base model under the names they have without an adapter; tied ones under every name.

    A quantised weight is dequantised each time it is read, and never kept.

    Args:
        model: With or without an adapter.
    """

    def __init__(self, model: nn.Module) -> None:
        self._there = dict(_base_tensors(model, ""))

    def __getitem__(self, name: str) -> Tensor:
        found = self._there[name]
        return found.dequantize() if isinstance(found, QuantizedLinear) else found

    def __contains__(self, name: object) -> bool:
        return name in self._there

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)

    def stored(self) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
        """Name and values of each as the model holds them: in the place of a quantised weight, its layer."""
        yield from self._there.items()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, at no cost."""
        found = self._there[name]
        return (found.out_features, found.in_features) if isinstance(found, QuantizedLinear) else tuple(found.shape)

    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantised."""
        return isinstance(self._there[name], QuantizedLinear)


def base_tensors(model: nn.Module) -> BaseTensors:
    """The parameters of the base model; see :class:`BaseTensors`."""
    return BaseTensors(model)


def _base_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor | QuantizedLinear]]:
    if isinstance(module, OwnModule):
        if module.wraps:
            yield from _base_tensors(module.base_layer, prefix)
        return
    if isinstance(module, QuantizedLinear):
        yield f"{prefix}weight", module
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter.detach()
    for name, child in module.named_children():
        yield from _base_tensors(child, f"{prefix}{name}.")

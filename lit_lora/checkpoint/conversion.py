"""Some tensors of a checkpoint and the parameters that they are, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Conversion"]


@dataclass(frozen=True)
class Conversion:
    """Some tensors of the files, and the parameters that they become together."""

    stored: tuple[str, ...]
    """Names of the tensors."""
    parameters: tuple[str, ...]
    """Names of the parameters."""
    transposed: bool = False
    """The one parameter is the one tensor with rows and columns swapped."""
    converter: Any = None
    """transformers' ``WeightConverter``; ``None`` where a tensor only has another name."""
    patterns: tuple[str, ...] = ()
    """For the converter: which of its patterns each tensor matches."""
    converter_names: tuple[str, ...] = ()
    """For the converter: the tensors by the names that it knows them by."""

    @property
    def as_stored(self) -> bool:
        """Whether the parameter is the tensor, perhaps under another name."""
        return self.converter is None and not self.transposed

    def to_model(self, tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The parameters by name, made of all ``stored`` tensors."""
        if self.converter is None:
            return {self.parameters[0]: self._turned(tensors[self.stored[0]])}
        converter = deepcopy(self.converter)
        for stored, pattern in zip(self.stored, self.patterns, strict=True):
            converter.add_tensor(self.parameters[0], stored, pattern, tensors[stored])
        return _converted(converter, self.parameters[0], model)

    def to_files(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """The stored tensors by name, made of all ``parameters``: the reverse of :meth:`to_model`, without rounding."""
        if self.converter is None:
            return {self.stored[0]: self._turned(parameters[self.parameters[0]])}
        converter = deepcopy(self.converter).reverse_transform()
        first = ""
        for parameter in self.parameters:
            renamed, pattern = converter.rename_source_key(parameter)
            first = first or renamed
            converter.add_tensor(renamed, parameter, pattern, parameters[parameter])
        tensors = _converted(converter, first, model)
        stored_names = dict(zip(self.converter_names, self.stored, strict=True))
        return {stored_names[name]: tensor for name, tensor in tensors.items()}

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.T.contiguous() if self.transposed else tensor


def _converted(converter: Any, first: str, model: nn.Module) -> dict[str, Tensor]:
    made = converter.convert(first, model=model, config=model.config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

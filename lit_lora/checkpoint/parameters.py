"""A model's parameters in the tensors of its checkpoint, where names and shapes may be others.

Mostly each tensor is a parameter of the same name. But files of a mixture of experts hold one matrix per expert, where
the model has one stack; a composite checkpoint holds the text model under a prefix, beside towers for images or sound;
and old files have old names. transformers lists such differences for each type. They are followed here one parameter at
a time and in both directions, so that a model is never in memory twice, and a checkpoint is written as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_lora.checkpoint.conversion import Conversion
from lit_lora.checkpoint.quantized import StoredTensors
from lit_lora.errors import InputError
from lit_lora.model import CausalLM
from lit_lora.quantize import QuantizeConfig, Quantized

__all__ = ["StoredParameters"]


class StoredParameters:
    """The parameters of a model as its checkpoint has them, by the model's names.

    Persistent buffers count as parameters. A parameter that is stored quantized counts as one tensor.

    Args:
        folder: A Hugging Face folder.
        model: The model, which may be on the meta device; its values are not used.
        files: The tensors of the folder; opened if omitted.

    Raises:
        InputError: Files are missing or broken, or tensors that belong together do not fit together.
    """

    def __init__(self, folder: Path, model: nn.Module, files: StoredTensors | None = None) -> None:
        self._folder = folder
        self.files = files or StoredTensors(folder)
        self._network: nn.Module = getattr(model, "net", model)  # a hosted model is one of transformers
        shapes = {name: self.files.shape(name) for name in self.files.names()}
        self.conversions, self._unexpected = _find_conversions(shapes, model, self._network)
        """In the order of the files."""
        self._conversion_of = {name: part for part in self.conversions for name in part.parameters}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for part in self.conversions:
            self._shapes |= self._converted_shapes(part, shapes)

    def names(self) -> list[str]:
        """The parameters that the files have, and the tensors that lie among them without being a parameter."""
        return [*self._conversion_of, *self._unexpected]

    def conversion(self, name: str) -> Conversion:
        """How a parameter is stored; of one that the files lack, how it would be beside the others."""
        if name in self._conversion_of:
            return self._conversion_of[name]
        # The head of a model that was tied: where the name of another parameter has been put behind a prefix, so is
        # its own.
        parameter, first = next(iter(self._conversion_of.items()))
        stored = first.stored[0]
        prefix = stored.removesuffix(parameter) if stored.endswith(f".{parameter}") else ""
        return Conversion((prefix + name,), (name,))

    def others(self) -> list[str]:
        """Stored tensors that become no parameter, such as those of a tower for images."""
        used = {name for part in self.conversions for name in part.stored}
        return [name for name in self.files.names() if name not in used]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter; of a quantized one, its shape before quantization."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a parameter is stored; of a quantized one, its dtype before quantization."""
        return self.files.dtype(self._conversion_of[name].stored[0])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Its values: pages of the file, mapped on use, if it is stored as it is; otherwise a copy.

        Raises:
            InputError: It is stored quantized, and damaged.
        """
        conversion = self._conversion_of[name]
        if conversion.as_stored:
            return self.files.read(conversion.stored[0], dtype)
        tensors = {}
        for stored in conversion.stored:
            tensor = self.files.read_once(stored)
            tensors[stored] = tensor if dtype is None else tensor.to(dtype)
            del tensor  # its pages go before the next one is read
        return conversion.to_model(tensors, self._network)[name]

    def read_once(self, name: str) -> Tensor:
        """The values of a parameter that is dropped soon: see :meth:`TensorReader.read_once`."""
        conversion = self._conversion_of[name]
        return self.files.read_once(conversion.stored[0]) if conversion.as_stored else self.read(name)

    def quantized(self, name: str) -> bool:
        """Whether a parameter can be had quantized, as it is stored."""
        conversion = self._conversion_of.get(name)
        return conversion is not None and conversion.as_stored and self.files.quantized(conversion.stored[0])

    def configs(self) -> list[QuantizeConfig]:
        """Every way in which a tensor is quantized, once."""
        return self.files.configs()

    def packed(self, name: str) -> Quantized:
        """A quantized parameter; its codes are pages of the file.

        Raises:
            InputError: It is damaged, or quantized in an unsupported way.
        """
        return self.files.packed(self._conversion_of[name].stored[0])

    def to_files(self, conversion: Conversion, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The stored tensors of one of ``conversions`` with the values of these ``parameters``."""
        return conversion.to_files(parameters, self._network)

    def _converted_shapes(
        self, conversion: Conversion, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters of ``conversion``, found without any values."""
        if conversion.converter is None:
            shape = shapes[conversion.stored[0]]
            return {conversion.parameters[0]: shape[::-1] if conversion.transposed else shape}
        empty = {name: torch.empty(shapes[name], device="meta") for name in conversion.stored}
        try:
            made = conversion.to_model(empty, self._network)
        except (RuntimeError, ValueError) as error:
            first, last = conversion.stored[0], conversion.stored[-1]
            raise InputError(
                f"{self._folder}: the {len(conversion.stored)} tensors from {first} to {last} do not make up "
                f"{conversion.parameters[0]}: one is missing or has another shape"
            ) from error
        return {name: tuple(tensor.shape) for name, tensor in made.items()}


def _find_conversions(
    shapes: Mapping[str, tuple[int, ...]], model: nn.Module, network: nn.Module
) -> tuple[list[Conversion], list[str]]:
    """See :func:`lit_lora.checkpoint.mapping.find_conversions`."""
    own_names = {name for name, _ in model.named_parameters()}
    if isinstance(model, CausalLM) and own_names <= shapes.keys() <= model.state_dict().keys():
        return [Conversion((name,), (name,)) for name in shapes], []  # nothing to ask transformers

    from lit_lora.checkpoint.mapping import find_conversions  # noqa: PLC0415 - imports transformers, which takes seconds

    return find_conversions(shapes, model, network)

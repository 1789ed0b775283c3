"""Quantized weights in a Hugging Face folder, as transformers with bitsandbytes writes and reads them.

4 bits: ``weight`` holds the codes, ``weight.absmax`` the scales, and ``weight.quant_state.bitsandbytes__nf4`` the rest
as JSON in bytes. int8: ``weight`` holds the codes, ``SCB`` the scales. ``config.json`` says so in
``quantization_config``. What bitsandbytes does not have (nf3, nf2, groups of int4, several types in one model) is laid
out the same way under a ``quant_method`` of our own, which transformers refuses by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora.checkpoint.headers import Headers
from lit_lora.checkpoint.scaled import without_scales
from lit_lora.checkpoint.tensors import TensorReader, open_tensors
from lit_lora.config import validate
from lit_lora.errors import InputError, UsageError
from lit_lora.quantize import Blocks, Groups, Int8, QuantizeConfig, Quantized, quantize
from lit_lora.quantize.codes import DYNAMIC, table
from lit_lora.quantize.weights import NESTED, TYPES

__all__ = ["StoredTensors", "packed_bytes", "packed_tensors", "quantization_config"]

_STATE = ".weight.quant_state."
# The types that bitsandbytes has too.
_BITSANDBYTES = ("nf4", "fp4", "int8")
# What may stand beside a weight of less than 8 bits, as `weight.PART`.
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "scale", "zero")


def quantization_config(configs: Iterable[QuantizeConfig], dtype: torch.dtype, *, head: str) -> dict[str, Any]:
    """The ``quantization_config`` of a ``config.json``; in transformers' terms if it can read the weights.

    Args:
        configs: How the layers are quantized; at least one.
        dtype: Dtype to compute in.
        head: Name of the head, which is not quantized.
    """
    different = list(dict.fromkeys(configs))
    config = different[0]
    if len(different) > 1 or config.name not in _BITSANDBYTES:
        return {"quant_method": "lit_lora", "types": sorted(map(str, different))}
    is_int8 = config.name == "int8"
    common = {"quant_method": "bitsandbytes", "load_in_4bit": not is_int8, "load_in_8bit": is_int8}
    if is_int8:
        return {**common, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": [head]}
    return {
        **common,
        "bnb_4bit_quant_type": config.name,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [head],
    }


def packed_tensors(module: str, quantized: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that store a quantized weight, by their names in a file.

    Args:
        module: Name of the linear layer.
        quantized: Its weight.
        dtype: Dtype before quantization.
    """
    if isinstance(quantized, Int8):
        weight_format = torch.tensor(0, dtype=torch.uint8)  # bitsandbytes' code for rows in plain order
        return {
            f"{module}.weight": quantized.codes,
            f"{module}.SCB": quantized.absmax,
            f"{module}.weight_format": weight_format,
        }

    config = quantized.config
    state: dict[str, Any] = {
        "quant_type": config.name,
        "blocksize": config.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    if isinstance(quantized, Groups):
        tensors = {"": quantized.codes, ".scale": quantized.scale, ".zero": quantized.zero}
    else:
        assert isinstance(quantized, Blocks)
        values = table(config.name, torch.device("cpu")).values
        tensors = {"": quantized.codes, ".absmax": quantized.absmax, ".quant_map": values}
        if quantized.nested_absmax is not None and quantized.offset is not None:
            tensors |= {".nested_absmax": quantized.nested_absmax, ".nested_quant_map": DYNAMIC}
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32"}
            state["nested_offset"] = 0.0 if quantized.offset.is_meta else quantized.offset.item()
    owner = "bitsandbytes" if config.name in _BITSANDBYTES else "lit_lora"
    state_bytes = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f".quant_state.{owner}__{config.name}"] = state_bytes
    return {f"{module}.weight{end}": tensor for end, tensor in tensors.items()}


def packed_bytes(module: str, shape: tuple[int, ...], config: QuantizeConfig) -> int:
    """Bytes of the tensors that :func:`packed_tensors` makes of a matrix (out, in)."""
    empty = quantize(torch.empty(shape, device="meta"), config, name=f"{module}.weight")
    tensors = packed_tensors(module, empty, torch.bfloat16).values()
    return sum(tensor.nbytes for tensor in tensors)


class StoredTensors:
    """The tensors of a Hugging Face folder as the model has them: a quantized weight counts as one tensor.

    Args:
        folder: The folder.
        reader: Its tensors as stored; opened if omitted.

    Raises:
        InputError: Files are missing or broken.
    """

    def __init__(self, folder: Path, reader: TensorReader | Headers | None = None) -> None:
        self._reader = without_scales(reader or open_tensors(folder), folder)
        self._where = str(folder)
        names = self._reader.names()

        # Quantized modules: of less than 8 bits with the name of their quant_state, and of int8.
        self._states = {name.partition(_STATE)[0]: name for name in names if _STATE in name}
        self._int8 = dict.fromkeys(name.removesuffix(".SCB") for name in names if name.endswith(".SCB"))
        self._packed = {f"{module}.weight": module for module in [*self._states, *self._int8]}

        # All tensors beside the codes, which have the name of the weight.
        parts: set[str] = set()
        for module, state in self._states.items():
            parts.add(state)
            parts.update(f"{module}.weight.{part}" for part in _PARTS)
        for module in self._int8:
            parts.update((f"{module}.SCB", f"{module}.weight_format"))
        self._names = [name for name in names if name not in parts]
        self._stored = set(names)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; of a quantized one, its shape before quantization.

        Raises:
            InputError: It is quantized, and the description of it is damaged.
        """
        module = self._packed.get(name)
        if module is None or module in self._int8:
            return self._reader.shape(name)
        shape = self._state(module).get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(size, int) for size in shape):
            raise self._unreadable(module, f"shape {shape}, expected two numbers")
        return shape[0], shape[1]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; of a quantized one, its dtype before quantization."""
        module = self._packed.get(name)
        if module is None:
            return self._reader.dtype(name)
        if module in self._int8:  # int8 does not store it
            return torch.bfloat16
        dtypes = {"float32": torch.float32, "float16": torch.float16}
        return dtypes.get(str(self._state(module).get("dtype")), torch.bfloat16)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Its values: pages of the file, mapped on use, or a copy; a quantized tensor is dequantized.

        Raises:
            InputError: As :meth:`packed`.
        """
        if self.quantized(name):
            return self.packed(name).dequantize(dtype or self.dtype(name))
        return self._reader.read(name, dtype)

    def read_once(self, name: str) -> Tensor:
        """The values of a tensor that is dropped soon: see :meth:`TensorReader.read_once`.

        Raises:
            InputError: As :meth:`packed`.
        """
        return self.read(name) if self.quantized(name) else self._reader.read_once(name)

    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantized."""
        return name in self._packed

    def configs(self) -> list[QuantizeConfig]:
        """Every way in which a tensor is quantized, once."""
        return list(dict.fromkeys(map(self._config, self._packed.values())))

    def packed(self, name: str) -> Quantized:
        """A quantized tensor; its codes are pages of the file.

        Raises:
            InputError: It is damaged, or quantized in an unsupported way.
        """
        module = self._packed[name]
        rows, columns = self.shape(name)
        config = self._config(module)
        kind = TYPES[config.name]
        if kind is Int8:
            tensors = [self._tensor(name), self._tensor(f"{module}.SCB").reshape(-1)]
        elif kind is Groups:
            tensors = [self._tensor(name), self._tensor(f"{name}.scale"), self._tensor(f"{name}.zero")]
        else:
            tensors = self._block_tensors(name, config)
        # What a matrix of this shape consists of, to compare with.
        empty = kind.empty(config, (rows, columns), torch.device("meta"))
        self._check_parts(module, tensors, list(empty.buffers()))
        return kind(config, (rows, columns), *tensors)

    def _block_tensors(self, name: str, config: QuantizeConfig) -> list[Tensor]:
        """The tensors of a :class:`Blocks`, in its order."""
        module = self._packed[name]
        state = self._state(module)
        if state.get("nested_blocksize", NESTED) != NESTED:
            raise self._unreadable(module, f"nested_blocksize {state['nested_blocksize']}, expected {NESTED}")
        self._check_values(f"{name}.quant_map", table(config.name, torch.device("cpu")).values)
        # bitsandbytes can store the bytes of the codes under another dtype, such as bfloat16.
        codes = self._tensor(name).contiguous().view(torch.uint8).view(-1, 1)
        tensors = [codes, self._tensor(f"{name}.absmax")]
        if config.double_quant:
            self._check_values(f"{name}.nested_quant_map", DYNAMIC)
            tensors += [self._tensor(f"{name}.nested_absmax"), torch.tensor(float(state.get("nested_offset", 0.0)))]
        return tensors

    def _state(self, module: str) -> dict[str, Any]:
        try:
            state = json.loads(bytes(self._tensor(self._states[module]).tolist()))
        except (ValueError, TypeError) as error:
            raise self._unreadable(module, f"its quant_state is not JSON: {error}") from error
        if not isinstance(state, dict):
            raise self._unreadable(module, f"its quant_state is a {type(state).__name__}, expected an object")
        return state

    def _config(self, module: str) -> QuantizeConfig:
        if module in self._int8:
            return QuantizeConfig(name="int8")
        state = self._state(module)
        settings = {
            "name": state.get("quant_type"),
            "block_size": state.get("blocksize"),
        }
        if TYPES.get(str(settings["name"])) is Blocks:
            settings["double_quant"] = "nested_blocksize" in state
        try:
            return validate(settings, QuantizeConfig, name=f"{self._where}: {module}.weight")
        except UsageError as error:  # in a file it is not the user's setting that is wrong
            raise InputError(str(error)) from error

    def _tensor(self, name: str) -> Tensor:
        if name not in self._stored:
            raise InputError(f"{self._where}: tensor {name} is missing")
        return self._reader.read(name)

    def _check_values(self, name: str, expected: Tensor) -> None:
        """Make sure that the stored values of the codes are those of their type, which are the ones we decode with."""
        values = self._tensor(name).float().reshape(-1)
        if values.shape != expected.shape or not torch.allclose(values, expected, rtol=0, atol=1e-6):
            raise InputError(f"{self._where}: {name} does not hold the standard values of its type: not supported")

    def _check_parts(self, module: str, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        for tensor, wanted in zip(tensors, expected, strict=True):
            if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
                raise self._unreadable(module, f"a tensor of {_described(tensor)}, expected {_described(wanted)}")

    def _unreadable(self, module: str, problem: str) -> InputError:
        return InputError(f"{self._where}: the quantized {module}.weight cannot be read: {problem}")


def _described(tensor: Tensor) -> str:
    """Shape and dtype of a tensor, for a message."""
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

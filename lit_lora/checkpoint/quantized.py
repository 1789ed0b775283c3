"""Quantised weights in a Hugging Face folder, as transformers with bitsandbytes writes and reads them.

4 bits: ``weight`` holds the codes, ``weight.absmax`` the scales, and ``weight.quant_state.bitsandbytes__nf4`` the rest
as JSON in bytes. int8: ``weight`` holds the codes, ``SCB`` the scales. ``config.json`` says so in
``quantization_config``. What bitsandbytes does not have (nf3, nf2, groups of int4, several types in one model) lies in
the same way under names of ours, which transformers refuses by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora.checkpoint.tensors import open_tensors
from lit_lora.config import validate
from lit_lora.errors import InputError, UsageError
from lit_lora.quantize import Blocks, Groups, Int8, QuantizeConfig, Quantized, quantize
from lit_lora.quantize.codes import DYNAMIC, table
from lit_lora.quantize.weights import TYPES

__all__ = ["StoredTensors", "packed_sizes", "packed_tensors", "quantization_config"]

_STATE = ".weight.quant_state."
_THEIRS = ("nf4", "fp4", "int8")
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "scale", "zero")


def quantization_config(configs: Iterable[QuantizeConfig], dtype: torch.dtype, *, head: str) -> dict[str, Any]:
    """What ``config.json`` says, by transformers' names where it can read the weights.

    Args:
        configs: How the layers are quantised.
        dtype: To compute in.
        head: Name of the head, which is not quantised.
    """
    found = list(dict.fromkeys(configs))
    config, eight = found[0], found[0].name == "int8"
    if len(found) > 1 or config.name not in _THEIRS:
        return {"quant_method": "lit_lora", "types": sorted(map(str, found))}
    common = {"quant_method": "bitsandbytes", "load_in_4bit": not eight, "load_in_8bit": eight}
    if eight:
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
    """The tensors of a quantised weight by the names that they have in a file.

    Args:
        module: Name of the linear layer.
        quantized: Its weight.
        dtype: In which it was before.
    """
    if isinstance(quantized, Int8):
        form = torch.tensor(0, dtype=torch.uint8)  # row by row
        return {f"{module}.weight": quantized.codes, f"{module}.SCB": quantized.absmax, f"{module}.weight_format": form}
    config = quantized.config
    state: dict[str, Any] = {"quant_type": config.name, "blocksize": config.block_size}
    state |= {"dtype": str(dtype).removeprefix("torch."), "shape": list(quantized.shape)}
    if isinstance(quantized, Groups):
        tensors = {"": quantized.codes, ".scale": quantized.scale, ".zero": quantized.zero}
    else:
        assert isinstance(quantized, Blocks)
        values = table(config.name, torch.device("cpu")).values
        tensors = {"": quantized.codes, ".absmax": quantized.absmax, ".quant_map": values}
        if quantized.nested_absmax is not None and quantized.offset is not None:
            tensors |= {".nested_absmax": quantized.nested_absmax, ".nested_quant_map": DYNAMIC}
            state |= {"nested_blocksize": 256, "nested_dtype": "float32"}
            state["nested_offset"] = 0.0 if quantized.offset.is_meta else quantized.offset.item()
    whose = "bitsandbytes" if config.name in _THEIRS else "lit_lora"
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f".quant_state.{whose}__{config.name}"] = text
    return {f"{module}.weight{end}": tensor for end, tensor in tensors.items()}


def packed_sizes(module: str, shape: tuple[int, ...], config: QuantizeConfig) -> int:
    """Bytes of :func:`packed_tensors` of a matrix."""
    empty = quantize(torch.empty(shape, device="meta"), config, name=f"{module}.weight")
    tensors = packed_tensors(module, empty, torch.bfloat16).values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StoredTensors:
    """The tensors of a Hugging Face folder as the model has them: what is stored quantised counts as one tensor.

    Args:
        folder: The folder.

    Raises:
        InputError: Files are missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self._reader, self._where = open_tensors(folder), str(folder)
        names = self._reader.names()
        self._states = {name.partition(_STATE)[0]: name for name in names if _STATE in name}
        self._rows = dict.fromkeys(name.removesuffix(".SCB") for name in names if name.endswith(".SCB"))
        modules = [*self._states, *self._rows]
        self._packed = {f"{module}.weight": module for module in modules}
        parts = {f"{module}.weight.{part}" for module in self._states for part in _PARTS} | set(self._states.values())
        parts |= {f"{module}{end}" for module in self._rows for end in (".SCB", ".weight_format")}
        self._names = [name for name in names if name not in parts]
        self._stored = set(names)

    def names(self) -> list[str]:
        """Names of all tensors."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, of a quantised one as it was before.

        Raises:
            InputError: It is quantised, and what describes it is damaged.
        """
        module = self._packed.get(name)
        if module is None or module in self._rows:
            return self._reader.shape(name)
        shape = self._state(module).get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(size, int) for size in shape):
            raise self._wrong(module, f"shape {shape}, expected two numbers")
        return shape[0], shape[1]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, of a quantised one as it was before."""
        module = self._packed.get(name)
        if module is None:
            return self._reader.dtype(name)
        before = str(self._state(module).get("dtype")) if module in self._states else "bfloat16"
        return {"float32": torch.float32, "float16": torch.float16}.get(before, torch.bfloat16)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Its values: pages of the file, mapped on use, or a copy; a quantised tensor dequantised.

        Raises:
            InputError: As :meth:`packed`.
        """
        if self.quantized(name):
            return self.packed(name).dequantize(dtype or self.dtype(name))
        return self._reader.read(name, dtype)

    def read_once(self, name: str) -> Tensor:
        """The values of a tensor that is soon dropped: see :meth:`TensorReader.read_once`.

        Raises:
            InputError: As :meth:`packed`.
        """
        return self.read(name) if self.quantized(name) else self._reader.read_once(name)

    def quantized(self, name: str) -> bool:
        """Whether a tensor is stored quantised."""
        return name in self._packed

    def configs(self) -> list[QuantizeConfig]:
        """How tensors are quantised, each way once."""
        return list(dict.fromkeys(map(self._config, self._packed.values())))

    def packed(self, name: str) -> Quantized:
        """A quantised tensor; its codes are pages of the file.

        Raises:
            InputError: It is damaged, or quantised in a way that is not known here.
        """
        module, shape = self._packed[name], self.shape(name)
        config, meta = self._config(module), torch.device("meta")
        if module in self._rows:
            tensors = [self._tensor(name), self._tensor(f"{module}.SCB").reshape(-1)]
            self._fits(module, Int8.empty(config, (shape[0], shape[1]), meta), tensors)
            return Int8(config, (shape[0], shape[1]), *tensors)
        if TYPES[config.name] is Groups:
            tensors = [self._tensor(name), *(self._tensor(f"{name}.{part}") for part in ("scale", "zero"))]
            self._fits(module, Groups.empty(config, (shape[0], shape[1]), meta), tensors)
            return Groups(config, (shape[0], shape[1]), *tensors)
        state = self._state(module)
        if state.get("nested_blocksize", 256) != 256:
            raise self._wrong(module, f"nested_blocksize {state['nested_blocksize']}, expected 256")
        self._same_values(f"{name}.quant_map", table(config.name, torch.device("cpu")).values)
        codes = self._tensor(name).contiguous().view(torch.uint8).view(-1, 1)
        tensors = [codes, self._tensor(f"{name}.absmax")]
        if config.double_quant:
            self._same_values(f"{name}.nested_quant_map", DYNAMIC)
            tensors += [self._tensor(f"{name}.nested_absmax"), torch.tensor(float(state.get("nested_offset", 0.0)))]
        self._fits(module, Blocks.empty(config, (shape[0], shape[1]), meta), tensors)
        return Blocks(config, (shape[0], shape[1]), *tensors)

    def _state(self, module: str) -> dict[str, Any]:
        try:
            state = json.loads(bytes(self._tensor(self._states[module]).tolist()))
        except (ValueError, TypeError) as error:
            raise self._wrong(module, f"its quant_state is not JSON: {error}") from error
        if not isinstance(state, dict):
            raise self._wrong(module, "its quant_state is no object")
        return state

    def _config(self, module: str) -> QuantizeConfig:
        if module in self._rows:
            return QuantizeConfig(name="int8")
        state = self._state(module)
        found = {
            "name": state.get("quant_type"),
            "block_size": state.get("blocksize"),
        }
        if TYPES.get(str(found["name"])) is Blocks:
            found["double_quant"] = "nested_blocksize" in state
        try:
            return validate(found, QuantizeConfig, name=f"{self._where}: {module}.weight")
        except UsageError as error:
            raise InputError(str(error)) from error

    def _tensor(self, name: str) -> Tensor:
        if name not in self._stored:
            raise InputError(f"{self._where}: tensor {name} is missing")
        return self._reader.read(name)

    def _same_values(self, name: str, expected: Tensor) -> None:
        found = self._tensor(name).float().reshape(-1)
        if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=1e-6):
            raise InputError(f"{self._where}: {name} holds other values than the type's own: not supported")

    def _fits(self, module: str, empty: Quantized, tensors: Iterable[Tensor]) -> None:
        for wanted, found in zip(empty.buffers(), tensors, strict=True):
            if (wanted.shape, wanted.dtype) != (found.shape, found.dtype):
                got, expected = (f"{list(t.shape)} {str(t.dtype)[6:]}" for t in (found, wanted))
                raise self._wrong(module, f"a tensor of {got}, expected {expected}")

    def _wrong(self, module: str, problem: str) -> InputError:
        return InputError(f"{self._where}: {module}.weight, which is quantised, cannot be read: {problem}")

"""Weights stored as floats of 8 or 4 bits with scales, dequantized as they are read.

FP8: ``NAME`` holds the codes, and ``NAME_scale_inv`` or ``NAME_scale`` what to multiply them with (both mean the same):
one number, one per row, or one per block of a matrix. MXFP4, the format of gpt-oss: ``NAME_blocks`` holds two 4-bit
codes per byte, and ``NAME_scales`` the exponent of each block of 32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_lora import log
from lit_lora.checkpoint.headers import Headers
from lit_lora.checkpoint.tensors import TensorReader
from lit_lora.errors import InputError
from lit_lora.files import read_json
from lit_lora.model.quantization import FLOAT8, MXFP4, quantization_method, quantization_settings

__all__ = ["ScaledTensors", "without_scales"]

_FLOAT8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("_scale_inv", "_scale")
# Scales of activations and of the KV cache, which inference in 8 bits uses.
_UNUSED = (".input_scale", ".output_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale")

_BLOCKS, _EXPONENTS = "_blocks", "_scales"
# The values of 4-bit codes: sign, 2 bits of exponent, 1 bit of mantissa. Source: OCP Microscaling Formats 1.0, 5.3.3.
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_EXPONENT_BIAS = 127
_BLOCK = 32

# Values dequantized at a time, in float32: bounds the memory that a tensor needs beyond its result.
_CHUNK_VALUES = 1 << 22


def without_scales(reader: TensorReader | Headers, folder: Path) -> TensorReader | Headers | ScaledTensors:
    """The tensors as the model has them, without scales; ``reader`` itself if the folder stores none."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    method = quantization_method(config)
    if method not in (*FLOAT8, MXFP4):
        return reader
    tensors = ScaledTensors(reader, config, str(folder))
    log.note(f"{folder}: {method} weights are dequantized to {_word(tensors.dequantized)} while loading")
    return tensors


class ScaledTensors:
    """The tensors of a checkpoint in FP8 or MXFP4; see :class:`lit_lora.checkpoint.tensors.TensorReader`.

    Args:
        reader: The tensors as stored.
        config: The contents of ``config.json``.
        where: The folder, for messages.
    """

    def __init__(self, reader: TensorReader | Headers, config: Mapping[str, Any], where: str) -> None:
        self._reader = reader
        self._where = where
        self._block = _block_size(config)
        self.dequantized = _dtype(config)
        """Dtype of a tensor that was stored with scales."""

        stored = reader.names()
        names = set(stored)
        self._scale_of: dict[str, str] = {}  # FP8: name of the codes -> name of their scales
        self._mxfp4: set[str] = set()
        for name in stored:
            for end in _SCALES:
                if f"{name}{end}" in names:
                    self._scale_of[name] = f"{name}{end}"
            stem = name.removesuffix(_BLOCKS)
            if stem != name and f"{stem}{_EXPONENTS}" in names:
                self._mxfp4.add(stem)

        hidden = {*self._scale_of.values(), *(f"{stem}{_EXPONENTS}" for stem in self._mxfp4)}
        self._names = []
        for name in stored:
            if name not in hidden and not name.endswith(_UNUSED):
                stem = name.removesuffix(_BLOCKS)
                self._names.append(stem if stem in self._mxfp4 else name)

    def names(self) -> list[str]:
        """Names of all tensors, without scales."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor before quantization.

        Raises:
            InputError: It is stored in MXFP4, but not as experts are.
        """
        if name not in self._mxfp4:
            return self._reader.shape(name)
        shape = self._reader.shape(f"{name}{_BLOCKS}")
        if len(shape) != 4 or shape[3] * 2 != _BLOCK or shape[:3] != self._reader.shape(f"{name}{_EXPONENTS}"):
            raise self._unreadable(name, f"blocks of shape {shape}, expected (experts, out, in / 32, 16)")
        experts, rows, blocks, _ = shape
        return experts, blocks * _BLOCK, rows

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, after dequantization."""
        if name in self._mxfp4 or name in self._scale_of:
            return self.dequantized
        return self._reader.dtype(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Its values: pages of the file, mapped on use, or a copy; a tensor with scales is dequantized.

        Raises:
            InputError: Codes and scales do not fit together.
        """
        if name in self._mxfp4:
            return self._read_mxfp4(name, dtype or self.dequantized)
        if name in self._scale_of:
            return self._read_float8(name, dtype or self.dequantized)
        if self._reader.dtype(name) in _FLOAT8_DTYPES:
            raise self._unreadable(name, "its scales are missing")
        return self._reader.read(name, dtype)

    def read_once(self, name: str) -> Tensor:
        """The values of a tensor that is dropped soon: see :meth:`TensorReader.read_once`.

        Raises:
            InputError: As :meth:`read`.
        """
        scaled = name in self._mxfp4 or name in self._scale_of
        return self.read(name) if scaled else self._reader.read_once(name)

    def _read_float8(self, name: str, dtype: torch.dtype) -> Tensor:
        codes = self._reader.read_once(name)
        if codes.dtype not in _FLOAT8_DTYPES:
            raise self._unreadable(name, f"codes in {_word(codes.dtype)}, expected float8")
        stored = self._reader.read_once(self._scale_of[name])
        # An exponent may be stored as a byte without a dtype of its own.
        scales = torch.exp2(stored.float() - _EXPONENT_BIAS) if stored.dtype == torch.uint8 else stored.float()

        *batch, rows, columns = codes.shape if codes.ndim > 1 else (1, *codes.shape)
        count = math.prod(batch)
        grid = self._grid(name, scales, count, rows, columns)
        row_block, column_block = self._steps(name, grid, rows, columns)
        result = torch.empty(count, rows, columns, dtype=dtype)
        matrices = codes.reshape(count, rows, columns)
        step = max(1, _CHUNK_VALUES // columns)
        for index in range(count):
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                row_scales = grid[index, torch.arange(part.start, part.stop) // row_block]
                by_column = row_scales.repeat_interleave(column_block, dim=1)[:, :columns]
                result[index, part] = matrices[index, part].float() * by_column
        return result.reshape(codes.shape)

    def _grid(self, name: str, scales: Tensor, count: int, rows: int, columns: int) -> Tensor:
        """The scales as (matrices, blocks of rows, blocks of columns)."""
        if scales.numel() == 1:
            return scales.reshape(1, 1, 1).expand(count, 1, 1)
        if scales.ndim == 1 and scales.numel() in (rows, count):  # one per row, or one per matrix
            scales = scales.reshape(-1, 1) if scales.numel() == rows else scales.reshape(-1, 1, 1)
        if scales.ndim < 2 or scales.numel() % count:
            raise self._unreadable(name, f"scales of shape {list(scales.shape)} for {rows} × {columns} codes")
        return scales.reshape(count, *scales.shape[-2:])

    def _steps(self, name: str, grid: Tensor, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a block: those of the config if they fit, or else those that divide the matrix evenly."""
        scale_rows, scale_columns = grid.shape[1:]
        if self._block is not None:
            block_rows, block_columns = self._block
            if (-(-rows // block_rows), -(-columns // block_columns)) == (scale_rows, scale_columns):
                return block_rows, block_columns
        if rows % scale_rows or columns % scale_columns:
            raise self._unreadable(name, f"{scale_rows} × {scale_columns} scales for {rows} × {columns} codes")
        return rows // scale_rows, columns // scale_columns

    def _read_mxfp4(self, name: str, dtype: torch.dtype) -> Tensor:
        """A stack of experts (experts, in, out), as the model has them; stored are (experts, out, in)."""
        experts, columns, rows = self.shape(name)
        blocks = self._reader.read_once(f"{name}{_BLOCKS}")
        exponents = self._reader.read_once(f"{name}{_EXPONENTS}")
        if blocks.dtype != torch.uint8 or exponents.dtype != torch.uint8:
            raise self._unreadable(name, "its blocks and scales are not bytes")
        values = torch.tensor([*_FLOAT4, *(-value for value in _FLOAT4)])
        # Each byte stands for two values, the low half first.
        pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)  # (256, 2)
        result = torch.empty(experts, columns, rows, dtype=dtype)
        step = max(1, _CHUNK_VALUES // columns)
        for expert in range(experts):
            for start in range(0, rows, step):
                part = slice(start, min(start + step, rows))
                codes = pairs[blocks[expert, part].int()].reshape(part.stop - start, -1, _BLOCK)
                exponent = exponents[expert, part].int() - _EXPONENT_BIAS
                decoded = torch.ldexp(codes, exponent.unsqueeze(-1))
                result[expert, :, part] = decoded.reshape(-1, columns).T
        return result

    def _unreadable(self, name: str, problem: str) -> InputError:
        return InputError(f"{self._where}: tensor {name} cannot be dequantized: {problem}")


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, if the config says so."""
    settings = quantization_settings(config) or {}
    block = settings.get("weight_block_size")
    for group in (settings.get("config_groups") or {}).values():  # compressed-tensors
        block = block or group["weights"].get("block_structure")
    if block is None:
        return None
    rows, columns = block
    return int(rows), int(columns)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype of the unquantized weights."""
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {"float16": torch.float16, "float32": torch.float32}.get(named, torch.bfloat16)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

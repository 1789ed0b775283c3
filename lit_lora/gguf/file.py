"""The byte format of GGUF: metadata, where tensors are stored, and their values.

The header is parsed in this module instead of by ``gguf.GGUFReader``, which keeps several numpy arrays per vocabulary
entry (a gigabyte for 128k tokens); ``gguf`` does the dequantization.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from torch import Tensor

from lit_lora.errors import InputError

__all__ = ["GGUFFile", "Stored", "dequantize", "part_number", "shortest"]

# Codes of value types in the metadata; scalars with their format in `struct`.
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

# The name of one part of a split file: stem, number of the part, number of parts.
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# Values dequantized at a time, in float32: bounds the memory that a huge tensor needs beyond its result.
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Stored:
    """Where one tensor is stored: file, offset, quantization and shape (outermost dimension first)."""

    file: Path
    offset: int
    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    def part(self, index: int) -> Stored:
        """One entry of the outermost dimension, as one expert of those stacked in a tensor."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        part_bytes = math.prod(self.shape[1:]) // block * block_bytes
        return replace(self, offset=self.offset + index * part_bytes, shape=self.shape[1:])


class GGUFFile:
    """The metadata of a GGUF file (or of all parts of a split one), and where its tensors are stored.

    Args:
        path: The file; of a split file, any part.

    Attributes:
        metadata: By key, complete with the architecture's name: ``llama.block_count``.
        tensors: Where every tensor is stored, by llama.cpp's name.
        architecture: ``general.architecture``.

    Raises:
        InputError: Not GGUF, truncated, damaged, a missing part, or a quantization that is not known.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.files = _parts(self.path)
        self.metadata, self.tensors = _read_header(self.files[0])
        for file in self.files[1:]:
            _, more = _read_header(file)
            self.tensors.update(more)
        self.architecture = str(self.metadata.get("general.architecture", "not named"))

    def get(self, key: str) -> Any:
        """The value of a metadata key, without the architecture's name; ``None`` where the file has none."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: int | None = None) -> int:
        """A count of the metadata.

        Raises:
            InputError: It is missing and has no default, or it is not a number above 0.
        """
        value = self._present(key, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one number per layer, all the same
        if not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a number above 0")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A float32 of the metadata as the decimal that was meant: 9.999999747378752e-06 is 1e-05.

        Raises:
            InputError: It is missing and has no default, or it is not a number.
        """
        value = self._present(key, default)
        if not isinstance(value, float):
            raise self.wrong(key, "a decimal number")
        return shortest(value)

    def wrong(self, key: str, expected: str) -> InputError:
        """The error to raise for a key whose value is not what was expected."""
        value = self.get(key)
        return InputError(f"{self.path}: metadata key {self.architecture}.{key} is {value!r}, expected {expected}")

    def _present(self, key: str, default: Any) -> Any:
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise InputError(f"{self.path}: metadata key {self.architecture}.{key} is missing")
        return value


def _parts(path: Path) -> list[Path]:
    """All parts of a split file in order, or the file itself."""
    split = _SPLIT_NAME.fullmatch(path.name)
    if split is None:
        return [path]
    stem, count = split[1], int(split[3])
    parts = [path.with_name(f"{stem}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise InputError(f"{path.parent}: {len(missing)} of {count} parts are missing: {', '.join(missing[:3])}")
    return parts


def part_number(path: Path) -> int | None:
    """Which part of a split file this is, from 1; ``None`` for a whole file."""
    split = _SPLIT_NAME.fullmatch(path.name)
    return None if split is None else int(split[2])


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            return _Header(path, file, size).read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


class _Header:
    """The header of one GGUF file, every length checked against the size of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        """Metadata by key, and tensors by llama.cpp's name."""
        magic = self.file.read(4)
        if magic != b"GGUF":
            raise InputError(f"{self.path}: not a GGUF file, it starts with {magic!r} and not with b'GGUF'")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise InputError(f"{self.path}: GGUF version {version} is not supported, expected 2 or 3 (little endian)")
        tensor_count = self._scalar("<Q")
        key_count = self._scalar("<Q")
        metadata = {}
        for _ in range(key_count):
            key = self._text()
            metadata[key] = self._value(self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]

        # The data begins at the next multiple of the alignment; offsets of tensors count from there.
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise InputError(f"{self.path}: general.alignment is {alignment!r}, expected a number above 0")
        start = -(-self.file.tell() // alignment) * alignment
        stored = {}
        for name, shape, type_number, offset in infos:
            stored[name] = self._located(name, shape, type_number, start + offset)
        return metadata, stored

    def _located(self, name: str, shape: tuple[int, ...], type_number: int, offset: int) -> Stored:
        """A tensor whose type can be dequantized and whose data is within the file."""
        try:
            kind = GGMLQuantizationType(type_number)
        except ValueError:
            raise InputError(f"{self.path}: tensor {name}: unknown quantization type {type_number}") from None
        if kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16) and kind not in quants._type_traits:
            raise InputError(f"{self.path}: tensor {name}: {kind.name} cannot be dequantized")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise InputError(f"{self.path}: tensor {name}: shape {shape} does not fit {kind.name} blocks of {block}")
        end = offset + math.prod(shape) // block * block_bytes
        if end > self.size:
            raise InputError(
                f"{self.path}: truncated: {self.size} bytes, tensor {name} ends at byte {end}", hint="download it again"
            )
        return Stored(self.path, offset, kind, shape)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the quantization type, and offset."""
        name = self._text()
        dimensions = min(self._scalar("<I"), 8)  # GGUF allows 4; a damaged number shall not read on for ever
        innermost_first = [self._scalar("<Q") for _ in range(dimensions)]
        type_number = self._scalar("<I")
        offset = self._scalar("<Q")
        return name, tuple(reversed(innermost_first)), type_number, offset

    def _bytes(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.size else b""
        if len(data) != count:
            raise InputError(f"{self.path}: truncated or damaged metadata", hint="download it again")
        return data

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

    def _text(self) -> str:
        return self._bytes(self._scalar("<Q")).decode("utf-8", errors="replace")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise InputError(f"{self.path}: damaged metadata: unknown value type {kind}")
        item = self._scalar("<I")
        count = self._scalar("<Q")
        if item in _SCALARS:  # read at once: vocabularies have 100,000 scores
            code = _SCALARS[item].lstrip("<")
            return list(struct.unpack(f"<{count}{code}", self._bytes(count * struct.calcsize(f"<{code}"))))
        return [self._value(item) for _ in range(count)]


def dequantize(stored: Stored, dtype: torch.dtype) -> Tensor:
    """A stored tensor's values, dequantized some rows at a time, in llama.cpp's row order."""
    block, block_bytes = GGML_QUANT_SIZES[stored.kind]
    columns = stored.shape[-1]
    rows = math.prod(stored.shape[:-1])
    row_bytes = columns // block * block_bytes
    result = torch.empty((rows, columns), dtype=dtype)
    step = max(1, _CHUNK_VALUES // columns)
    with open(stored.file, "rb") as file:
        file.seek(stored.offset)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            data = np.frombuffer(file.read(count * row_bytes), dtype=np.uint8).reshape(count, row_bytes)
            with np.errstate(all="ignore"):  # a damaged file may overflow; whoever converts checks the result
                result[start : start + count] = torch.from_numpy(quants.dequantize(data, stored.kind).copy())
    return result.reshape(stored.shape)


def shortest(value: float) -> float:
    """The decimal with the fewest digits that rounds to this float32."""
    return float(str(np.float32(value)))

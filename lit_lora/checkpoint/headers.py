"""Headers of safetensors files: names, shapes and dtypes of tensors whose values are elsewhere, such as on the Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_lora.checkpoint.tensors import DTYPES, LFS_POINTER, lfs_pointer_error
from lit_lora.errors import InputError

__all__ = ["Header", "Headers", "read_header"]

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000  # the format's own limit
FIRST_BYTES = 100_000
"""Enough for the header of most files."""


@dataclass(frozen=True)
class Header:
    """One tensor in a file."""

    dtype: str
    """As safetensors names it, such as ``BF16``."""
    shape: tuple[int, ...]
    bytes: int
    """Its size in the file."""

    @property
    def numel(self) -> int:
        """Number of its values."""
        return math.prod(self.shape)


def read_header(where: str, read: Callable[[int], bytes], size: int) -> dict[str, Header]:
    """The tensors of a safetensors file by name, and nothing of their values.

    Args:
        where: The file, for messages.
        read: Returns the first bytes of the file, as many as asked for or all.
        size: Bytes of the file.

    Raises:
        InputError: It is truncated, a Git LFS pointer, or not a safetensors file.
    """
    start = read(FIRST_BYTES)
    if start.startswith(LFS_POINTER):
        raise lfs_pointer_error(where)
    end = _LENGTH_BYTES + int.from_bytes(start[:_LENGTH_BYTES], "little")
    if len(start) < _LENGTH_BYTES or end > _MOST_HEADER_BYTES:
        raise InputError(f"{where}: not a safetensors file", hint="download it again")
    if end > size:
        raise InputError(f"{where}: truncated: {size:,} bytes, its header alone has {end:,}", hint="download it again")
    if end > len(start):
        start = read(end)
    try:
        entries = json.loads(start[_LENGTH_BYTES:end])
        entries.pop("__metadata__", None)
        tensors = {name: _header(entry) for name, entry in entries.items()}
        last = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not a safetensors file, its header is damaged", hint="download it again") from error
    if end + last != size:
        raise InputError(
            f"{where}: truncated or damaged: {size:,} bytes, expected {end + last:,} by its header",
            hint="download it again",
        )
    return tensors


def _header(entry: Mapping[str, Any]) -> Header:
    begin, end = entry["data_offsets"]
    return Header(str(entry["dtype"]), tuple(int(length) for length in entry["shape"]), int(end) - int(begin))


class Headers:
    """Tensors of safetensors files without their values; see :class:`lit_lora.checkpoint.tensors.Tensors`.

    Args:
        tensors: From :func:`read_header`, of one or more files.
        where: The files' folder or repository, for messages.
    """

    def __init__(self, tensors: Mapping[str, Header], where: str) -> None:
        self.tensors = dict(tensors)
        self._where = where

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as stored."""
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is stored.

        Raises:
            InputError: The file uses an unsupported dtype.
        """
        stored = self.tensors[name].dtype
        if stored not in DTYPES:
            raise InputError(f"{self._where}: tensor {name}: dtype {stored} is not supported")
        return DTYPES[stored]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Refused.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{self._where}: the values of {name} are not on this machine")

    def read_once(self, name: str) -> Tensor:
        """Refused.

        Raises:
            InputError: Always.
        """
        return self.read(name)

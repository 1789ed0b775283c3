"""Reading the tensors of a Hugging Face folder one at a time, from one or many memory-mapped safetensors shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_lora.errors import InputError, first_line
from lit_lora.files import read_json, require_safe_names

__all__ = [
    "DTYPES",
    "INDEX",
    "LFS_POINTER",
    "TensorReader",
    "Tensors",
    "check_tensors",
    "lfs_pointer_error",
    "open_tensors",
    "read_weight_map",
]

INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors by their names in its headers."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the small text begins that stands for a file in a clone without Git LFS."""


class Tensors(Protocol):
    """What every reader of a format offers: tensors by their Hugging Face names."""

    def names(self) -> list[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that holds its values without loss."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Its values."""


class TensorReader:
    """The tensors of safetensors files by name. Shapes and dtypes come from the headers, values on ``read``.

    Args:
        files: The shards. Opening one checks its header against its length.

    Raises:
        InputError: A file is missing, truncated or not safetensors, or two files hold a tensor of the same name.
    """

    def __init__(self, files: list[Path]) -> None:
        self._shards: dict[str, Any] = {}  # tensor name -> open shard
        self._files: dict[str, Path] = {}
        self._slices: dict[str, Any] = {}
        for file in files:
            shard = _open_shard(file)
            for name in shard.offset_keys():
                if name in self._shards:
                    raise InputError(f"{file}: tensor {name} is in another shard too, expected it once")
                self._shards[name] = shard
                self._files[name] = file
                self._slices[name] = shard.get_slice(name)

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the shards."""
        return list(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is stored.

        Raises:
            InputError: The file uses an unsupported dtype.
        """
        stored = self._slices[name].get_dtype()
        if stored not in DTYPES:
            raise InputError(f"tensor {name}: dtype {stored} is not supported, expected one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor's values: pages of the file, mapped on use, or a copy in ``dtype`` where that differs."""
        if dtype is not None and dtype != self.dtype(name):
            return self.read_once(name).to(dtype)
        tensor: Tensor = self._shards[name].get_tensor(name)
        return tensor

    def read_once(self, name: str) -> Tensor:
        """The values of a tensor that is dropped soon, in a mapping of their own.

        Their pages are released with the tensor. Those of the shared mapping would count as the process's memory as
        long as any tensor of the file is in use.
        """
        tensor: Tensor = _open_shard(self._files[name]).get_tensor(name)
        return tensor


def open_tensors(folder: Path) -> TensorReader:
    """Open the safetensors shards of a Hugging Face folder (those of its index, or ``model.safetensors``).

    Raises:
        InputError: There are none, a shard is missing or truncated, or a tensor of the index is in no shard.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file():
        return _open_index(index)
    single = folder / "model.safetensors"
    if single.is_file():
        return TensorReader([single])
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    raise InputError(
        f"{folder}: no model.safetensors and no {INDEX}, expected a Hugging Face checkpoint folder",
        hint="lit-lora convert makes one from GGUF, PyTorch (.bin, .pth) or LitGPT files",
    )


def _open_index(index: Path) -> TensorReader:
    weight_map = read_weight_map(index)
    reader = TensorReader([index.parent / name for name in dict.fromkeys(weight_map.values())])
    missing = sorted(set(weight_map) - set(reader.names()))
    if missing:
        shown = missing[0] if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1} more"
        raise InputError(f"{index}: lists {shown}, which no shard holds")
    return reader


def check_tensors(where: Path, tensors: Tensors, expected: Mapping[str, tuple[int, ...]], *, head: str) -> None:
    """Compare names and shapes before any values are read. The copy of a tied head and rotary tables are ignored.

    Args:
        where: The file or folder, for the message.
        tensors: The stored tensors.
        expected: Shape of every tensor of the model by name.
        head: Name of the model's head.

    Raises:
        InputError: A tensor is missing, unexpected or of another shape.
    """
    stored = set(tensors.names())
    missing = [name for name in expected if name not in stored]
    extra = sorted(
        name for name in stored - set(expected) if not name.endswith(("rotary_emb.inv_freq", f"{head}.weight"))
    )
    for problem, names in (("is missing", missing), ("is not part of the model that its config describes", extra)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise InputError(f"{where}: tensor {names[0]} {problem}{more}")
    for name, shape in expected.items():
        if tensors.shape(name) != shape:
            raise InputError(f"{where}: tensor {name}: shape {tensors.shape(name)}, expected {shape} from the config")


def read_weight_map(index: Path, available: Iterable[str] | None = None) -> dict[str, str]:
    """Tensor name to shard file name, from a ``*.index.json``; every shard exists.

    Args:
        index: The file.
        available: Names of the files beside it; those in its folder if omitted.

    Raises:
        InputError: Not such an index, or a shard is missing.
    """
    try:
        weight_map = read_json(index)["weight_map"]
        shards = dict.fromkeys(weight_map.values())
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of shards, expected JSON with a 'weight_map'") from error
    require_safe_names(shards, index)
    for name in shards:
        if "/" in name:
            raise InputError(f"{index}: shard name {name!r} is not a plain file name")
    present = {path.name for path in index.parent.iterdir()} if available is None else set(available)
    missing = [name for name in shards if name not in present]
    if missing:
        raise InputError(
            f"{index.parent}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}",
            hint="download the folder again; finished files are kept",
        )
    return dict(weight_map)


def lfs_pointer_error(file: Path | str) -> InputError:
    """The error for a file that begins with ``LFS_POINTER``."""
    return InputError(
        f"{file}: a Git LFS pointer instead of the weights", hint="run git lfs pull, or use lit-lora download"
    )


def _open_shard(file: Path) -> Any:
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    with file.open("rb") as opened:  # raises PermissionError, where safetensors would say that there is no such file
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise lfs_pointer_error(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{file}: truncated or not a safetensors file ({first_line(error)})", hint="download it again"
        ) from error

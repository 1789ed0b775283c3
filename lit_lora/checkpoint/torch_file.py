"""PyTorch's own files (``.bin``, ``.pth``, ``.pt``): the only module that calls ``torch.load``.

Such a file is a pickle, which can run code. It is only ever opened with ``weights_only=True``, and no option of
lit-lora changes that: a file that needs more is refused.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lit_lora.errors import InputError

__all__ = ["TorchReader"]

# Training scripts wrap the weights in dicts, under one of these keys.
_WRAPPERS = ("model", "state_dict", "module")


class TorchReader:
    """The tensors of state dicts by name, memory-mapped.

    Files in the format of PyTorch before 1.6 cannot be mapped: they are read into memory whole.

    Args:
        files: The shards, each a state dict.

    Raises:
        InputError: A file is truncated, not a state dict, or holds anything but tensors.
    """

    def __init__(self, files: list[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            for name, tensor in _load(file).items():
                if name in self._tensors:
                    raise InputError(f"{file}: tensor {name} is in another file too, expected it once")
                self._tensors[name] = tensor

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in which a tensor is stored."""
        return self._tensors[name].dtype

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor's values: pages of the file, or a copy in ``dtype`` where that differs."""
        tensor = self._tensors[name].detach()
        return tensor if dtype is None else tensor.to(dtype)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of unusual pickles; what matters raises
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        refused_name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused_name is None:
            raise InputError(f"{file}: not a PyTorch file, or damaged", hint="download it again") from error
        raise InputError(
            f"{file}: refused: the file asks for {refused_name[1]}, which is not a weight; none of it was run",
            hint="use the safetensors version of this model, or a file that holds only tensors",
        ) from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file makes torch raise almost anything: RuntimeError, EOFError, KeyError, …
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise InputError(f"{file}: truncated or not a PyTorch file ({reason})", hint="download it again") from error
    return _state_dict(file, loaded)


def _state_dict(file: Path, loaded: Any) -> dict[str, Tensor]:
    """The mapping of names to tensors inside what was loaded."""
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise InputError(f"{file}: holds a {type(loaded).__name__}, expected a state dict of tensors by name")

    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{file}: entry {name!r} is not a tensor, expected a state dict of tensors by name")
    if all(name.startswith("module.") for name in loaded):  # saved from DistributedDataParallel
        return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}
    return loaded

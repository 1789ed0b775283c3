"""Adapter files of methods that add modules: in PEFT's form where PEFT has the method, else in our own.

Our own form is the same folder, with a ``peft_type`` that PEFT does not know and therefore refuses, the method's
settings, and every own parameter by its name in the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_lora.config import validate
from lit_lora.errors import InputError, LitLoraError
from lit_lora.peft.core.added import AddedMethod
from lit_lora.peft.table import methods

__all__ = ["OWN", "added_types", "read_added", "restore_added"]

OWN = "LIT_LORA_"


def added_types() -> dict[str, type[AddedMethod]]:
    """The methods that add modules by the ``peft_type`` values that stand for them."""
    found: dict[str, type[AddedMethod]] = {}
    for name, method in methods("added").items():
        assert issubclass(method, AddedMethod)
        found[OWN + name.upper()] = method
        if method.peft_type is not None:
            found[method.peft_type] = method
    return found


def read_added(path: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AddedMethod:
    """The settings of an adapter with added modules.

    Args:
        path: Of ``adapter_config.json``, for messages.
        raw: Its content.
        tensors: The adapter's.

    Raises:
        InputError: It needs something that is not done here.
    """
    kind = str(raw["peft_type"])
    method = added_types()[kind]
    try:
        if kind.startswith(OWN):
            return validate(raw.get("settings"), method, name=str(path))
        return method.from_peft(raw, tensors)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except LitLoraError as error:
        raise InputError(str(error)) from error


def restore_added(model: nn.Module, folder: Path, method: AddedMethod, tensors: Mapping[str, Tensor]) -> None:
    """Put the adapter into a frozen model, in place.

    Raises:
        InputError: It does not fit this model.
    """
    try:
        method.restore(model, tensors)
    except LitLoraError as error:
        raise InputError(f"{folder}: {error}", hint="the adapter was made for another model") from error

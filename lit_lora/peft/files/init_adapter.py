"""Starting a run from an adapter that another run, or PEFT, has trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lit_lora import log
from lit_lora.errors import UsageError
from lit_lora.peft.core.adapter_method import AdapterMethod
from lit_lora.peft.core.base_tensors import base_tensors
from lit_lora.peft.core.capabilities import ChangesConfig, ChoosesCodes
from lit_lora.peft.core.method import Method
from lit_lora.peft.files.adapter import Adapter, read_adapter
from lit_lora.peft.files.load import put_in
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.file import LoRAFile
from lit_lora.peft.table import methods

__all__ = ["settings_from", "start_from"]

# How a run trains, not what the adapter computes; names of modules are compared by the tensors of the file.
_FREE = {"name", "init_adapter", "dropout", "init", "init_rows", "rho", "loraplus_lr_ratio", "freeze_A"}
_FREE |= {"target_modules", "exclude_modules", "layers", "modules_to_save"}


def settings_from(folder: Path) -> dict[str, Any]:
    """The settings of the adapter in ``folder`` that are not a method's defaults, and the method's name.

    Raises:
        InputError: It is not a readable adapter.
    """
    method = _file_settings(read_adapter(folder))
    settings = {"name": method.name}
    for key, value in method.model_dump(mode="json").items():
        # Not pydantic's exclude_defaults, which would leave out the names of a composed adapter's methods too.
        if getattr(method, key) != type(method).model_fields[key].get_default(call_default_factory=True):
            settings[key] = value
    return settings


def start_from(model: nn.Module, method: AdapterMethod, folder: Path, base: Path) -> None:
    """Apply ``method`` to the frozen ``model`` in place, with the values of the adapter in ``folder``.

    Args:
        model: Frozen, without an adapter.
        method: The settings of the run.
        folder: The adapter.
        base: The folder of ``model``, to be compared with the name that the adapter has of its base.

    Raises:
        InputError: It is not a readable adapter, or not one for this model.
        UsageError: The settings are not those of the adapter.
    """
    adapter = read_adapter(folder)
    _require_same(method, adapter)
    put_in(model, replace(adapter, config=method), base_tensors(model), force=False)
    if adapter.base and Path(adapter.base).name != base.name:
        log.warn(f"{folder}: was trained on {adapter.base}, and this run trains it on {base}; the shapes agree")
    log.note(f"starts from {folder}: {adapter.tensors} tensors")


def _file_settings(adapter: Adapter) -> Method:
    """The adapter's settings as those of its method for training."""
    method = adapter.config
    if not isinstance(method, LoRAFile):
        return method
    trainer = methods()[method.name]
    settings = {key: value for key, value in method.model_dump().items() if key in trainer.model_fields}
    ids = {token for tokens in method.token_ids.values() for token in tokens}
    in_full = [name for name in method.modules_to_save if name not in method.token_ids]
    settings |= {"alpha": method.base_alpha, "trainable_tokens": sorted(ids), "modules_to_save": in_full}
    return trainer.model_validate(settings)


def _require_same(method: AdapterMethod, adapter: Adapter) -> None:
    """Check that the run's settings are those of the adapter, wherever these change what it computes.

    Raises:
        UsageError: One differs, or the method cannot start from an adapter.
    """
    folder = adapter.folder
    saved = _file_settings(adapter)
    if isinstance(method, ChoosesCodes | ChangesConfig):
        raise UsageError(f"peft.init_adapter: {method.title} does not start from an adapter")
    if method.name != saved.name:
        raise UsageError(
            f"peft.name: {method.name}, but {folder} is loaded as {saved.name}", hint=f"set peft.name={saved.name}"
        )
    if isinstance(method, LoRAConfig) and method.init not in ("kaiming", "gaussian"):
        raise UsageError(
            f"peft.init: {method.init} has no effect with peft.init_adapter",
            hint="omit peft.init, or peft.init_adapter",
        )
    for key, value in saved.model_dump(mode="json").items():
        own = method.model_dump(mode="json")[key]
        if key == "alpha" and own is None:
            own = getattr(method, "base_alpha", None)
        if key == "trainable_tokens":
            own = sorted(own)
        if key not in _FREE and own != value:
            raise UsageError(
                f"peft.{key}: {own}, but the adapter {folder} has {value}",
                hint=f"omit peft.{key}: the adapter's setting is used",
            )

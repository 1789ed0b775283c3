"""The frozen part of an adapter, such as random matrices and initial values, which a run saves so that it can resume.

Drawn or computed again, on another device or with another number of threads, they would have other bits or entirely
other values, to which the trained part does not belong.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from lit_lora.config import validate
from lit_lora.errors import InputError, UsageError
from lit_lora.files import atomic_folder, read_json, write_text
from lit_lora.peft.core.method import Method
from lit_lora.peft.core.modules import own_modules

__all__ = ["frozen_state", "keep_frozen", "keep_method", "kept_method"]


def frozen_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen parameters of the adapter, by name; a shared one once."""
    by_id: dict[int, tuple[str, nn.Parameter]] = {}
    for module_name, module in own_modules(model).items():
        for name, parameter in module.named_parameters(prefix=module_name):
            if not parameter.requires_grad and not name.startswith(f"{module_name}.base_layer."):
                by_id.setdefault(id(parameter), (name, parameter))
    return dict(by_id.values())


def kept_method(folder: Path, method: Method) -> Method | None:
    """The settings that a run to resume began with, if they differ from its config's; see :func:`keep_method`.

    Raises:
        InputError: The file is broken.
    """
    path = folder / "method.json"
    if not path.is_file():
        return None
    try:
        return validate(read_json(path), type(method), name=str(path))
    except (InputError, UsageError) as error:
        raise InputError(f"{path}: cannot be read: {error}", hint="start a new run in another folder") from error


def keep_method(folder: Path, method: Method) -> None:
    """Write the settings that an initialization from data has chosen, such as ranks by layer, into ``folder``.

    Raises:
        DiskError: They cannot be written.
    """
    write_text(folder / "method.json", method.model_dump_json(indent=2) + "\n")


def keep_frozen(model: nn.Module, folder: Path, *, resume: bool) -> None:
    """Write the frozen state of ``model`` into ``folder``; for a resumed run, read it from there into the model.

    Raises:
        DiskError: It cannot be written.
        InputError: The folder of the run to resume has no frozen state, or that of another adapter.
    """
    state = frozen_state(model)
    path = folder / "frozen.safetensors"
    if not state:
        return
    if not resume:
        with atomic_folder(folder, replace=True) as temporary:
            tensors = {name: parameter.detach().contiguous() for name, parameter in state.items()}
            save_file(tensors, temporary / path.name)
        return
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}", hint="start a new run in another folder") from error
    saved_shapes = {name: tensor.shape for name, tensor in saved.items()}
    if saved_shapes != {name: parameter.shape for name, parameter in state.items()}:
        raise InputError(f"{path}: belongs to another adapter than this run's", hint="resume with the same config")
    with torch.no_grad():
        for name, parameter in state.items():
            parameter.copy_(saved[name])

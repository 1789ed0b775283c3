"""What an adapter has beside what trains: random matrices and starts, which a run keeps so that it can be resumed.

Drawn or computed again, on another device or by another number of threads, they would not be the same bits, or not
the same numbers at all, and what was trained on them would not fit.
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
    """The parameters of the adapter that do not train, by name; a shared one once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in own_modules(model).items():
        for own, parameter in module.named_parameters(prefix=name):
            if not parameter.requires_grad and not own.startswith(f"{name}.base_layer."):
                found.setdefault(id(parameter), (own, parameter))
    return dict(found.values())


def kept_method(folder: Path, method: Method) -> Method | None:
    """The settings that the run to resume began with, where they are not those of its config; see :func:`keep_method`.

    Raises:
        InputError: They are broken.
    """
    path = folder / "method.json"
    if not path.is_file():
        return None
    try:
        return validate(read_json(path), type(method), name=str(path))
    except (InputError, UsageError) as error:
        raise InputError(f"{path}: cannot be read: {error}", hint="start a new run in another folder") from error


def keep_method(folder: Path, method: Method) -> None:
    """Write the settings that a start from rows has come to, such as ranks by layer, into ``folder``.

    Raises:
        DiskError: They cannot be written.
    """
    write_text(folder / "method.json", method.model_dump_json(indent=2) + "\n")


def keep_frozen(model: nn.Module, folder: Path, *, resume: bool) -> None:
    """Write them into ``folder``, if there are any; or, where a run is resumed, put what it wrote into the model.

    Raises:
        DiskError: It cannot be written.
        InputError: The run to resume has not kept them, or others.
    """
    state, path = frozen_state(model), folder / "frozen.safetensors"
    if not state:
        return
    if not resume:
        with atomic_folder(folder, replace=True) as temporary:
            tensors = {name: parameter.detach().contiguous() for name, parameter in state.items()}
            save_file(tensors, temporary / path.name)
        return
    try:
        kept = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be read: {error}", hint="start a new run in another folder") from error
    if {n: tuple(t.shape) for n, t in kept.items()} != {n: tuple(p.shape) for n, p in state.items()}:
        raise InputError(f"{path}: is of another adapter than this run's", hint="resume with the same config")
    with torch.no_grad():
        for name, parameter in state.items():
            parameter.copy_(kept[name])

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

from lit_lora.errors import InputError
from lit_lora.files import atomic_folder
from lit_lora.peft.base import own_modules

__all__ = ["frozen_state", "keep_frozen"]


def frozen_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapter that do not train, by name; a shared one once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, module in own_modules(model).items():
        for own, parameter in module.named_parameters(prefix=name):
            if not parameter.requires_grad and not own.startswith(f"{name}.base_layer."):
                found.setdefault(id(parameter), (own, parameter))
    return dict(found.values())


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

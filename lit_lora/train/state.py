"""Checkpoints of a run: complete or not there, no pickle, and a resumed run equals one that never stopped.

A checkpoint is a folder ``step-00000012`` with ``trainable.safetensors`` (float32 masters), ``optimizer.safetensors``
(moments) and ``state.json``. The data position and all random draws are functions of the step, so neither is stored.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_lora.errors import InputError
from lit_lora.files import atomic_folder, remove_folder, restore_replaced
from lit_lora.train.optim.master_weights import MasterWeights

__all__ = ["CheckpointStore"]

_PREFIX = "step-"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie, one folder per step.
        keep_last: How many of the newest are kept, beside the best.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last
        for aside in self.folder.glob(".old-*"):  # by a process that was killed between two renames
            restore_replaced(aside.with_name(aside.name.removeprefix(".old-")))

    def save(
        self, step: int, master_weights: MasterWeights, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Write the checkpoint of ``step`` finished steps, then remove those that are no longer kept.

        Args:
            step: Finished optimizer steps.
            master_weights: The masters.
            optimizer: Over the masters.
            state: JSON values; ``state["best_step"]`` names a checkpoint that is never removed.

        Raises:
            DiskError: No room; the older checkpoints are still there.
        """
        target = self.folder / f"{_PREFIX}{step:08d}"
        with atomic_folder(target, replace=True) as temporary:
            masters = {name: tensor.detach().contiguous() for name, tensor in master_weights.masters.items()}
            save_file(masters, temporary / "trainable.safetensors")
            save_file(_moments(master_weights, optimizer), temporary / "optimizer.safetensors")
            text = json.dumps({"step": step, **state}, indent=1)
            (temporary / "state.json").write_text(text, encoding="utf-8")
        kept = {*self.steps()[-self.keep_last :], state.get("best_step")}
        for old in self.steps():
            if old not in kept:
                remove_folder(self.folder / f"{_PREFIX}{old:08d}")
        for left in self.folder.glob(".tmp-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        names = [path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def load(
        self, step: int, master_weights: MasterWeights, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Any]:
        """Put the checkpoint's values into the masters, the model and, when given, the optimizer, in place.

        Returns:
            The ``state`` it was saved with, and ``step``.

        Raises:
            InputError: It is broken, or of another set of parameters.
        """
        folder = self.folder / f"{_PREFIX}{step:08d}"
        masters = _read(folder / "trainable.safetensors")
        _same_names(folder, set(masters), set(master_weights.masters))
        with torch.no_grad():
            for name, master in master_weights.masters.items():
                if masters[name].shape != master.shape:
                    raise InputError(f"{folder}: {name} has another shape than in this run, use the same config")
                master.copy_(masters[name])
        master_weights.copy_to_model()
        if optimizer is not None:
            _restore(folder, master_weights, optimizer)
        try:
            state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(folder / "state.json", error) from error
        return state


def _moments(master_weights: MasterWeights, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as ``<kind>/<parameter>``."""
    moments: dict[str, Tensor] = {}
    for name, master in master_weights.masters.items():
        for kind, value in optimizer.state.get(master, {}).items():
            if value is not None:
                moments[f"{kind}/{name}"] = torch.as_tensor(value).detach().contiguous()
    return moments


def _restore(folder: Path, master_weights: MasterWeights, optimizer: torch.optim.Optimizer) -> None:
    for key, value in _read(folder / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        if name not in master_weights.masters:
            raise InputError(f"{folder}: optimizer state of {name}, which does not train in this run")
        master = master_weights.masters[name]
        there = optimizer.state[master].get(kind)
        if there is None:  # torch's optimizers make their state in the first step
            # The step count of fused AdamW is a float32 scalar that stays where its kernel expects it.
            optimizer.state[master][kind] = value.to(master.device)
        elif (there.shape, there.dtype) == (value.shape, value.dtype):
            there.copy_(value)
        else:
            raise InputError(f"{folder}: the optimizer state of {name} is of another optimizer, use the same config")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    hint = f"remove {path.parent}: --resume then goes on after the checkpoint before it, or else begins anew"
    return InputError(f"{path}: cannot be read: {error}", hint=hint)


def _same_names(folder: Path, stored: set[str], wanted: set[str]) -> None:
    if stored != wanted:
        example = sorted(stored ^ wanted)[0]
        raise InputError(
            f"{folder}: trains {len(stored)} tensors, this run trains {len(wanted)} (such as {example}); "
            "the method or the model differs",
            hint="resume with the config in the run folder, or start a new run in another folder",
        )

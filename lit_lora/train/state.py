"""Checkpoints of a run: complete or absent, without pickle, and a resumed run equals one that never stopped.

A checkpoint is a folder ``step-00000012`` with ``trainable.safetensors`` (float32 masters), ``optimizer.safetensors``
(the optimizer's state) and ``state.json``. The position in the data and all random draws are functions of the step, so
neither is stored.
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
from lit_lora.files import atomic_folder, read_json, remove_folder, restore_replaced
from lit_lora.train.optim.master_weights import MasterWeights

__all__ = ["CheckpointStore"]

_PREFIX = "step-"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: The parent of the checkpoints, one folder per step.
        keep_last: The number of newest ones to keep, beside the best.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last
        for aside in self.folder.glob(".old-*"):  # left by a process that was killed between two renames
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
            save_file(_optimizer_tensors(master_weights, optimizer), temporary / "optimizer.safetensors")
            text = json.dumps({"step": step, **state}, indent=1)
            (temporary / "state.json").write_text(text, encoding="utf-8")

        # Only now, when the new one is complete, older ones may go.
        steps = self.steps()
        kept_steps = {*steps[-self.keep_last :], state.get("best_step")}
        for old in steps:
            if old not in kept_steps:
                remove_folder(self.folder / f"{_PREFIX}{old:08d}")
        for unfinished in self.folder.glob(".tmp-*"):  # left by a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        names = [path.name.removeprefix(_PREFIX) for path in self.folder.glob(f"{_PREFIX}*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def kept(self) -> str:
        """Which checkpoint there is to go on from, in words."""
        steps = self.steps()
        return f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no checkpoint yet"

    def load(
        self, step: int, master_weights: MasterWeights, optimizer: torch.optim.Optimizer | None = None
    ) -> dict[str, Any]:
        """Copy the checkpoint's values into the masters, the model and, when given, the optimizer, in place.

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
            _restore_optimizer(folder, master_weights, optimizer)

        try:
            return read_json(folder / "state.json")
        except InputError as error:
            raise _damaged(folder / "state.json", error) from error


def _optimizer_tensors(master_weights: MasterWeights, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors, by ``<kind>/<parameter>``."""
    tensors: dict[str, Tensor] = {}
    for name, master in master_weights.masters.items():
        for kind, value in optimizer.state.get(master, {}).items():
            if value is not None:
                tensors[f"{kind}/{name}"] = torch.as_tensor(value).detach().contiguous()
    return tensors


def _restore_optimizer(folder: Path, master_weights: MasterWeights, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the state in a checkpoint.

    Not by ``load_state_dict``, which knows parameters by their order only and would replace memory that is paged.

    Raises:
        InputError: It cannot be read, or is of other parameters or another optimizer.
    """
    for key, value in _read(folder / "optimizer.safetensors").items():
        kind, _, name = key.partition("/")
        if name not in master_weights.masters:
            raise InputError(f"{folder}: optimizer state of {name}, which does not train in this run")
        master = master_weights.masters[name]
        current = optimizer.state[master].get(kind)
        if current is None:  # PyTorch's optimizers make their state in the first step
            # Also the step count, a float32 scalar: fused AdamW's kernel reads it on the parameter's device.
            optimizer.state[master][kind] = value.to(master.device)
        elif (current.shape, current.dtype) == (value.shape, value.dtype):
            current.copy_(value)
        else:
            raise InputError(f"{folder}: the optimizer state of {name} is of another optimizer, use the same config")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    hint = f"remove {path.parent}: --resume then continues from the checkpoint before it, or starts over"
    return InputError(f"{path}: cannot be read: {error}", hint=hint)


def _same_names(folder: Path, stored: set[str], wanted: set[str]) -> None:
    if stored != wanted:
        example = sorted(stored ^ wanted)[0]
        raise InputError(
            f"{folder}: trains {len(stored)} tensors, this run trains {len(wanted)} (such as {example}); "
            "the method or the model differs",
            hint="resume with the config in the run folder, or start a new run in another folder",
        )

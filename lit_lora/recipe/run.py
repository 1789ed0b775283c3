"""A run from start to result: its options, its folder, and what is written into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_lora import log
from lit_lora.config import dump_yaml, load_config
from lit_lora.data import DataConfig
from lit_lora.data.trained import save_reading
from lit_lora.errors import DiskError, UsageError
from lit_lora.files import atomic_folder, disk_errors, human_bytes, lock_folder, remove_folder, write_text
from lit_lora.peft import Method, model_card, rows_for_init, save_adapter
from lit_lora.peft.core.adapter_method import AdapterMethod
from lit_lora.peft.files.frozen_state import keep_frozen, keep_method
from lit_lora.recipe.config import RunConfig
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.device import choose_device, choose_dtype
from lit_lora.train.loop import FitResult
from lit_lora.train.run import TrainingRun

__all__ = ["Options", "Run", "begin", "card_of_model", "finish", "start", "summary", "write_adapter"]


_INIT_ADAPTER = "start/init_adapter"


@dataclass(frozen=True)
class Options:
    """Options of a run that are not part of its config."""

    dry_run: bool = False
    """Stop before the first step and write nothing."""
    resume: bool = False
    """Continue after the newest checkpoint of the run folder."""
    overwrite: bool = False
    """Replace the run that the folder already contains."""


@dataclass(frozen=True)
class Run:
    """A started run."""

    config: RunConfig
    options: Options
    device: torch.device
    dtype: torch.dtype

    @property
    def folder(self) -> Path:
        """The run folder, to which everything is written."""
        return self.config.out

    @property
    def init_adapter(self) -> Path | None:
        """The adapter to start from. A run to resume has its own copy, whatever became of the original."""
        method = self.config.peft
        if not isinstance(method, AdapterMethod) or method.init_adapter is None:
            return None
        copy = self.folder / _INIT_ADAPTER
        return copy if self.options.resume and copy.is_dir() else method.init_adapter

    @property
    def training(self) -> TrainingRun:
        """The part of the run that the training loop needs."""
        return TrainingRun(
            train=self.config.train,
            optimizer=self.config.optimizer,
            schedule=self.config.schedule,
            folder=self.folder,
            seed=self.config.seed,
            resume=self.options.resume,
        )


def start(config: RunConfig, options: Options) -> Run:
    """Set the seed, choose device and dtype, and check that the run folder can be used.

    Raises:
        DiskError: The folder is a file.
        UsageError: The folder contains another run, or none to resume; or the device is not available.
    """
    torch.manual_seed(config.seed)
    device = choose_device(config.model.device)
    run = Run(config, options, device, choose_dtype(config.model.dtype, device))

    if run.folder.exists() and not run.folder.is_dir():
        raise DiskError(f"{run.folder}: is a file, expected a folder for the run", hint="choose another out=FOLDER")
    saved_config = run.folder / "config.yaml"
    if options.resume:
        if not saved_config.is_file():
            raise UsageError(f"{run.folder}: no run to resume", hint="start one without --resume")
        _check_same_run(saved_config, config)
    elif saved_config.is_file() and not (options.overwrite or options.dry_run):
        raise UsageError(
            f"{run.folder}: already contains a run",
            hint="--resume continues it, --overwrite replaces it, out=FOLDER starts another one",
        )
    return run


def begin(run: Run, model: nn.Module, method: Method) -> bool:
    """Lock the run folder and write the config into it. With ``overwrite``, the old run is removed only now.

    What the adapter has that does not train is saved in the folder, or loaded from it into ``model`` on resume.

    Args:
        run: The run.
        model: With its method applied.
        method: As applied; initialization from data may have changed its settings.

    Returns:
        Whether to train. ``False`` for a dry run, which writes nothing.

    Raises:
        DiskError: The folder cannot be written.
        InputError: What the run to resume has saved does not fit.
        UsageError: Another process is training in it.
    """
    resume = run.options.resume
    if run.options.dry_run:
        return False

    _lock(run.folder)
    if run.options.overwrite and not resume:
        _remove_run(run.folder)

    keep_frozen(model, run.folder / "start", resume=resume)
    if isinstance(method, AdapterMethod) and method.init_adapter is not None and not resume:
        with atomic_folder(run.folder / _INIT_ADAPTER, replace=True) as temporary:
            shutil.copytree(method.init_adapter, temporary, dirs_exist_ok=True)
    if rows_for_init(method) and not resume:
        keep_method(run.folder / "start", method)
    write_text(run.folder / "config.yaml", dump_yaml(run.config))
    return True


_LOCKS: dict[tuple[int, int], int] = {}
"""Device and inode of each folder that this process has locked: file descriptor of its lock."""


def _lock(folder: Path) -> None:
    """Create the run folder if needed, and keep other processes out of it until this one ends.

    The system releases the lock with the process, however that ends, so that none is left behind by SIGKILL.

    Raises:
        DiskError: The folder cannot be created.
        UsageError: Another process has locked it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in _LOCKS:  # a notebook may train in one folder twice
        return
    try:
        _LOCKS[identity] = lock_folder(folder)
    except BlockingIOError:
        raise UsageError(
            f"{folder}: another process is training in it", hint="wait for it, stop it, or choose another out=FOLDER"
        ) from None
    except OSError:  # the file system has no locks: train without one
        return


_CHANGEABLE = {
    "out",
    "model.device",
    "train.activation_checkpointing",
    "train.eval_every",
    "train.keep_last",
    "train.micro_batch_tokens",
    "train.patience",
    "train.samples",
    "train.save_every",
}
"""Settings that may change when a run is resumed. A change of any other makes it another run."""


def _check_same_run(saved_config: Path, config: RunConfig) -> None:
    """Refuse to resume with other settings.

    Raises:
        UsageError: Naming the keys that differ.
    """
    old = _flatten(load_config(saved_config, type(config)))
    new = _flatten(config)
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} - _CHANGEABLE
    if changed:
        raise UsageError(
            f"{saved_config}: the run to resume has other settings: {', '.join(sorted(changed))}",
            hint=_way_on(changed, saved_config.parent),
        )


def _way_on(changed: set[str], folder: Path) -> str:
    """What to do instead of resuming the run in ``folder`` with the changed settings."""
    hint = "resume with the same config, or start a new run with out=ANOTHER_FOLDER"
    if changed <= {"train.epochs", "train.max_steps", "data.path", "data.validation"}:
        if (folder / "adapter").is_dir():
            hint += f" peft.init_adapter={folder / 'adapter'}, which goes on from the trained adapter"
        elif (folder / "model").is_dir():
            hint += f" model.path={folder / 'model'}, which goes on from the trained model"
    return hint


def _flatten(config: RunConfig) -> dict[str, Any]:
    """The settings by their dotted keys, such as ``train.epochs``."""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": setting for key, setting in value.items()}
        else:
            flat[section] = value
    return flat


def _remove_run(folder: Path) -> None:
    """Remove what a former run has written into ``folder``, and nothing else."""
    for name in ("checkpoints", "start", "adapter", "base", "model", "merged"):
        remove_folder(folder / name)
    files = [folder / name for name in ("metrics.jsonl", "loss.png", "result.json")]
    for path in [*files, *folder.glob("events.out.tfevents.*")]:
        path.unlink(missing_ok=True)


def write_adapter(
    run: Run,
    model: nn.Module,
    method: Method,
    tokenizer: Tokenizer,
    result: FitResult,
    *,
    data: str,
    base: Path | None = None,
) -> Path:
    """Write the trained adapter to ``adapter/`` in the run folder, with the tokenizer if it has new tokens.

    Args:
        run: The run.
        model: The trained model.
        method: As applied.
        tokenizer: The tokenizer of the rows.
        result: The outcome of training, for the model card.
        data: One line on the rows, for the model card.
        base: The adapter's base, if it is not the model that the config names.

    Returns:
        The adapter folder.

    Raises:
        DiskError: It cannot be written.
    """
    folder = run.folder / "adapter"
    save_adapter(model, method, folder, base=base or run.config.model.path, data=data, metrics=summary(result))
    if tokenizer.changed:
        tokenizer.save(folder)
    if isinstance(run.config.data, DataConfig):
        save_reading(run.config.data, folder)
    return folder


def card_of_model(run: Run, data: str, metrics: Mapping[str, object]) -> str:
    """The model card of a whole model that was finetuned on ``data``."""
    base = run.config.model.path
    title = f"{base.name}, finetuned"
    return model_card(title, base=str(base), method="full", data=data, metrics=metrics, adapter=False)


def finish(run: Run, result: FitResult, saved: Path, next_command: str) -> Path:
    """Print the outcome and the next command, and write ``result.json``, which marks the run as complete.

    Args:
        run: The run.
        result: The outcome of training.
        saved: The folder of the adapter or model.
        next_command: What the user may run next.

    Returns:
        The run folder.
    """
    rows = []
    for name, value in summary(result).items():
        rows.append([name, f"{value:.4f}" if isinstance(value, float) else value])
    log.table("Result", ["metric", "value"], rows)
    _warn_if_not_improved(result)

    metrics = asdict(result)
    metrics["tokens_per_second"] = result.tokens_per_second
    metrics["written_bytes"] = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    write_text(run.folder / "result.json", json.dumps(metrics, indent=1) + "\n")

    log.say(f"wrote {saved}, plot {run.folder / 'loss.png'}", style="bold green")
    log.say(f"next: {next_command}")
    return run.folder


def _warn_if_not_improved(result: FitResult) -> None:
    before, after = result.untrained_validation_loss, result.validation_loss
    if before is not None and after is not None and after >= before:
        log.warn(
            "the validation loss did not fall: try a lower optimizer.lr, and inspect the rows with "
            "lit-lora prepare FILE --show 3"
        )


def summary(result: FitResult) -> dict[str, object]:
    """The metrics of a run by their printed names, without those that were not measured."""
    metrics: dict[str, object] = {
        "Steps": result.steps,
        "Best step": result.best_step,
        "Training loss": result.loss,
        "Validation loss before training": result.untrained_validation_loss,
        "Validation loss": result.validation_loss,
    }
    for name, value in result.metrics.items():
        metrics[f"Validation {name.replace('_', ' ')}"] = value
    metrics["Tokens per second"] = round(result.tokens_per_second)
    metrics["Peak memory"] = human_bytes(result.peak_memory_bytes)
    return {name: value for name, value in metrics.items() if value is not None}

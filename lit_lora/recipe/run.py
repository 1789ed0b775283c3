"""A run from its start to its result: the folder, what is kept and written there, what the command line asks of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_lora import log
from lit_lora.config import dump_yaml, load_config
from lit_lora.errors import DiskError, UsageError
from lit_lora.files import disk_errors, human_bytes, lock_folder, remove_folder, write_text
from lit_lora.peft import Method, model_card, rows_for_init, save_adapter
from lit_lora.peft.files.frozen_state import keep_frozen, keep_method
from lit_lora.recipe.config import RunConfig
from lit_lora.tokenizer import Tokenizer
from lit_lora.train.device import choose_device, choose_dtype
from lit_lora.train.loop import FitResult
from lit_lora.train.run import TrainingRun

__all__ = ["Options", "Run", "begin", "card_of_model", "finish", "start", "summary", "write_adapter"]


@dataclass(frozen=True)
class Options:
    """What the command line asks of a run beside its config."""

    dry_run: bool = False
    """Stop before the first step, write nothing."""
    resume: bool = False
    """Continue after the newest checkpoint of the run folder."""
    overwrite: bool = False
    """Replace a run that is in the folder already."""


@dataclass(frozen=True)
class Run:
    """A started run."""

    config: RunConfig
    options: Options
    device: torch.device
    dtype: torch.dtype

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.config.out

    @property
    def training(self) -> TrainingRun:
        """The run as the loop takes it."""
        config = self.config
        return TrainingRun(
            config.train, config.optimizer, config.schedule, self.folder, config.seed, self.options.resume
        )


def start(config: RunConfig, options: Options) -> Run:
    """Seed, choose device and dtype, and look whether the run folder can be used.

    Raises:
        DiskError: The folder is a file.
        UsageError: It holds another run, or none to resume, or the device is not there.
    """
    torch.manual_seed(config.seed)
    device = choose_device(config.model.device)
    run = Run(config, options, device, choose_dtype(config.model.dtype, device))
    saved = run.folder / "config.yaml"
    if run.folder.exists() and not run.folder.is_dir():
        raise DiskError(f"{run.folder}: is a file, expected a folder for the run", hint="choose another out=FOLDER")
    if options.resume and not saved.is_file():
        raise UsageError(f"{run.folder}: holds no run to resume", hint="leave --resume out to start one")
    if options.resume:
        _check_same_run(saved, config)
    elif saved.is_file() and not (options.overwrite or options.dry_run):
        raise UsageError(
            f"{run.folder}: holds a run already",
            hint="--resume continues it, --overwrite replaces it, out=FOLDER starts another beside it",
        )
    return run


def begin(run: Run, model: nn.Module, method: Method) -> bool:
    """Take the run folder and write the config into it; a run that is to be replaced is removed only now.

    What the adapter has beside what trains is kept there, and taken from there where the run is resumed.

    Args:
        run: The run.
        model: With its method applied.
        method: As it was applied; a start from rows may have changed its settings.

    Returns:
        Whether to train: a dry run ends here, with nothing written.

    Raises:
        DiskError: The folder cannot be written.
        InputError: What a run to resume has kept does not fit.
        UsageError: Another process is training in it.
    """
    if run.options.dry_run:
        return False
    _hold(run.folder)
    if run.options.overwrite and not run.options.resume:
        _remove_run(run.folder)
    keep_frozen(model, run.folder / "start", resume=run.options.resume)
    if rows_for_init(method) and not run.options.resume:
        keep_method(run.folder / "start", method)
    write_text(run.folder / "config.yaml", dump_yaml(run.config))
    return True


_HELD: dict[tuple[int, int], int] = {}
"""Handles of the folders that this process trains in, by device and inode; the system closes them with the process."""


def _hold(folder: Path) -> None:
    """Keep other processes out of a run folder until this one ends, also by SIGKILL; it is made where there is none.

    Raises:
        DiskError: It cannot be made.
        UsageError: Another process holds it.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    about = folder.stat()
    if (about.st_dev, about.st_ino) in _HELD:
        return
    try:
        _HELD[about.st_dev, about.st_ino] = lock_folder(folder)
    except BlockingIOError:
        raise UsageError(
            f"{folder}: another process is training in it", hint="wait for it or stop it, or take another out=FOLDER"
        ) from None
    except OSError:  # there are no such locks here
        return


# What a resumed run may do differently; anything else makes it another run.
_MAY_CHANGE = {"out", "model.device", "train.micro_batch_tokens", "train.activation_checkpointing"} | {
    f"train.{key}" for key in ("eval_every", "save_every", "keep_last", "patience", "samples")
}


def _check_same_run(saved: Path, config: RunConfig) -> None:
    """Refuse to resume under another config.

    Raises:
        UsageError: Naming the keys that differ.
    """
    old, new = _flat(load_config(saved, type(config))), _flat(config)
    differing = [key for key in new.keys() | old.keys() if key not in _MAY_CHANGE and old.get(key) != new.get(key)]
    if differing:
        raise UsageError(
            f"{saved}: the run to resume has other settings: {', '.join(sorted(differing))}",
            hint="resume with the same config, or start a new run with out=ANOTHER_FOLDER",
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    """``section.key`` to value."""
    flat: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json").items():
        flat.update(
            {f"{section}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {section: value}
        )
    return flat


def _remove_run(folder: Path) -> None:
    """Remove what a former run wrote into ``folder``, and nothing else."""
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
    """Write the adapter in ``model`` to ``adapter/`` in the run folder, with its own tokenizer where tokens were added.

    Args:
        run: The run.
        model: Trained.
        method: As it was applied.
        tokenizer: The one that the rows were tokenized with.
        result: What the training came to, for the model card.
        data: What the rows are, for the model card.
        base: The adapter's base, where it is not the model that the config names.

    Returns:
        The adapter folder.

    Raises:
        DiskError: It cannot be written.
    """
    folder = run.folder / "adapter"
    save_adapter(model, method, folder, base=base or run.config.model.path, data=data, metrics=summary(result))
    if tokenizer.extended:
        tokenizer.save(folder)
    return folder


def card_of_model(run: Run, data: str, metrics: Mapping[str, object]) -> str:
    """The model card of a whole model, finetuned on ``data``."""
    base = run.config.model.path
    return model_card(
        f"{base.name}, finetuned", base=str(base), method="full", data=data, metrics=metrics, adapter=False
    )


def finish(run: Run, result: FitResult, written: Path, next_command: str) -> Path:
    """Print what came out and what to type next, and write ``result.json``: with it the run is complete.

    Returns:
        The run folder.
    """
    rows = [[name, f"{value:.4f}" if isinstance(value, float) else value] for name, value in summary(result).items()]
    log.table("Result", ["what", "figure"], rows)
    before, after = result.untrained_validation_loss, result.validation_loss
    if before is not None and after is not None and after >= before:
        log.warn(
            "the validation loss did not fall: try a lower optimizer.lr, and look at the rows with "
            "lit-lora prepare FILE --show 3"
        )
    metrics = {**asdict(result), "tokens_per_second": result.tokens_per_second}
    weights = sum(path.stat().st_size for path in written.glob("*.safetensors"))
    write_text(run.folder / "result.json", json.dumps({**metrics, "written_bytes": weights}, indent=1) + "\n")
    log.say(f"wrote {written}, plot {run.folder / 'loss.png'}", style="bold green")
    log.say(f"next: {next_command}")
    return run.folder


def summary(result: FitResult) -> dict[str, object]:
    """The figures of a run for its model card and its closing lines."""
    metrics = {
        "Steps": result.steps,
        "Best step": result.best_step,
        "Training loss": result.loss,
        "Validation loss before training": result.untrained_validation_loss,
        "Validation loss": result.validation_loss,
        **{f"Validation {name.replace('_', ' ')}": value for name, value in result.metrics.items()},
        "Tokens per second": round(result.tokens_per_second),
        "Peak memory": human_bytes(result.peak_memory_bytes),
    }
    return {name: figure for name, figure in metrics.items() if figure is not None}

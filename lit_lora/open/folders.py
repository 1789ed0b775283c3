"""Decide which base and which adapter belong to a folder that the user names, for every command.

A run folder contains ``config.yaml`` and, if trained, ``adapter/`` or ``model/``. Config and adapter name the base.
"""

from __future__ import annotations

from pathlib import Path

from lit_lora.config import read_yaml
from lit_lora.errors import InputError, UsageError
from lit_lora.hf import read_config
from lit_lora.model.quantization import PACKED, quantization_method
from lit_lora.peft import quantization_of, read_adapter
from lit_lora.quantize import QuantizeConfig

__all__ = ["find_adapter", "find_base", "find_folders", "held_base"]


def find_folders(model: Path, *, adapter: Path | None = None) -> tuple[Path, Path | None]:
    """The checkpoint folder and the adapter folder (if any) to open for a folder that the user names.

    Args:
        model: A checkpoint, a run or an adapter; the last two name their base.
        adapter: An adapter, or a run with one, to use instead of the run's.

    Raises:
        InputError: A folder contains no model or adapter.
        UsageError: The base of a run or adapter is not on this machine.
    """
    requested_adapter = None if adapter is None else find_adapter(adapter)
    model = Path(model)
    for folder in (model, model / "model"):
        if (folder / "config.json").is_file():
            return folder, requested_adapter

    trained_adapter = _adapter_in(model)
    if trained_adapter is None:
        raise _no_model(model)
    base = find_base(model, hint=f"name the base first: BASE_FOLDER --adapter {trained_adapter}")
    return base, requested_adapter or trained_adapter


def _no_model(folder: Path) -> InputError:
    """The error for a folder with neither a model nor an adapter, and what to do about it."""
    if (folder / "config.yaml").is_file():
        return _untrained(folder)
    if folder.exists():
        return InputError(
            f"{folder}: expected config.json (a model), adapter_config.json (an adapter) or adapter/ (a run) in it",
            hint="lit-lora convert makes a model folder from a GGUF or .pth file" if folder.is_file() else None,
        )
    run = folder.parent
    if folder.name == "merged" and _adapter_in(run) is not None:
        return InputError(f"{folder}: {run} has not been merged yet", hint=f"lit-lora merge {run}")
    return InputError(f"{folder}: no such folder", hint="lit-lora download fetches a model")


def find_adapter(source: Path) -> Path:
    """The adapter folder of ``source``, an adapter or a run.

    Raises:
        InputError: It has none.
    """
    source = Path(source)
    adapter = _adapter_in(source)
    if adapter is not None:
        return adapter
    if not source.exists():
        raise InputError(f"{source}: no such folder")
    if (source / "model" / "config.json").is_file():
        raise InputError(f"{source}: this run trained a whole model, it has no adapter")
    if (source / "config.yaml").is_file():
        raise _untrained(source)
    raise InputError(f"{source}: no adapter_config.json in it, expected a run folder or an adapter folder")


def find_base(source: Path, *, hint: str) -> Path:
    """The base model of a run or an adapter: the first path it names that exists, as written or relative to it.

    Args:
        source: A run folder or an adapter folder.
        hint: How the user can name the base instead.

    Raises:
        InputError: The adapter is broken.
        UsageError: No base that it names is on this machine.
    """
    named: list[str] = []
    candidates: list[Path] = []
    configured_base = _configured_base(source)
    if configured_base is not None:
        named.append(configured_base)
        candidates += [Path(configured_base), source / configured_base]

    folder = _adapter_in(source)
    if folder is not None:
        adapter = read_adapter(folder)
        # A base whose codes the method chose comes first: the config names the original, which does not fit.
        candidates = adapter.base_beside + candidates
        if adapter.base:
            named.append(adapter.base)
            candidates += [Path(adapter.base), folder / adapter.base]

    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise UsageError(f"{source}: base model {named[0] if named else '(none named)'} not found", hint=hint)


def held_base(base: Path, adapter: Path) -> QuantizeConfig | None:
    """How to quantize ``base`` so that it is what ``adapter`` was trained on; ``None`` if it needs no quantization.

    Raises:
        InputError: A folder is broken.
    """
    stays_quantized = quantization_method(read_config(base).source) in PACKED
    return None if stays_quantized else quantization_of(adapter)


def _configured_base(run: Path) -> str | None:
    """``model.path`` of a run's config, which a user may have edited; ``None`` if there is none."""
    file = run / "config.yaml"
    if not file.is_file():
        return None
    try:
        path = read_yaml(file)["model"]["path"]
    except (KeyError, TypeError):
        return None
    return path if isinstance(path, str) and path else None


def _adapter_in(source: Path) -> Path | None:
    """The adapter folder: ``source`` itself or ``adapter/`` in it, if either is one."""
    for folder in (source, source / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None


def _untrained(run: Path) -> InputError:
    return InputError(
        f"{run}: this run has written no adapter yet",
        hint=f"lit-lora finetune --config {run / 'config.yaml'} --resume",
    )

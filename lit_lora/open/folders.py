"""Which base and which adapter belong to a folder that the user names: the one place that knows.

A run folder has ``config.yaml`` and, if trained, ``adapter/`` or ``model/``; the config and the adapter name the base.
"""

from __future__ import annotations

from pathlib import Path

from lit_lora.config import read_yaml
from lit_lora.errors import InputError, UsageError
from lit_lora.model import ModelConfig
from lit_lora.peft import quantization_of, read_adapter
from lit_lora.quantize import QuantizeConfig

__all__ = ["find_adapter", "find_base", "find_folders", "held_base"]


def find_folders(model: Path, *, adapter: Path | None = None) -> tuple[Path, Path | None]:
    """The checkpoint folder and the adapter folder (if any) that a model to use means.

    Args:
        model: A checkpoint, a run or an adapter; the last two bring their base.
        adapter: An adapter, or a run with one, in the place of the run's own.

    Raises:
        InputError: A folder holds no model or adapter.
        UsageError: The base of a run or adapter is not on this machine.
    """
    chosen = None if adapter is None else find_adapter(adapter)
    model = Path(model)
    for folder in (model, model / "model"):
        if (folder / "config.json").is_file():
            return folder, chosen
    own = _adapter_in(model)
    if own is not None:
        return find_base(model, hint=f"name the base first: BASE_FOLDER --adapter {own}"), chosen or own
    if (model / "config.yaml").is_file():
        raise _untrained(model)
    if model.exists():
        raise InputError(
            f"{model}: expected config.json (a model), adapter_config.json (an adapter) or adapter/ (a run) in it",
            hint="lit-lora convert makes a model folder of a GGUF or .pth file" if model.is_file() else None,
        )
    if model.name == "merged" and _adapter_in(model.parent) is not None:
        raise InputError(f"{model}: {model.parent} has not been merged yet", hint=f"lit-lora merge {model.parent}")
    raise InputError(f"{model}: no such folder", hint="lit-lora download fetches a model")


def find_adapter(source: Path) -> Path:
    """The adapter folder that ``source`` is, or that lies in the run ``source``.

    Raises:
        InputError: There is none.
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
    """The base model of a run or an adapter: the first that it names, as written or relative to it, on this machine.

    A base whose codes the method chose lies beside the adapter; the original, which the config names, is another.

    Args:
        source: A run folder or an adapter folder.
        hint: How the user can name the base instead.

    Raises:
        InputError: The adapter is broken.
        UsageError: No such folder is on this machine.
    """
    named: list[tuple[str, Path]] = []  # a path, and what it may be relative to
    places: list[Path] = []
    configured = _configured_base(source)
    if configured is not None:
        named.append((configured, source))
    folder = _adapter_in(source)
    if folder is not None:
        adapter = read_adapter(folder)
        places += adapter.base_beside
        if adapter.base:
            named.append((adapter.base, folder))
    for path, beside in named:
        places += [Path(path), beside / path]
    for place in places:
        if (place / "config.json").is_file():
            return place
    shown = named[0][0] if named else "none named"
    raise UsageError(f"{source}: its base model ({shown}) is not a folder here", hint=hint)


def held_base(base: Path, adapter: Path) -> QuantizeConfig | None:
    """How ``base`` is to be quantized to be what ``adapter`` was trained on; ``None`` where it is that already.

    Raises:
        InputError: A folder is broken.
    """
    quantized = ModelConfig.from_folder(base).source.get("quantization_config")
    return None if quantized else quantization_of(adapter)


def _configured_base(run: Path) -> str | None:
    """``model.path`` of a run's config; ``None`` where there is no such config."""
    settings = read_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else None
    model = settings.get("model") if isinstance(settings, dict) else None
    path = model.get("path") if isinstance(model, dict) else None
    return path if isinstance(path, str) and path else None


def _adapter_in(source: Path) -> Path | None:
    """The folder itself or ``adapter/`` in it, whichever is an adapter."""
    return next((f for f in (source, source / "adapter") if (f / "adapter_config.json").is_file()), None)


def _untrained(run: Path) -> InputError:
    return InputError(
        f"{run}: this run has written no adapter yet",
        hint=f"lit-lora finetune --config {run / 'config.yaml'} --resume",
    )

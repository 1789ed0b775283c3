"""Which base and which adapter a folder means that the user names."""

from __future__ import annotations

from pathlib import Path

from lit_lora.errors import InputError, UsageError
from lit_lora.model import ModelConfig
from lit_lora.peft import quantization_of, read_adapter
from lit_lora.quantize import QuantizeConfig

__all__ = ["find_folders", "held_base"]


def held_base(base: Path, adapter: Path) -> QuantizeConfig | None:
    """How ``base`` is to be quantised to be what ``adapter`` was trained on; ``None`` where it is that already.

    Raises:
        InputError: A folder is broken.
    """
    quantized = ModelConfig.from_folder(base).source.get("quantization_config")
    return None if quantized else quantization_of(adapter)


def find_folders(model: Path, *, adapter: Path | None = None) -> tuple[Path, Path | None]:
    """The checkpoint folder and the adapter folder (if any) that :func:`open_model` opens for these arguments.

    Raises:
        InputError: A folder holds no model or adapter.
        UsageError: The base of a run or adapter is not on this machine.
    """
    base, own = _find(Path(model))
    return base, _adapter_folder(Path(adapter)) if adapter is not None else own


def _find(model: Path) -> tuple[Path, Path | None]:
    """The checkpoint and the adapter that a folder means.

    Raises:
        InputError: It holds neither.
    """
    for folder in (model, model / "model"):
        if (folder / "config.json").is_file():
            return folder, None
    for folder in (model, model / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return _base_of(folder), folder
    if not model.exists():
        run = model.parent
        if model.name == "merged" and (run / "adapter" / "adapter_config.json").is_file():
            raise InputError(f"{model}: {run} has not been merged yet", hint=f"lit-lora merge {run}")
        raise InputError(f"{model}: no such folder", hint="lit-lora download fetches a model")
    if (model / "config.yaml").is_file():
        raise InputError(
            f"{model}: this run has written no adapter yet",
            hint=f"lit-lora finetune --config {model / 'config.yaml'} --resume",
        )
    raise InputError(
        f"{model}: expected config.json (a model), adapter_config.json (an adapter) or adapter/ (a run) in it",
        hint="lit-lora convert makes a model folder of a GGUF or .pth file" if model.is_file() else None,
    )


def _adapter_folder(adapter: Path) -> Path:
    for folder in (adapter, adapter / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    if not adapter.exists():
        raise InputError(f"{adapter}: no such folder")
    raise InputError(f"{adapter}: expected adapter_config.json in it (an adapter) or in adapter/ (a run)")


def _base_of(adapter: Path) -> Path:
    """The base that an adapter names, as written or relative to where the adapter lies; first, one kept beside it.

    Raises:
        UsageError: It is not a folder here.
    """
    found = read_adapter(adapter)
    named = found.base
    places: list[Path] = [*found.base_beside, *((Path(named), adapter / named) if named else ())]
    for folder in places:
        if (folder / "config.json").is_file():
            return folder
    raise UsageError(
        f"{adapter}: its base model ({named or 'none named'}) is not a folder here",
        hint=f"name the base first: BASE_FOLDER --adapter {adapter}",
    )

"""An adapter, by its config and the header of its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_lora.checkpoint.headers import Header
from lit_lora.errors import UsageError
from lit_lora.files import read_json
from lit_lora.inspection.report import AdapterFacts, Inspection
from lit_lora.open.folders import find_base
from lit_lora.peft.core.adapter_method import CONFIG, WEIGHTS
from lit_lora.peft.files.adapter import EXTRAS, method_of
from lit_lora.peft.files.model_card import card_row

__all__ = ["inspect_adapter"]


def inspect_adapter(report: Inspection, folder: Path, read: Callable[[str], Mapping[str, Header]], local: bool) -> None:
    """Describe an adapter, and what is wrong with it.

    Args:
        report: Where to put it.
        folder: The adapter folder.
        read: The header of one of its files, by name.
        local: Whether the folder has the weights, and its base may be on this machine.
    """
    report.format = "PEFT"
    tensors: Mapping[str, Header] = {}
    settings: Mapping[str, Any] = {}
    with report.noting_errors():
        tensors = read(WEIGHTS)
    with report.noting_errors():
        settings = read_json(folder / CONFIG)
        method_of(settings)
    base_folder = _base_folder(report, folder) if local and report.usable else None
    with report.noting_errors():
        report.adapter = _facts(folder, settings, tensors, base_folder)


def _facts(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Header], base_folder: str | None
) -> AdapterFacts:
    extras = read_json(folder / EXTRAS) if (folder / EXTRAS).is_file() else {}
    saved = extras.get("method")
    method = saved if isinstance(saved, dict) else {}
    peft_type = str(settings.get("peft_type"))
    dtypes: Counter[str] = Counter()
    for header in tensors.values():
        dtypes[header.dtype] += header.bytes
    return AdapterFacts(
        method=str(method.get("name") or peft_type.lower()),
        peft_type=peft_type,
        rank=settings.get("r"),
        alpha=settings.get("lora_alpha"),
        targets=_names(settings.get("target_modules")),
        modules_to_save=_names(settings.get("modules_to_save")),
        base=settings.get("base_model_name_or_path") or None,
        base_folder=base_folder,
        data=card_row(folder, "Data") or None,
        parameters=sum(header.numel for header in tensors.values()),
        bytes=sum(header.bytes for header in tensors.values()),
        dtypes=dict(dtypes),
    )


def _base_folder(report: Inspection, folder: Path) -> str | None:
    """Where the base is on this machine. If it is not, the user can still name another place."""
    with report.noting_errors():
        try:
            return str(find_base(folder, hint="download it, or name its folder with --base"))
        except UsageError as error:
            report.warn(str(error), error.hint)
    return None


def _names(value: Any) -> list[str]:
    """Names of modules, or a regular expression, as PEFT writes them."""
    if isinstance(value, list):
        return [str(name) for name in value]
    return [value] if isinstance(value, str) else []

"""Adapter folders in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

Each method defines the contents of its files. Features that are not supported are refused by name, never ignored. In
addition to PEFT's two files, ``lit_lora.json`` has values at a few positions of the base model, so that an adapter is
not loaded onto another base; without it, an adapter is checked by names and shapes only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_lora.config import validate
from lit_lora.errors import InputError, LitLoraError, UsageError, first_line
from lit_lora.files import atomic_folder, disk_errors, read_json
from lit_lora.peft.core.adapter_method import CONFIG, OWN, WEIGHTS, AdapterMethod
from lit_lora.peft.core.added import AddedMethod
from lit_lora.peft.core.base_tensors import base_tensors
from lit_lora.peft.core.capabilities import ChoosesCodes
from lit_lora.peft.core.matching import listed
from lit_lora.peft.core.method import Method
from lit_lora.peft.core.modules import model_updates, own_modules
from lit_lora.peft.core.targeted import TargetedMethod, layer_number
from lit_lora.peft.core.updates import Replace
from lit_lora.peft.files.fingerprint import fingerprint
from lit_lora.peft.files.model_card import model_card
from lit_lora.peft.lora.file import LoRAFile
from lit_lora.peft.prompts.virtual_tokens import EMBEDDINGS
from lit_lora.peft.table import methods
from lit_lora.quantize import QuantizeConfig, found_config

__all__ = ["EXTRAS", "Adapter", "method_of", "quantization_of", "read_adapter", "save_adapter"]

EXTRAS = "lit_lora.json"
_PREFIX = "base_model.model."
_UNPREFIXED = (EMBEDDINGS, "base_model.")  # starts of names that PEFT writes without the prefix
_BASE_COPY = ".base_layer.weight"

# Keys of adapter_config.json without effect on a finished adapter. Any other is supported by the method, or empty.
_INERT = {"peft_type", "base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform"}
_INERT |= {"layers_pattern", "modules_to_save", "auto_mapping", "inference_mode", "revision", "task_type"}
_INERT |= {"peft_version", "runtime_config"}
_INERT |= {"fan_in_fan_out"}  # how the base stores its weights, as GPT-2 does; the adapter's are the same


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was read and checked by itself, not yet against a model."""

    folder: Path
    """The adapter folder."""
    base: str | None
    """The base model that it names: a folder or a Hub id."""
    config: AdapterMethod
    """Settings that describe it; ``save_adapter`` accepts them to write it again."""
    values: dict[str, Tensor]
    """Its tensors by the names that ``config`` gives them."""
    base_copies: dict[str, Tensor]
    """Base tensors that PEFT wrote into the file; the base must have the same."""
    fingerprint: dict[str, Any] | None
    """Values at a few positions of the base it was trained on."""
    raw: dict[str, Any]
    """The contents of ``adapter_config.json``."""
    quantize: QuantizeConfig | None
    """The quantization of the base it was trained on."""
    own_base: bool
    """Whether its method chose the codes of the base it was trained on."""
    task: dict[str, Any] | None
    """What its head predicts, as saved by the recipe."""

    @property
    def tensors(self) -> int:
        """Number of its tensors."""
        return len(self.values)

    @property
    def base_beside(self) -> list[Path]:
        """The base folder that its run saved next to it, or nothing."""
        base = self.folder.absolute().parent / "base"
        return [base] if self.own_base and (base / "config.json").is_file() else []

    def require_updates(self) -> None:
        """Check that the adapter changes the base's weights, so that it can be merged.

        Raises:
            InputError: It adds modules to the base instead.
        """
        if isinstance(self.config, AddedMethod):
            raise InputError(
                f"{self.folder}: cannot be merged: {self.config.about} adds modules instead of changing weights",
                hint="use it as it is, with lit-lora chat RUN, or train with recipe: lora for a merged model",
            )

    def listed_targets(self, modules: Iterable[str]) -> list[str]:
        """Those of a model's modules that ``adapter_config.json`` lists as targets."""
        targets = self.raw.get("target_modules")
        excluded = self.raw.get("exclude_modules") or []
        if not isinstance(targets, list) or not isinstance(excluded, list):
            return []  # a regular expression of PEFT's, which is not evaluated: the tensors say what is adapted
        in_full = [name for name in self.raw.get("modules_to_save") or [] if isinstance(name, str)]
        layers = self.raw.get("layers_to_transform")
        if isinstance(layers, int):
            layers = [layers]

        def ends_with_any(module: str, names: list[str]) -> bool:
            return any(f".{module}".endswith(f".{name}") for name in names)

        chosen = []
        for module in modules:
            in_layers = not layers or layer_number(module) in layers
            if in_layers and ends_with_any(module, targets) and not ends_with_any(module, [*excluded, *in_full]):
                chosen.append(module)
        return chosen


def save_adapter(
    model: nn.Module,
    config: Method,
    folder: Path,
    *,
    base: str | Path,
    data: str = "",
    metrics: Mapping[str, object] | None = None,
    task: Mapping[str, Any] | None = None,
    task_type: str = "CAUSAL_LM",
) -> Path:
    """Write the adapter in ``model`` to ``folder``, atomically; an older one is replaced.

    Args:
        model: With an adapter.
        config: The settings it was applied with.
        folder: The adapter folder.
        base: Folder or Hub id of the base model.
        data: What it was trained on, for the model card.
        metrics: Further rows for the model card.
        task: What a head in it predicts, as plain data.
        task_type: PEFT's name for the model's task.

    Returns:
        The folder.

    Raises:
        UsageError: The model has no adapter.
        DiskError: The disk is full or read-only; an older adapter is kept.
    """
    if not own_modules(model) or not isinstance(config, AdapterMethod):
        raise UsageError(f"{folder}: the model has no adapter to save")
    config = config.model_copy(update={"init_adapter": None})  # where its values came from says nothing about it
    tensors = {
        name if name.startswith(_UNPREFIXED) else _PREFIX + name: tensor.detach().cpu().contiguous()
        for name, tensor in config.file_tensors(model).items()
    }
    settings = {**config.peft_config(model), "base_model_name_or_path": str(base)}
    if "task_type" in settings:
        settings["task_type"] = task_type
    # A module that trains in full, such as a new head, may be random in the base too, so it does not identify the base.
    replaced = [name for name, update in model_updates(model).items() if isinstance(update, Replace)]
    extras = {"format": 1, "base": fingerprint(base_tensors(model), replaced), "method": config.model_dump(mode="json")}
    if task is not None:
        extras["task"] = dict(task)
    if isinstance(config, ChoosesCodes):
        extras["own_base"] = True
    quantize = found_config(model)
    if quantize is not None:
        extras["quantize"] = quantize.model_dump(mode="json")
        metrics = {"Base quantized as": str(quantize), **(metrics or {})}
    with atomic_folder(folder, replace=True) as temporary, disk_errors(folder):
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        _write_json(temporary / CONFIG, settings)
        _write_json(temporary / EXTRAS, extras)
        card = model_card(
            f"{config.title} adapter for {Path(base).name}",
            base=str(base),
            method=config.about,
            data=data,
            metrics=metrics,
            adapter=True,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder, PEFT's or ours.

    Raises:
        InputError: Files are missing or broken, values are not finite, or it needs an unsupported feature.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    tensors = {_text_name(name.removeprefix(_PREFIX)): tensor for name, tensor in _read_tensors(folder).items()}
    not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if not_finite:
        raise InputError(f"{folder / WEIGHTS}: {listed(not_finite)} with NaN or infinite values")
    extras = _extras(folder)
    copies = {name: tensor for name, tensor in tensors.items() if name.endswith(_BASE_COPY)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in copies}
    try:
        method = method_of(raw)
        values = method.normalized(raw, tensors)
        config = _settings(method, raw, extras, values)
    except LitLoraError as error:
        raise InputError("\n".join(f"{folder}/{line}" for line in str(error).splitlines()), error.hint) from error
    return Adapter(
        folder=folder,
        base=raw.get("base_model_name_or_path") or None,
        config=config,
        values=values,
        base_copies={name.replace(_BASE_COPY, ".weight"): tensor for name, tensor in copies.items()},
        fingerprint=extras.get("base"),
        raw=raw,
        quantize=quantization_of(folder),
        own_base=bool(extras.get("own_base")),
        task=extras.get("task"),
    )


def quantization_of(folder: Path) -> QuantizeConfig | None:
    """How the base was quantized when an adapter was trained; ``None`` if it was not, or the file does not say.

    Raises:
        InputError: The settings in the file are not valid.
    """
    settings = _extras(folder).get("quantize")
    if settings is None:
        return None
    try:
        return validate(settings, QuantizeConfig, name=f"{folder / EXTRAS}: quantize")
    except UsageError as error:
        raise InputError(str(error)) from error


def _extras(folder: Path) -> dict[str, Any]:
    return read_json(folder / EXTRAS) if (folder / EXTRAS).is_file() else {}


def method_of(raw: Mapping[str, Any]) -> type[AdapterMethod]:
    """The method that reads an adapter with this ``adapter_config.json``, all of whose keys it supports.

    Raises:
        InputError: No method does.
    """
    # Several methods save a plain LoRA, and one reads them all.
    by_type: dict[str, type[AdapterMethod]] = {LoRAFile.peft_type: LoRAFile}
    for name, each in methods().items():
        if not issubclass(each, AdapterMethod):
            continue
        if each.peft_type is not None:
            by_type.setdefault(each.peft_type, each)
        by_type.setdefault(OWN + name.upper(), each)  # for forms that PEFT lacks, though it has the method

    peft_type = raw.get("peft_type")
    method = by_type.get(str(peft_type))
    if method is None:
        supported = ", ".join(name for name in by_type if not name.startswith(OWN))
        raise InputError(f"{CONFIG}: peft_type {peft_type!r} is not supported, expected one of: {supported}")
    if issubclass(method, TargetedMethod):  # the others check their keys themselves
        read = _INERT | method.peft_keys
        refused = [f"{key} {json.dumps(value)[:60]}" for key, value in raw.items() if value and key not in read]
        if refused:
            raise InputError(f"{CONFIG}: not supported: {'; '.join(refused)}")
    return method


def _settings(
    method: type[AdapterMethod], raw: Mapping[str, Any], extras: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> AdapterMethod:
    """The settings that describe an adapter: those that lit-lora saved, else those that PEFT's config implies.

    Raises:
        InputError: The file needs an unsupported feature.
        UsageError: They are not valid for the method.
    """
    saved = extras.get("method")
    if issubclass(method, AddedMethod) and str(raw["peft_type"]).startswith(OWN):
        return validate(raw.get("settings"), method, name=CONFIG)
    if method.as_written and isinstance(saved, dict):
        return validate(saved, method, name=EXTRAS)
    return method.from_peft(raw, tensors)


def _text_name(name: str) -> str:
    """What a module of the text model is called in the text model alone, as lit-lora has it.

    PEFT on a composite model writes ``model.language_model.layers`` or, with transformers 4,
    ``language_model.model.layers``.
    """
    return ".".join(part for part in name.split(".") if part != "language_model")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected an adapter folder with {CONFIG} and {WEIGHTS}")
    return read_json(path)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"{folder / 'adapter_model.bin'}: a pickle file, which can run code when it is loaded; "
                f"expected {WEIGHTS}",
                hint="load and save it again with a recent PEFT, which writes safetensors",
            )
        raise InputError(f"{path}: no such file")
    path.open("rb").close()  # raises for an unreadable file, which safetensors would report as missing
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"{path}: truncated or not a safetensors file ({reason})", hint="copy it again") from error


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

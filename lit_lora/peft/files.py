"""Adapter folders in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``.

PEFT's names (``r``, ``lora_alpha``) appear only here. What a file asks for and this package does not do is refused by
name, never ignored. Beside PEFT's two files lies ``lit_lora.json`` with values at a few places of the base model, so
that an adapter is not put on another base; an adapter without it is checked by names and shapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_lora.config import validate
from lit_lora.errors import InputError, UsageError
from lit_lora.files import atomic_folder, disk_errors
from lit_lora.peft.added import AddedMethod
from lit_lora.peft.added_files import added_types, read_added
from lit_lora.peft.base import Method, base_tensors, own_modules
from lit_lora.peft.card import model_card
from lit_lora.peft.fingerprint import fingerprint
from lit_lora.peft.lora import LoRAConfig, LoRAEmbedding, LoRALinear, layer_number
from lit_lora.peft.trained import TokenEmbedding, TokenHead, TrainedCopy
from lit_lora.peft.updates import LowRank, Replace, Rows, Update, Updates
from lit_lora.peft.virtual import EMBEDDINGS
from lit_lora.quantize import QuantizeConfig, found_config

__all__ = ["Adapter", "listed", "quantization_of", "read_adapter", "save_adapter"]

WEIGHTS, CONFIG, EXTRAS = "adapter_model.safetensors", "adapter_config.json", "lit_lora.json"
_PREFIX = "base_model.model."

# Keys of adapter_config.json that are read, or that change nothing in a finished adapter. Any other must be empty.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "bias"}
_READ |= {"base_model_name_or_path", "trainable_token_indices"}
_INERT = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
_INERT |= {"auto_mapping", "inference_mode", "revision", "task_type", "peft_version", "runtime_config"}
_INERT |= {"megatron_core", "qalora_group_size", "init_lora_weights", "eva_config"}
# Inits that leave the base as it is; PiSSA and its like store an adapter that needs a changed base.
_PLAIN_INITS = {None, True, False, "gaussian", "eva", "orthogonal"}


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that was read and checked in itself, not yet against a model."""

    folder: Path
    """Where it lies."""
    base: str | None
    """The base model that it names: a folder or a Hub id."""
    config: Method
    """Settings that describe it; ``save_adapter`` takes them to write it again."""
    updates: dict[str, Update]
    """What it does, by the names of the base's tensors."""
    base_copies: dict[str, Tensor]
    """Base tensors that PEFT wrote into the file; the base must have the same."""
    fingerprint: dict[str, Any] | None
    """Values at a few places of the base it was trained on."""
    raw: dict[str, Any]
    """``adapter_config.json`` as it was read."""
    tensors: int
    """Tensors in the file."""
    quantize: QuantizeConfig | None = None
    """How the base was quantised that it was trained on."""
    added: dict[str, Tensor] = field(default_factory=dict)
    """The tensors of a method that adds modules: no update of a base tensor says what they do."""

    def require_updates(self) -> None:
        """Make sure that all of the adapter is in its updates, so that it can be merged.

        Raises:
            InputError: It has modules of its own beside the base's.
        """
        if self.added:
            raise InputError(
                f"{self.folder}: cannot be merged: {self.config.about} computes beside the base's weights, no weight "
                "can hold that",
                hint="use it as it is, lit-lora chat RUN, or train by recipe: lora for a merged model",
            )

    def lacking(self, modules: Iterable[str]) -> list[str]:
        """Which of a model's modules ``adapter_config.json`` lists as targets, while the file has nothing for them."""
        targets, excluded = self.raw.get("target_modules"), self.raw.get("exclude_modules") or []
        layers = self.raw.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers
        if not isinstance(targets, list) or not isinstance(excluded, list):
            return []  # PEFT's patterns as one string: nobody counts on them any more once the file is there
        whole = [name for name in self.raw.get("modules_to_save") or [] if isinstance(name, str)]

        def named(module: str, names: list[str]) -> bool:
            return any(f".{module}".endswith(f".{name}") for name in names)

        return [
            module
            for module in modules
            if named(module, targets)
            and not named(module, [*excluded, *whole])
            and (not layers or layer_number(module) in layers)
            and f"{module}.weight" not in self.updates
        ]


def save_adapter(
    model: nn.Module,
    config: Method,
    folder: Path,
    *,
    base: str | Path,
    data: str = "",
    figures: Mapping[str, object] | None = None,
) -> Path:
    """Write the adapter in ``model`` to ``folder``, which appears complete or not at all and replaces an older one.

    Args:
        model: With an adapter.
        config: The settings it was made by.
        folder: The adapter folder.
        base: Folder or Hub id of the base model.
        data: What it was trained on, for the model card.
        figures: Numbers for the model card.

    Returns:
        The folder.

    Raises:
        UsageError: The model has no adapter.
        DiskError: The disk is full or read-only; an older adapter is kept.
    """
    if not own_modules(model):
        raise UsageError(f"{folder}: the model has no adapter to save")
    settings, own = _to_file(model, config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
    settings = {**settings, "base_model_name_or_path": str(base)}
    extras = {"format": 1, "base": fingerprint(base_tensors(model)), "method": config.model_dump(mode="json")}
    quantize = found_config(model)
    if quantize is not None:
        extras["quantize"] = quantize.model_dump(mode="json")
        figures = {"Base held as": str(quantize), **(figures or {})}
    with atomic_folder(folder, replace=True) as temporary, disk_errors(folder):
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        _write_json(temporary / CONFIG, settings)
        _write_json(temporary / EXTRAS, extras)
        card = model_card(
            f"{config.title} adapter for {Path(base).name}",
            base=str(base),
            method=config.about,
            data=data,
            figures=figures,
            adapter=True,
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
    return Path(folder)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder, PEFT's or ours.

    Raises:
        InputError: Files are missing or broken, values are not finite, or it needs what this package does not do.
    """
    folder = Path(folder)
    raw = _read_config(folder)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in _read_tensors(folder).items()}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise InputError(f"{folder / WEIGHTS}: {listed(bad)} with NaN or infinite values")
    extras, quantize = _extras(folder), quantization_of(folder)
    base, found = raw.get("base_model_name_or_path") or None, extras.get("base")
    if raw["peft_type"] != "LORA":
        method = read_added(folder / CONFIG, raw, tensors)
        return Adapter(folder, base, method, {}, {}, found, raw, len(tensors), quantize, added=tensors)
    low, copies, updates = _sort_tensors(folder, raw, tensors)
    config = _method_config(folder, raw, low, updates)
    scalings = config.ranks_and_alphas(list(low))
    for name, (left, right) in low.items():
        updates[f"{name}.weight"] = LowRank(left, right, config.scaling(*scalings[name]))
    return Adapter(folder, base, config, updates, copies, found, raw, len(tensors), quantize)


def quantization_of(folder: Path) -> QuantizeConfig | None:
    """How the base of an adapter was quantised when it was trained; ``None`` if it was not, or nobody noted it.

    Raises:
        InputError: What is noted is not known here.
    """
    noted = _extras(folder).get("quantize")
    try:
        return None if noted is None else validate(noted, QuantizeConfig, name=f"{folder / EXTRAS}: quantize")
    except UsageError as error:
        raise InputError(str(error)) from error


def _extras(folder: Path) -> dict[str, Any]:
    return _read_json(folder / EXTRAS) if (folder / EXTRAS).is_file() else {}


def listed(names: list[str], what: str = "tensor") -> str:
    """``1 tensor (a)`` or ``3 tensors (a, b, c)``, at most three names."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected an adapter folder with {CONFIG} and {WEIGHTS}")
    raw = _read_json(path)
    added = added_types()
    if raw.get("peft_type") in added:
        return raw
    if raw.get("peft_type") != "LORA":
        known = ", ".join(["LORA", *sorted(added)])
        raise InputError(f"{path}: peft_type {raw.get('peft_type')!r} is not supported, known: {known}")
    init = raw.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{path}: init_lora_weights {init!r} is not supported: such an adapter needs a changed base model",
            hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter",
        )
    refused = [f"{key} {json.dumps(value)[:60]}" for key, value in raw.items() if value and key not in _READ | _INERT]
    if refused:
        raise InputError(f"{path}: not supported: {'; '.join(refused)}")
    return raw


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise InputError(
                f"{folder / 'adapter_model.bin'}: a pickle file, which can run code when it is opened; "
                f"expected {WEIGHTS}",
                hint="load and save it again with a recent PEFT, which writes safetensors",
            )
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: truncated or not a safetensors file ({reason})", hint="copy it again") from error


def _sort_tensors(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Update]]:
    """Low-rank factors by module, copies of base tensors, and the other updates by tensor."""
    factors: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    updates: dict[str, Update] = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", key):
            factors.setdefault(match[1], {})["right" if match[2] == "A" else "left"] = tensor
        elif match := re.fullmatch(r"(.+)\.lora_embedding_([AB])", key):
            factors.setdefault(match[1], {})["left" if match[2] == "A" else "right"] = tensor.T
        elif match := re.fullmatch(r"(.+)\.token_adapter\.trainable_tokens_delta", key):
            updates[f"{match[1]}.weight"] = _rows(folder, raw, match[1], tensor)
        elif match := re.fullmatch(r"(.+)\.base_layer\.weight", key):
            copies[f"{match[1]}.weight"] = tensor
        elif ".lora_" in key:
            raise InputError(f"{folder / WEIGHTS}: tensor {key} is not known here")
        else:
            updates[key.replace(".base_layer.", ".")] = Replace(tensor)
    odd = [f"{name}.{side}" for name, pair in factors.items() for side in ("left", "right") if side not in pair]
    if odd:
        names = [name.replace(".left", ".lora_B").replace(".right", ".lora_A") for name in odd]
        raise InputError(f"{folder / WEIGHTS}: {listed(names)} missing, the other factor is there")
    if not factors and not updates:
        raise InputError(f"{folder / WEIGHTS}: holds no adapter tensors")
    return {name: (pair["left"], pair["right"]) for name, pair in factors.items()}, copies, updates


def _rows(folder: Path, raw: Mapping[str, Any], module: str, values: Tensor) -> Rows:
    indices = raw.get("trainable_token_indices") or {}
    if isinstance(indices, list):
        indices = {"embed_tokens": indices}
    ids = next((ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")), None)
    if not ids or len(ids) != len(values) or len(set(ids)) != len(ids) or min(ids) < 0:
        raise InputError(f"{folder / CONFIG}: trainable_token_indices do not fit the {len(values)} rows of {module}")
    order = sorted(range(len(ids)), key=lambda slot: ids[slot])
    return Rows(tuple(ids[slot] for slot in order), values[order])


def _method_config(
    folder: Path, raw: Mapping[str, Any], low: Mapping[str, tuple[Tensor, Tensor]], updates: Updates
) -> LoRAConfig:
    """Settings with full module names; ranks are checked against the tensors."""
    path = folder / CONFIG
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    ranks = _by_regex(path, raw.get("rank_pattern") or {}, low)
    alphas = _by_regex(path, raw.get("alpha_pattern") or {}, low)
    for name, (left, right) in low.items():
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise InputError(f"{folder / WEIGHTS}: the factors of {name} do not fit: {[*left.shape]}, {[*right.shape]}")
        if left.shape[1] != ranks.get(name, rank):
            raise InputError(f"{path}: rank {ranks.get(name, rank)} for {name}, the tensors have {left.shape[1]}")
    tokens = next((list(update.ids) for update in updates.values() if isinstance(update, Rows)), [])
    wrapped = {f"{name}.bias" for name in low}
    whole = [name for name, update in updates.items() if isinstance(update, Replace) and name not in wrapped]
    settings = {
        "name": "lora",
        "rank": rank,
        "alpha": alpha,
        "dropout": raw.get("lora_dropout", 0.0),
        "target_modules": list(low),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": raw.get("bias", "none"),
        "use_rslora": raw.get("use_rslora", False),
        "modules_to_save": list(dict.fromkeys(name.rpartition(".")[0] for name in whole)),
        "trainable_tokens": tokens,
    }
    try:
        return validate(settings, LoRAConfig, name=str(path))
    except UsageError as error:
        raise InputError(str(error)) from error


def _by_regex(path: Path, patterns: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """PEFT's rule: the first pattern that matches the end of a module's name holds."""
    try:
        found = {}
        for name in names:
            for pattern, value in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", name):
                    found[name] = value
                    break
        return found
    except re.error as error:
        raise InputError(f"{path}: a rank or alpha pattern is not a regular expression: {error}") from error


def _to_file(model: nn.Module, config: Method) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """``adapter_config.json`` and the tensors under the names that the file gives them."""
    if isinstance(config, AddedMethod):
        settings, tensors = config.export(model)
        return settings, {name if name == EMBEDDINGS else _PREFIX + name: value for name, value in tensors.items()}
    assert isinstance(config, LoRAConfig)
    return _adapter_config(model, config), {_PREFIX + name: value for name, value in _file_tensors(model).items()}


def _file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names, without its prefix."""
    tensors: dict[str, Tensor] = {}
    for name, module in own_modules(model).items():
        if isinstance(module, LoRALinear):
            tensors |= {f"{name}.lora_A.weight": module.lora_A, f"{name}.lora_B.weight": module.lora_B}
            if module.trained_bias is not None:
                tensors[f"{name}.base_layer.bias"] = module.trained_bias
        elif isinstance(module, LoRAEmbedding):
            tensors |= {f"{name}.lora_embedding_A": module.lora_A, f"{name}.lora_embedding_B": module.lora_B}
        elif isinstance(module, TrainedCopy):
            tensors |= {f"{name}.{key}": value for key, value in module.trained.items()}
    for name, tokens in _token_modules(model).items():
        tensors[f"{name}.token_adapter.trainable_tokens_delta"] = tokens.token_rows
    return tensors


def _token_modules(model: nn.Module) -> dict[str, TokenEmbedding | TokenHead]:
    """Modules with trained tokens; a tied head, which shares the embedding's rows, is left out: PEFT ties it again."""
    found: dict[str, TokenEmbedding | TokenHead] = {}
    for name, module in own_modules(model).items():
        rows = [other.token_rows for other in found.values()]
        if isinstance(module, TokenEmbedding | TokenHead) and not any(module.token_rows is row for row in rows):
            found[name] = module
    return found


def _adapter_config(model: nn.Module, config: LoRAConfig) -> dict[str, Any]:
    own = own_modules(model)
    low = [name for name, module in own.items() if isinstance(module, LoRALinear | LoRAEmbedding)]
    plan = config.ranks_and_alphas(low)
    rank, alpha = config.rank, config.base_alpha
    whole = [
        name
        for name, module in own.items()
        if isinstance(module, TrainedCopy) and (config.bias != "all" or set(module.trained) != {"bias"})
    ]
    tokens = {name.rpartition(".")[2]: list(module.ids) for name, module in _token_modules(model).items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.dropout,
        "target_modules": _short_names(model, low),
        "rank_pattern": {f"^{name}": r for name, (r, _) in plan.items() if r != rank},
        "alpha_pattern": {f"^{name}": a for name, (_, a) in plan.items() if a != alpha},
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "bias": config.bias,
        "modules_to_save": whole or None,
        "trainable_token_indices": tokens or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names where they mean exactly these modules, else the names in full."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    own = set(own_modules(model))
    known = [n for n, m in model.named_modules() if n in own or isinstance(m, nn.Linear | nn.Embedding)]
    meant = [name for name in known if name.rpartition(".")[2] in ends]
    return sorted(ends) if sorted(meant) == sorted(names) else sorted(names)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object, got {type(data).__name__}")
    return data

"""Reading LoRA adapters in PEFT's format: factors, biases, whole modules, trained tokens, ranks by module.

PEFT's names (``r``, ``lora_alpha``) appear only here and in the methods' ``peft_config``. What a file asks for and this
package does not do is refused by name, never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_lora.config import validate
from lit_lora.errors import InputError, UsageError
from lit_lora.peft.core.updates import LowRank, Magnitude, Replace, Rows, Update, Updates
from lit_lora.peft.lora.config import LoRAConfig
from lit_lora.peft.lora.dora import DoRAConfig

__all__ = ["listed", "read_lora"]

# Inits that leave the base as it is; PiSSA and its like store an adapter that needs a changed base.
_PLAIN_INITS = {None, True, False, "gaussian", "eva", "orthogonal"}


def read_lora(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[LoRAConfig, dict[str, Update], dict[str, Tensor]]:
    """What a LoRA adapter's file means.

    Args:
        folder: Where it lies, for messages.
        raw: ``adapter_config.json``.
        tensors: The file's tensors, without the prefix of their names.

    Returns:
        Settings that describe it, its updates by base tensor, and copies of base tensors that PEFT put in.

    Raises:
        InputError: It is inconsistent or asks for what is not done here.
    """
    init = raw.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise InputError(
            f"{_config(folder)}: init_lora_weights {init!r} is not supported: such an adapter needs a "
            "changed base model",
            hint="save it in PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA adapter",
        )
    ends = ".lora_magnitude_vector"
    lengths = {name.removesuffix(ends): tensor for name, tensor in tensors.items() if name.endswith(ends)}
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}
    low, copies, updates = _sort_tensors(folder, raw, rest)
    if bool(raw.get("use_dora")) != bool(lengths) or (lengths and lengths.keys() != low.keys()):
        raise InputError(
            f"{_weights(folder)}: {len(lengths)} magnitude vectors for {len(low)} modules, while use_dora is "
            f"{json.dumps(raw.get('use_dora', False))}"
        )
    config = _method_config(folder, raw, low, updates)
    scalings = config.ranks_and_alphas(list(low))
    for name, (left, right) in low.items():
        update = LowRank(left, right, config.scaling(*scalings[name]))
        updates[f"{name}.weight"] = Magnitude(update, lengths[name]) if name in lengths else update
    return config, updates, copies


def _sort_tensors(
    folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Update]]:
    """Low-rank factors by module, copies of base tensors, and the other updates by tensor."""
    factors: dict[str, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    updates: dict[str, Update] = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", key):
            factors.setdefault(match[1], {})["right" if match[2] == "A" else "left"] = (
                tensor.flatten(1) if tensor.ndim > 2 else tensor
            )
        elif match := re.fullmatch(r"(.+)\.lora_embedding_([AB])", key):
            factors.setdefault(match[1], {})["left" if match[2] == "A" else "right"] = tensor.T
        elif match := re.fullmatch(r"(.+)\.token_adapter\.trainable_tokens_delta", key):
            updates[f"{match[1]}.weight"] = _rows(folder, raw, match[1], tensor)
        elif match := re.fullmatch(r"(.+)\.base_layer\.weight", key):
            copies[f"{match[1]}.weight"] = tensor
        elif ".lora_" in key:
            raise InputError(f"{_weights(folder)}: tensor {key} is not known here")
        else:
            updates[key.replace(".base_layer.", ".")] = Replace(tensor)
    odd = [f"{name}.{side}" for name, pair in factors.items() for side in ("left", "right") if side not in pair]
    if odd:
        names = [name.replace(".left", ".lora_B").replace(".right", ".lora_A") for name in odd]
        raise InputError(f"{_weights(folder)}: {listed(names)} missing, the other factor is there")
    if not factors and not updates:
        raise InputError(f"{_weights(folder)}: holds no adapter tensors")
    return {name: (pair["left"], pair["right"]) for name, pair in factors.items()}, copies, updates


def _rows(folder: Path, raw: Mapping[str, Any], module: str, values: Tensor) -> Rows:
    indices = raw.get("trainable_token_indices") or {}
    if isinstance(indices, list):  # of the embedding, whose rows are then the only ones in the file
        indices = {module: indices}
    ids = next((ids for name, ids in indices.items() if f".{module}".endswith(f".{name}")), None)
    if not ids or len(ids) != len(values) or len(set(ids)) != len(ids) or min(ids) < 0:
        raise InputError(f"{_config(folder)}: trainable_token_indices do not fit the {len(values)} rows of {module}")
    order = sorted(range(len(ids)), key=lambda slot: ids[slot])
    return Rows(tuple(ids[slot] for slot in order), values[order])


def _method_config(
    folder: Path, raw: Mapping[str, Any], low: Mapping[str, tuple[Tensor, Tensor]], updates: Updates
) -> LoRAConfig:
    """Settings with full module names; ranks are checked against the tensors."""
    path = _config(folder)
    rank, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    ranks = _by_regex(path, raw.get("rank_pattern") or {}, low)
    alphas = _by_regex(path, raw.get("alpha_pattern") or {}, low)
    for name, (left, right) in low.items():
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise InputError(f"{_weights(folder)}: the factors of {name} do not fit: {[*left.shape]}, {[*right.shape]}")
        if left.shape[1] != ranks.get(name, rank):
            raise InputError(f"{path}: rank {ranks.get(name, rank)} for {name}, the tensors have {left.shape[1]}")
    tokens = next((list(update.ids) for update in updates.values() if isinstance(update, Rows)), [])
    wrapped = {f"{name}.bias" for name in low}
    whole = [name for name, update in updates.items() if isinstance(update, Replace) and name not in wrapped]
    settings = {
        "name": "dora" if raw.get("use_dora") else "lora",
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
        return validate(settings, DoRAConfig if raw.get("use_dora") else LoRAConfig, name=str(path))
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


def _weights(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def _config(folder: Path) -> Path:
    return folder / "adapter_config.json"


def listed(names: list[str], what: str = "tensor") -> str:
    """``1 tensor (a)`` or ``3 tensors (a, b, c)``, at most three names."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"

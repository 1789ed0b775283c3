"""Checkpoints that others quantized: which of them can be opened, decided by ``config.json`` alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lit_lora.errors import InputError

__all__ = [
    "FLOAT8",
    "MXFP4",
    "PACKED",
    "quantization_method",
    "quantization_settings",
    "require_readable",
    "without_quantization",
]

PACKED = ("bitsandbytes", "lit_lora")
"""Methods whose weights stay quantized in memory."""
FLOAT8 = ("fp8", "fbgemm_fp8", "compressed-tensors")
"""Methods that store float8 codes and scales, which are dequantized while loading."""
MXFP4 = "mxfp4"
"""4-bit floats in blocks of 32 that share a power of 2, as in gpt-oss; dequantized while loading."""

# Older files of compressed-tensors and mlx have keys of their own.
_KEYS = ("quantization_config", "compression_config", "quantization")
# Names of copies that are quantized themselves, which are no remedy.
_QUANTIZED_NAME = re.compile(r"(?i)gptq|awq|aqlm|hqq|eetq|vptq|exl[23]|mlx|gguf|bnb|fp[48]|w\da\d|int[48]|\dbit|\d-bit")
_HUB_ID = re.compile(r"\w[\w.\-]*/\w[\w.\-]*")


def quantization_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How the weights are quantized, as a ``config.json`` says it; ``None`` if they are not."""
    text_config = config.get("text_config")  # of a model of text and images
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for key in _KEYS:
            if isinstance(part.get(key), dict) and part[key]:
                settings: Mapping[str, Any] = part[key]
                return settings
    return None


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The software that quantized the weights, by transformers' name, or ``mlx``; ``None`` if they are not."""
    settings = quantization_settings(config)
    if settings is None:
        return None
    if "quant_method" in settings:
        return str(settings["quant_method"])
    # mlx-lm writes no name, bitsandbytes did not at first, and compressed-tensors has a format instead.
    if "group_size" in settings and "bits" in settings:
        return "mlx"
    if "load_in_4bit" in settings or "load_in_8bit" in settings:
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in settings else "an unknown method"


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` for the same model in 16 or 32 bits."""
    plain = {key: value for key, value in config.items() if key not in _KEYS}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in plain["text_config"].items() if key not in _KEYS}
    return plain


def require_readable(config: Mapping[str, Any], name: str) -> None:
    """Refuse weights that are quantized in an unsupported way.

    Args:
        config: The contents of ``config.json``.
        name: Its path, or that of its folder; a model card beside it may name the original.

    Raises:
        InputError: They are; the hint says what to download instead.
    """
    settings = quantization_settings(config)
    method = quantization_method(config)
    if settings is None or method in (*PACKED, MXFP4):
        return
    if method == "compressed-tensors" and not _all_float8(settings):
        method = f"compressed-tensors ({settings.get('format', 'integers')})"
    elif method == "fp8" and settings.get("expert_dtype") == "fp4":
        method = "fp8 with experts of 4 bits"
    elif method in FLOAT8:
        return
    original = _original(config, Path(name))
    source = f": lit-lora download {original}" if original else ", which its model card should name"
    raise InputError(
        f"{name}: already quantized, by {method}; expected bitsandbytes, FP8, MXFP4, or 16 or 32 bits",
        hint=f"use the 16-bit checkpoint it was made from{source}; lit-lora quantizes while loading",
    )


def _all_float8(settings: Mapping[str, Any]) -> bool:
    """Whether compressed-tensors stored every group of layers as 8-bit floats."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict):
        return False
    weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
    return bool(weights) and all(
        isinstance(how, dict) and how.get("type") == "float" and how.get("num_bits") == 8 for how in weights
    )


def _original(config: Mapping[str, Any], path: Path) -> str | None:
    """The Hub id of the checkpoint that a quantized one was made from, by its model card, else by its config."""
    folder = path if path.is_dir() else path.parent
    named = [*_base_models(folder / "README.md"), config.get("_name_or_path")]
    for name in named:
        if isinstance(name, str) and _HUB_ID.fullmatch(name) and not _QUANTIZED_NAME.search(name):
            return name
    return None


def _base_models(card: Path) -> list[Any]:
    """``base_model`` of a model card, which may be one name or several."""
    try:
        front_matter = card.read_text(encoding="utf-8").split("---")[1]
        bases = yaml.safe_load(front_matter)["base_model"]
    except (OSError, UnicodeDecodeError, IndexError, KeyError, TypeError, yaml.YAMLError):
        return []  # no card, or it names none
    return bases if isinstance(bases, list) else [bases]

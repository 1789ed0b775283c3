"""The parts that methods name by default, as a model calls them.

Defaults are written as a Llama calls the parts; on another architecture they mean what it calls these parts. Names that
a user gives are never translated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TypeVar

from torch import nn

from lit_lora.config import Settings
from lit_lora.model.families import ENCODERS, FAMILIES, DecoderNames, PartNames
from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.modules import OwnModule

__all__ = ["default_names", "names_of", "same_parts", "with_names_of"]

AnySettings = TypeVar("AnySettings", bound=Settings)

_LLAMA = DecoderNames()
# The last part of what a Llama calls a part -> the part.
_PARTS = {getattr(_LLAMA, part.name).rpartition(".")[2]: part.name for part in fields(DecoderNames)}


def default_names(*parts: str) -> list[str]:
    """Names of some parts, fields of ``DecoderNames``, for the default of a setting."""
    return [getattr(_LLAMA, part).rpartition(".")[2] for part in parts]


def names_of(model: nn.Module) -> PartNames:
    """What ``model`` calls its parts: by the type in its config, else by what names its modules have.

    Types that are not in the tables share the names of some that are. Where nothing fits, such as in a convolutional
    network, the names are a Llama's.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    tables = {name: family.names for name, family in FAMILIES.items()} | ENCODERS
    if kind in tables:
        return tables[kind]
    modules = [name for name, _ in model.named_modules()]
    fitting = (
        table for table in tables.values() if _matched(table.query, modules) and _matched(table.mlp_out, modules)
    )
    return next(fitting, _LLAMA)


def with_names_of(settings: AnySettings, model: nn.Module) -> AnySettings:
    """Settings whose lists of module names, where they are the defaults, are what ``model`` calls these parts."""
    changed: dict[str, list[str]] = {}
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        setting, value = type(settings).model_fields.get(key), getattr(settings, key, None)
        if setting is not None and isinstance(value, list) and value == setting.default:
            changed[key] = same_parts(value, model)
    return settings.model_copy(update=changed) if changed else settings


def same_parts(patterns: Iterable[str], model: nn.Module) -> list[str]:
    """The patterns; in the place of one that matches nothing, what ``model`` calls that part."""
    names = names_of(model)
    modules = [name for name, module in model.named_modules() if not isinstance(module, OwnModule)]
    translated = []
    for pattern in patterns:
        other = getattr(names, _PARTS.get(pattern, ""), pattern)
        translated.append(pattern if _matched(pattern, modules) or not _matched(other, modules) else other)
    return list(dict.fromkeys(translated))


def _matched(pattern: str, names: Iterable[str]) -> bool:
    return any(matches(pattern, name) for name in names)

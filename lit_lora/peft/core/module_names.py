"""The default module names of methods, translated to a model's own names.

Defaults are Llama's module names; for another architecture they are translated to its names for the same parts. Names
given by the user are never translated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TypeVar

from torch import nn

from lit_lora.config import Settings
from lit_lora.model import ModelConfig
from lit_lora.model.families import ENCODERS, FAMILIES, DecoderNames, PartNames
from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.modules import OwnModule

__all__ = ["default_names", "is_known_part", "names_of", "same_parts", "with_names_of"]

AnySettings = TypeVar("AnySettings", bound=Settings)

_LLAMA = DecoderNames()
# Last part of Llama's module name -> field of DecoderNames, such as q_proj -> query. Of two fields with one name, such
# as down_proj of an MLP and of experts, it is the first.
_PARTS = {
    name.rpartition(".")[2]: part.name
    for part in reversed(fields(DecoderNames))
    if (name := getattr(_LLAMA, part.name)) is not None
}


def default_names(*parts: str) -> list[str]:
    """Llama's names for some fields of ``DecoderNames``, as the default of a setting."""
    return [getattr(_LLAMA, part).rpartition(".")[2] for part in parts]


def names_of(model: nn.Module) -> PartNames:
    """The model's names for its parts: those of its config, else chosen by ``model_type`` or by its module names.

    Types missing from the tables share the names of a type in them. Where no table fits, such as for a convolutional
    network, the names are Llama's.
    """
    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig):
        return config.names
    model_type = getattr(config, "model_type", None)
    tables = {name: family.names for name, family in FAMILIES.items()} | ENCODERS
    if model_type in tables:
        return tables[model_type]

    modules = [name for name, _ in model.named_modules()]
    for table in tables.values():
        if _matches_any(table.query, modules) and _matches_any(table.mlp_out, modules):
            return table
    return _LLAMA


def is_known_part(name: str, model: nn.Module) -> bool:
    """Whether a module is one of the parts that the tables name, such as a projection of attention or MLP."""
    names = names_of(model)
    parts = (getattr(names, field.name) for field in fields(names))
    return any(isinstance(part, str) and matches(part, name) for part in parts)


def with_names_of(settings: AnySettings, model: nn.Module) -> AnySettings:
    """The settings, with default lists of module names translated to the names of ``model``."""
    translated: dict[str, list[str]] = {}
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        field = type(settings).model_fields.get(key)
        if field is None:
            continue
        value = getattr(settings, key)
        if isinstance(value, list) and value == field.default:
            translated[key] = same_parts(value, model)
    return settings.model_copy(update=translated) if translated else settings


def same_parts(patterns: Iterable[str], model: nn.Module) -> list[str]:
    """The patterns, with Llama's names replaced by the names of ``model`` for the same parts."""
    names = names_of(model)
    modules = [name for name, module in model.named_modules() if not isinstance(module, OwnModule)]
    translated = []
    for pattern in patterns:
        model_name = pattern
        # Also where a module has Llama's name: BART's self_attn returns a tuple, its part is self_attn.out_proj.
        if pattern in _PARTS:
            model_name = getattr(names, _PARTS[pattern], None) or pattern  # some models lack some parts
        # A name that matches nothing either stays as it was given, for the message.
        translated.append(model_name if _matches_any(model_name, modules) else pattern)
    return list(dict.fromkeys(translated))


def _matches_any(pattern: str, names: Iterable[str]) -> bool:
    return any(matches(pattern, name) for name in names)

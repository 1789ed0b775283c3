"""Finetuning methods: which modules a method wraps, and which parameters then train."""

from __future__ import annotations

import importlib

from lit_lora.peft.base import (
    Kind,
    Method,
    count_parameters,
    freeze,
    matched_table,
    trainable_state,
)

__all__ = ["METHODS", "Kind", "Method", "count_parameters", "freeze", "matched_table", "methods", "trainable_state"]

# name -> (kind, "module:settings class"); a recipe serves one kind
METHODS: dict[str, tuple[Kind, str]] = {
    "lora": ("low-rank", "lit_lora.peft.lora:LoRAConfig"),
    "full": ("full", "lit_lora.peft.full:FullConfig"),
}


def methods(kind: Kind | None = None) -> dict[str, type[Method]]:
    """The settings classes of a kind of method, or of all, by name."""
    found: dict[str, type[Method]] = {}
    for name, (its_kind, place) in METHODS.items():
        if kind in (None, its_kind):
            module, _, attribute = place.partition(":")
            found[name] = getattr(importlib.import_module(module), attribute)
    return found

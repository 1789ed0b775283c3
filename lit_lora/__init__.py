"""lit-lora: turn an open LLM into a specialist on the machine you have.

The package is built in floors. An import goes to a lower floor, or on one floor from the left of a ``>`` to its right;
names without a ``>`` between them do not know each other. ``tests/test_floors.py`` reads this table and enforces it;
``peft``, ``model`` and ``train`` each have a table of their own:

    5  __main__ scripts > cli api                        entry points of a checkout; the commands; the same from Python
    4  finetune                                          the recipes, where model, method, data and loop meet
    3  inspection > classify compare > recipe evaluate merge > open estimate   shared by recipes and commands
    2  checkpoint  peft  data  train  generate           five neighbors that do not know each other
    1  wheel > hf  gguf > model  tokenizer  hub  plots  quantize > kernels   the parts they are made of
    0  config  files > log  errors  aliases              no torch
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_lora.api import Model, Run, load, prepare, run

__all__ = ["IGNORE_INDEX", "Model", "Run", "__version__", "load", "prepare", "run"]

__version__ = "0.1.0"

IGNORE_INDEX = -100
"""The label of a position that the loss ignores."""


def __getattr__(name: str) -> Any:
    """What :mod:`lit_lora.api` offers, imported at first use: torch and the rest take seconds."""
    if name in __all__:
        return getattr(importlib.import_module("lit_lora.api"), name)
    raise AttributeError(f"module 'lit_lora' has no attribute {name!r}")

"""Finetuning methods: the modules that a method wraps, and the parameters that then train.

The rooms of this package, as in the table of ``lit_lora``:

    3  files                                             adapter folders: read, written, loaded into a model
    2  composed > table                                  several methods at once; the table of all
    1  quantized lowrank prompts > lora adapters selective   the methods
    0  core                                              the parts that methods are built from
"""

from __future__ import annotations

from lit_lora.peft.core.base_tensors import base_tensors
from lit_lora.peft.core.capabilities import (
    lr_factors,
    rows_for_init,
    with_modules_to_save,
    with_text,
    with_token_ids,
)
from lit_lora.peft.core.counting import MatchedRow, ParameterCount, count_parameters, matched_table
from lit_lora.peft.core.method import Kind, Method
from lit_lora.peft.core.modules import freeze, remove, trainable_state
from lit_lora.peft.files.adapter import Adapter, quantization_of, read_adapter, save_adapter
from lit_lora.peft.files.adapter_set import Adapters
from lit_lora.peft.files.load import AppliedAdapter, load_adapter
from lit_lora.peft.files.model_card import model_card
from lit_lora.peft.table import METHODS, methods

__all__ = [
    "METHODS",
    "Adapter",
    "Adapters",
    "AppliedAdapter",
    "Kind",
    "MatchedRow",
    "Method",
    "ParameterCount",
    "base_tensors",
    "count_parameters",
    "freeze",
    "load_adapter",
    "lr_factors",
    "matched_table",
    "methods",
    "model_card",
    "quantization_of",
    "read_adapter",
    "remove",
    "rows_for_init",
    "save_adapter",
    "trainable_state",
    "with_modules_to_save",
    "with_text",
    "with_token_ids",
]

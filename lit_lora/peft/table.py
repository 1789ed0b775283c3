"""The table of methods, one line each with the class of its settings; reading it imports none of them."""

from __future__ import annotations

import importlib

from lit_lora.peft.core.method import Kind, Method

__all__ = ["METHODS", "methods"]

# Name -> kind and "module:settings class". A recipe accepts methods of one kind; qlora mergeable and quantized ones.
METHODS: dict[str, tuple[Kind, str]] = {
    "lora": ("mergeable", "lit_lora.peft.lora.config:LoRAConfig"),
    "dora": ("mergeable", "lit_lora.peft.lora.dora:DoRAConfig"),
    "multilora": ("mergeable", "lit_lora.peft.lora.multilora:MultiLoRAConfig"),
    "longlora": ("mergeable", "lit_lora.peft.lora.longlora:LongLoRAConfig"),
    "vera": ("mergeable", "lit_lora.peft.lowrank.vera:VeRAConfig"),
    "tied-lora": ("mergeable", "lit_lora.peft.lowrank.tied_lora:TiedLoRAConfig"),
    "glora": ("mergeable", "lit_lora.peft.lowrank.glora:GLoRAConfig"),
    "ia3": ("mergeable", "lit_lora.peft.selective.ia3:IA3Config"),
    "bitfit": ("mergeable", "lit_lora.peft.selective.bitfit:BitFitConfig"),
    "loftq": ("quantized", "lit_lora.peft.quantized.loftq:LoftQConfig"),
    "lq-lora": ("quantized", "lit_lora.peft.quantized.lq_lora:LQLoRAConfig"),
    "qa-lora": ("quantized", "lit_lora.peft.quantized.qa_lora:QALoRAConfig"),
    "houlsby": ("added", "lit_lora.peft.adapters.bottleneck:HoulsbyConfig"),
    "lin": ("added", "lit_lora.peft.adapters.bottleneck:LinConfig"),
    "parallel": ("added", "lit_lora.peft.adapters.bottleneck:ParallelConfig"),
    "prefix": ("added", "lit_lora.peft.prompts.prefix:PrefixConfig"),
    "prompt": ("added", "lit_lora.peft.prompts.prompt:PromptConfig"),
    "p-tuning": ("added", "lit_lora.peft.prompts.p_tuning:PTuningConfig"),
    "llama-adapter": ("added", "lit_lora.peft.prompts.llama_adapter:LlamaAdapterConfig"),
    "llama-adapter-v2": ("added", "lit_lora.peft.prompts.llama_adapter:LlamaAdapterV2Config"),
    "composed": ("added", "lit_lora.peft.composed:ComposedConfig"),
    "residual": ("added", "lit_lora.peft.adapters.residual:ResidualConfig"),
    "full": ("full", "lit_lora.peft.selective.full:FullConfig"),
}


def methods(*kinds: Kind) -> dict[str, type[Method]]:
    """The settings classes of some kinds of methods, or of all, by name."""
    classes: dict[str, type[Method]] = {}
    for name, (kind, reference) in METHODS.items():
        if not kinds or kind in kinds:
            module, _, class_name = reference.partition(":")
            classes[name] = getattr(importlib.import_module(module), class_name)
    return classes

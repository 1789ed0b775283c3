"""Trainable parameters of published models, counted on models without memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lit_lora import peft
from lit_lora.model import CausalLM, ModelConfig


def llama(vocabulary: int, width: int, inner: int, layers: int, heads: int, groups: int) -> nn.Module:
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=128,
    )
    with torch.device("meta"):
        return CausalLM(config)


LLAMA_2_7B = (32000, 4096, 11008, 32, 32, 32)
LLAMA_3_2_3B = (128256, 3072, 8192, 28, 24, 8)


@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        (LLAMA_2_7B, {"name": "lora", "target_modules": "q,v"}, 4_194_304),
        (LLAMA_2_7B, {"name": "lora"}, 19_988_480),
        (LLAMA_2_7B, {"name": "lora", "rank": 16}, 39_976_960),
        (LLAMA_2_7B, {"name": "lora", "rank": 64}, 159_907_840),
        (LLAMA_2_7B, {"name": "lora", "freeze_A": True, "target_modules": "q,v"}, 2_097_152),
        (LLAMA_2_7B, {"name": "tied-lora", "target_modules": "q,v"}, 2 * 8 * 8192 + 64 * (8 + 4096)),
        (LLAMA_3_2_3B, {"name": "dora", "rank": 32, "target_modules": "q,v"}, 9_175_040 + 28 * (3072 + 1024)),
        (LLAMA_3_2_3B, {"name": "vera", "target_modules": "q,v"}, 129_024),
        (LLAMA_3_2_3B, {"name": "ia3"}, 286_720),
    ],
)
def test_counts_are_the_published_ones(model: tuple[int, ...], settings: dict[str, Any], expected: int) -> None:
    built = llama(*model)
    peft.freeze(built)
    with torch.device("meta"):
        peft.methods()[settings["name"]].model_validate(settings).apply(built)
    assert peft.count_parameters(built).trainable == expected


ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
XXL = {"vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24}


@pytest.mark.parametrize(
    ("family", "shape", "settings", "expected"),
    [
        ("roberta", ROBERTA, {"name": "lora"}, 294_912),
        ("roberta", ROBERTA, {"name": "lora", "modules_to_save": ["classifier"]}, 294_912 + 592_130),
        ("roberta", ROBERTA | LARGE, {"name": "lora"}, 786_432),
        ("roberta", ROBERTA, {"name": "vera", "rank": 1024}, 43_008),
        ("roberta", ROBERTA | LARGE, {"name": "vera", "rank": 256}, 61_440),
        ("deberta-v2", XXL | {"intermediate_size": 6144}, {"name": "lora", "rank": 16}, 4_718_592),
        ("vit", {"num_labels": 101}, {"name": "lora", "rank": 16, "modules_to_save": ["classifier"]}, 667_493),
    ],
)
def test_counts_on_models_of_transformers_are_the_published_ones(
    family: str, shape: dict[str, Any], settings: dict[str, Any], expected: int
) -> None:
    auto = (
        transformers.AutoModelForImageClassification
        if family == "vit"
        else transformers.AutoModelForSequenceClassification
    )
    with torch.device("meta"):
        built = auto.from_config(transformers.AutoConfig.for_model(family, **shape))
        peft.freeze(built)
        peft.methods()[settings["name"]].model_validate({"target_modules": "q,v", **settings}).apply(built)
    assert peft.count_parameters(built).trainable == expected

"""A random model that blocks of 64 fit, as a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from lit_lora.model import CausalLM, ModelConfig
from tests.peft.tiny import LAYERS, VOCABULARY, save_base

__all__ = ["make_folder"]


def make_folder(folder: Path, tied: bool = False) -> Path:
    torch.manual_seed(1)
    model = CausalLM(
        ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    return save_base(model, folder)

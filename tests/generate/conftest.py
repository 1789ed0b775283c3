from __future__ import annotations

import pytest

from lit_lora.model import CausalLM, ModelConfig
from lit_lora.tokenizer import Tokenizer
from tests.tiny import random_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def model() -> CausalLM:
    """A random float32 decoder with sharp logits, so that its greedy choices are no ties."""
    config = ModelConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    return random_model(config, std=0.4).eval()

from __future__ import annotations

from pathlib import Path

import pytest

from lit_lora.model import CausalLM, ModelConfig
from lit_lora.tokenizer import Tokenizer
from tests.tiny import random_model, tiny_tokenizer

CONFIG = ModelConfig(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)


def tiny_model(seed: int = 0) -> CausalLM:
    """A random float32 decoder with sharp logits, so that its choices are no ties."""
    return random_model(CONFIG, std=0.3, seed=seed).eval()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the tiny tokenizer."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model() -> CausalLM:
    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)

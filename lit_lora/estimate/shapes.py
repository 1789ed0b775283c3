"""Sizes of well-known models, to estimate a run without a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_lora.config import did_you_mean
from lit_lora.errors import UsageError
from lit_lora.hf import read_config
from lit_lora.model import ModelConfig

__all__ = ["SHAPES", "model_shape"]

_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "tie_word_embeddings",
)  # fmt: skip

# name -> vocabulary, width, MLP width, layers, query heads, key/value heads, head tied to the embedding
SHAPES: dict[str, tuple[Any, ...]] = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, True),
    "smollm2-360m": (49152, 960, 2560, 32, 15, 5, True),
    "smollm2-1.7b": (49152, 2048, 8192, 24, 32, 32, True),
    "tinyllama-1.1b": (32000, 2048, 5632, 22, 32, 4, False),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama-3.2-3b": (128256, 3072, 8192, 28, 24, 8, True),
    "llama-7b": (32000, 4096, 11008, 32, 32, 32, False),
    "llama-13b": (32000, 5120, 13824, 40, 40, 40, False),
    "llama-33b": (32000, 6656, 17920, 60, 52, 52, False),
    "llama-65b": (32000, 8192, 22016, 80, 64, 64, False),
    "llama-2-70b": (32000, 8192, 28672, 80, 64, 8, False),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, False),
    "mistral-7b": (32000, 4096, 14336, 32, 32, 8, False),
    # Not a Llama: a gated MLP of 8/3 of the width has as many weights in its three matrices as GPT-3's has in two of 4.
    "gpt-3-175b": (50257, 12288, 32768, 96, 96, 96, True),
}


def model_shape(name: str) -> ModelConfig:
    """The sizes of a model in the table, or of a folder with a ``config.json``, which needs no weights.

    Raises:
        UsageError: ``name`` is neither.
        InputError: The ``config.json`` is broken.
    """
    if name in SHAPES:
        return ModelConfig.from_hf({"model_type": "llama", **dict(zip(_FIELDS, SHAPES[name], strict=True))})
    folder = Path(name)
    folder = folder.parent if folder.name == "config.json" else folder
    if (folder / "config.json").is_file():
        return read_config(folder)
    raise UsageError(
        f"--shape {name}: neither a folder with config.json nor a known shape{did_you_mean(name, SHAPES)}, "
        f"expected a folder or one of {', '.join(SHAPES)}"
    )

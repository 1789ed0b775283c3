"""A tiny checkpoint and a task for it on disk, for runs as a user makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_lora.checkpoint.save import save_model
from lit_lora.model import ModelConfig
from tests.tiny import random_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def make_base(folder: Path, *, poison: bool = False, intermediate_size: int = 48, tied: bool = False) -> Path:
    """A random float32 model of 384 tokens that starts near a uniform guess; a poisoned one has a NaN in it."""
    config = ModelConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
    )
    model = random_model(config, std=0.1)
    tokenizer = tiny_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    if poison:
        from lit_lora.tokenizer import Tokenizer

        (token,) = Tokenizer.load(tokenizer).encode("z")
        model.model.embed_tokens.weight.data[token] = torch.nan
    return save_model(model, folder, side_files=tokenizer, card="tiny\n")


def write_rows(path: Path, rows: list[dict[str, Any]] | int = 24) -> Path:
    """Rows as JSON Lines: those given, or so many questions about colours."""
    if isinstance(rows, int):
        colours = ["red", "green", "blue"]
        rows = [{"prompt": f"colour {n}?", "completion": colours[n % 3] * (1 + n % 4)} for n in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_config(folder: Path, **sections: Any) -> Path:
    """A config of a short run on ``folder/base`` and ``folder/rows.jsonl``; sections given are mixed in."""
    config: dict[str, Any] = {
        "model": {"path": str(folder / "base"), "dtype": "fp32"},
        "data": {"path": str(folder / "rows.jsonl"), "validation": 4},
        "train": {"max_steps": 8, "batch_size": 4, "eval_every": 3, "samples": 0},
        "optimizer": {"lr": 1e-2},
        "out": str(folder / "run"),
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

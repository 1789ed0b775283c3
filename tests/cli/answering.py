"""A tiny checkpoint and a run on it, for the commands that answer."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from lit_lora import peft
from lit_lora.checkpoint.load import load_model
from lit_lora.checkpoint.save import save_model
from lit_lora.cli import main
from lit_lora.model import ModelConfig
from lit_lora.tokenizer import Tokenizer
from tests.tiny import random_model, tiny_tokenizer

__all__ = ["Terminal", "make_base", "make_run"]


def make_base(folder: Path, *, endless: bool = False, hidden_size: int = 32) -> Path:
    """A random model with sharp logits, so that its choices are no ties; an endless one never ends an answer."""
    config = ModelConfig(
        vocab_size=384,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=100_000 if endless else 256,
        tie_word_embeddings=not endless,
    )
    model = random_model(config, std=0.4)
    if endless:
        model.lm_head.weight.data[:3] = 0  # the special tokens: logit 0, less than the best of the others
    tokenizer = tiny_tokenizer(folder.with_name(folder.name + "-tokenizer"))
    return save_model(model, folder, side_files=tokenizer, card="tiny\n")


def make_run(folder: Path, base: Path, *, add_tokens: tuple[str, ...] = ()) -> Path:
    """A run folder whose adapter changes answers."""
    model, tokenizer = load_model(base), Tokenizer.load(base)
    settings = {"rank": 2, "dropout": 0.5, "trainable_tokens": list(add_tokens)}
    config = peft.methods()["lora"].model_validate(settings).with_token_ids(tokenizer.add_tokens)  # type: ignore[attr-defined]
    peft.freeze(model)
    config.apply(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft.trainable_state(model).values():
            parameter.normal_(std=0.5)
    peft.save_adapter(model, config, folder / "adapter", base=base)
    if add_tokens:
        tokenizer.save(folder / "adapter")
    (folder / "config.yaml").write_text("recipe: lora\n")
    return folder


class Terminal:
    """Runs commands in this process as a pipe would: exit code, stdout, stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object, stdin: str = "") -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            main([*map(str, arguments), "--dtype", "fp32", "--max-new-tokens", "8"])
        captured = self._capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

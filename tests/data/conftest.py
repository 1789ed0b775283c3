"""Fixtures of the data tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lit_lora.data import DataConfig, Prepared, prepare
from lit_lora.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

Prepare = Callable[..., Prepared]
WriteRows = Callable[..., Path]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A ChatML tokenizer of 384 ids."""
    return Tokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows as JSON Lines."""

    def write(rows: Iterable[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Prepare:
    """Prepare a file with some settings."""

    def run(path: Path | str, *, seed: int = 0, **settings: Any) -> Prepared:
        return prepare(DataConfig(path=str(path), **settings), tokenizer, cache=tmp_path / "cache", seed=seed)

    return run


def question(number: int, answer: str = "yes") -> dict[str, str]:
    """A row of format prompt_completion."""
    return {"prompt": f"Question {number}?", "completion": f"{answer} {number}"}

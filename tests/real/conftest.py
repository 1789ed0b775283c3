from __future__ import annotations

import os
from pathlib import Path

import pytest


def checkpoint(name: str) -> Path:
    """A converted checkpoint of this name: ``LIT_LORA_TEST_WEIGHTS`` is it, or contains it, or lies beside it."""
    weights = Path(os.environ.get("LIT_LORA_TEST_WEIGHTS", "unset"))
    for place in (weights, *sorted(weights.glob(f"{name}*")), *sorted(weights.parent.glob(f"{name}*"))):
        if place.name.startswith(name) and (place / "config.json").is_file():
            return place
    pytest.skip(f"LIT_LORA_TEST_WEIGHTS is not set to a converted {name} folder, nor contains one or lies beside one")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder."""
    return checkpoint("SmolLM2")


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma-3-270M, the base model, as a checkpoint folder."""
    return checkpoint("gemma-3-270m")

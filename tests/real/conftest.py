from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder: ``LIT_LORA_TEST_WEIGHTS`` is it, or holds it, or lies beside it."""
    given = Path(os.environ.get("LIT_LORA_TEST_WEIGHTS", "unset"))
    places = [given, *(sorted(given.iterdir()) if given.is_dir() else []), *sorted(given.parent.glob("SmolLM2*"))]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        pytest.skip("LIT_LORA_TEST_WEIGHTS is not set to a converted SmolLM2 folder, nor holds or lies beside one")
    return found

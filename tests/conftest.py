"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A deadline per example measures the machine's load, not the code.
settings.register_profile("lit-lora", deadline=None)
settings.load_profile("lit-lora")


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU from runs that leave the ``gpu`` tests out: their numbers and types are those of a CPU."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data and weights, from ``LIT_LORA_TEST_DATA``; the test is skipped without it."""
    folder = os.environ.get("LIT_LORA_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LIT_LORA_TEST_DATA is not set to the folder with the real test data")
    return Path(folder)

"""Fixtures of the GGUF tests."""

from tests.checkpoint.conftest import tokenizer_folder

__all__ = ["tokenizer_folder"]

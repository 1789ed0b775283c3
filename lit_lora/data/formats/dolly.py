"""Dolly rows: an instruction, a context that may be empty, a response."""

from __future__ import annotations

from functools import partial

from lit_lora.data.formats.exchange import read_exchange
from lit_lora.data.sample import Format

__all__ = ["DOLLY"]

DOLLY = Format(
    required=("instruction", "context", "response"),
    optional=("input", "category", "system", "history", "tools"),
    aliases={"system": ("system_prompt",)},
    texts=("instruction", "input", "context"),
    read=partial(read_exchange, prompt=("instruction", "input", "context"), answer="response"),
)

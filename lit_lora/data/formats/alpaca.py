"""Alpaca rows: an instruction, an optional input, an output."""

from __future__ import annotations

from functools import partial

from lit_lora.data.formats.exchange import read_exchange
from lit_lora.data.sample import Format

__all__ = ["ALPACA"]

# "text", the rendered prompt that Alpaca's file on the Hub repeats in each row, is not read.
ALPACA = Format(
    required=("instruction", "output"),
    optional=("input", "context", "system", "history", "tools", "text"),
    aliases={"output": ("response", "answer", "completion"), "system": ("system_prompt",)},
    texts=("instruction", "input", "context"),
    read=partial(read_exchange, prompt=("instruction", "input", "context"), answer="output"),
)

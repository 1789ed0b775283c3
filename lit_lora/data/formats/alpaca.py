"""Alpaca rows: an instruction, an optional input, an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_lora.data.findings import Notice
from lit_lora.data.sample import Format, Sample, as_text, exchange

__all__ = ["ALPACA"]


def _read(row: Mapping[str, Any], notice: Notice) -> Sample:
    instruction = as_text(row["instruction"])
    extra = as_text(row.get("input"))
    prompt = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    return exchange(row, prompt, as_text(row["output"]))


# "text", the rendered prompt that Alpaca's file on the Hub repeats in each row, is not read.
ALPACA = Format(
    required=("instruction", "output"),
    optional=("input", "system", "text"),
    aliases={"output": ("response", "answer", "completion")},
    read=_read,
)

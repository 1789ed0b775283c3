"""Alpaca rows: an instruction, an optional input, an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_lora.data.formats.exchange import exchange
from lit_lora.data.formats.messages import ROW_COLUMNS, SYSTEM_NAMES
from lit_lora.data.sample import Format, RowContext, Sample

__all__ = ["ALPACA"]


def _read(row: Mapping[str, Any], context: RowContext) -> Sample:
    return exchange(row, ("instruction", "input", "context"), "output", context)


# "text", the rendered prompt that Alpaca's file on the Hub repeats in each row, is not read.
ALPACA = Format(
    required=("instruction", "output"),
    optional=("input", "context", "history", "text", *ROW_COLUMNS),
    aliases={"output": ("response", "answer", "completion"), "system": SYSTEM_NAMES},
    texts=("instruction", "input", "context"),
    read=_read,
)

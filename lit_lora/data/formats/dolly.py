"""Dolly rows: an instruction, a context that may be empty, a response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_lora.data.formats.exchange import exchange
from lit_lora.data.formats.messages import ROW_COLUMNS, SYSTEM_NAMES
from lit_lora.data.sample import Format, RowContext, Sample

__all__ = ["DOLLY"]


def _read(row: Mapping[str, Any], context: RowContext) -> Sample:
    return exchange(row, ("instruction", "input", "context"), "response", context)


DOLLY = Format(
    required=("instruction", "context", "response"),
    optional=("input", "category", "history", *ROW_COLUMNS),
    aliases={"system": SYSTEM_NAMES},
    texts=("instruction", "input", "context"),
    read=_read,
)

"""Plain text: every token is a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_lora.data.cells import as_text, require_text
from lit_lora.data.sample import Format, RowContext, Sample

__all__ = ["TEXT"]


def _read(row: Mapping[str, Any], context: RowContext) -> Sample:
    require_text(row["text"], "text", context.columns.get("text", "text"))
    return as_text(row["text"])


TEXT = Format(required=("text",), texts=("text",), read=_read)

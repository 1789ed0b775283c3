"""Prompt and completion: the simplest form of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_lora.data.formats.exchange import exchange
from lit_lora.data.formats.messages import ROW_COLUMNS, SYSTEM_NAMES
from lit_lora.data.sample import Format, RowContext, Sample

__all__ = ["PROMPT_COMPLETION"]


def _read(row: Mapping[str, Any], context: RowContext) -> Sample:
    return exchange(row, ("prompt", "context"), "completion", context)


PROMPT_COMPLETION = Format(
    required=("prompt", "completion"),
    optional=("context", "history", *ROW_COLUMNS),
    aliases={
        "prompt": ("question", "query", "input"),
        "completion": ("answer", "response", "output"),
        "context": ("schema", "passage", "background"),
        "system": SYSTEM_NAMES,
    },
    texts=("prompt", "context"),
    read=_read,
)

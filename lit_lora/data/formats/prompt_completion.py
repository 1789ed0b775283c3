"""Prompt and completion: the simplest form of a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_lora.data.findings import Notice
from lit_lora.data.sample import Format, Sample, as_text, exchange

__all__ = ["PROMPT_COMPLETION"]


def _read(row: Mapping[str, Any], notice: Notice) -> Sample:
    return exchange(row, as_text(row["prompt"]), as_text(row["completion"]))


PROMPT_COMPLETION = Format(
    required=("prompt", "completion"),
    optional=("system",),
    aliases={"prompt": ("question", "query", "input"), "completion": ("answer", "response", "output")},
    read=_read,
)

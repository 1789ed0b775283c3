"""Dolly rows: an instruction, a context that may be empty, a response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_lora.data.findings import Notice
from lit_lora.data.sample import Format, Sample, as_text, exchange

__all__ = ["DOLLY"]


def _read(row: Mapping[str, Any], notice: Notice) -> Sample:
    instruction = as_text(row["instruction"])
    context = as_text(row["context"])
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return exchange(row, prompt, as_text(row["response"]))


DOLLY = Format(required=("instruction", "context", "response"), optional=("category", "system"), read=_read)

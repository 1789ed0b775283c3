"""Prompt and completion: the simplest form of a task; also TRL's, in which both are lists of messages."""

from __future__ import annotations

from functools import partial

from lit_lora.data.formats.exchange import read_exchange
from lit_lora.data.sample import Format

__all__ = ["PROMPT_COMPLETION"]

PROMPT_COMPLETION = Format(
    required=("prompt", "completion"),
    optional=("context", "system", "history", "tools"),
    aliases={
        "prompt": ("question", "query", "input"),
        "completion": ("answer", "response", "output"),
        "system": ("system_prompt",),
    },
    texts=("prompt", "context"),
    read=partial(read_exchange, prompt=("prompt", "context"), answer="completion"),
)

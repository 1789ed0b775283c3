"""Dataset formats: a row of a file in, a conversation or a text out.

A new format is one module with a :class:`~lit_lora.data.sample.Format`, and one line in ``FORMATS``.
"""

from __future__ import annotations

import importlib

from lit_lora.data.sample import Format

__all__ = ["FORMATS", "load_format"]

# Name -> module:object; ``format: auto`` tries them in this order.
FORMATS: dict[str, str] = {
    "messages": "lit_lora.data.formats.messages:MESSAGES",
    "sharegpt": "lit_lora.data.formats.messages:SHAREGPT",
    "dolly": "lit_lora.data.formats.dolly:DOLLY",
    "alpaca": "lit_lora.data.formats.alpaca:ALPACA",
    "prompt_completion": "lit_lora.data.formats.prompt_completion:PROMPT_COMPLETION",
    "text": "lit_lora.data.formats.text:TEXT",
}


def load_format(name: str) -> Format:
    """The format of that name in ``FORMATS``."""
    module, _, attribute = FORMATS[name].partition(":")
    format_: Format = getattr(importlib.import_module(module), attribute)
    return format_

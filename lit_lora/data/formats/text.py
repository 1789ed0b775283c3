"""Plain text: every token is a target, unless the text is a dialog."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_lora.data.cells import as_text, require_text
from lit_lora.data.formats.messages import conversation, dialog_messages, read_turns
from lit_lora.data.sample import Format, RowContext, Sample

__all__ = ["TEXT"]


def _read(row: Mapping[str, Any], context: RowContext) -> Sample:
    require_text(row["text"], "text", context.columns.get("text", "text"))
    text = as_text(row["text"])
    dialog = dialog_messages(text) if context.detected else None
    if dialog is None:
        return text
    context.notice("whose text is a dialog of Human and Assistant, read as messages; format: text learns all of it")
    return conversation({}, read_turns(dialog, "text", context), context)


TEXT = Format(required=("text",), texts=("text",), read=_read)

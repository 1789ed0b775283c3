"""Write a prepared dataset as plain files: JSON Lines in the ``messages`` format, one file per split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_lora import log
from lit_lora.data.prepare import Part, Prepared, samples_of
from lit_lora.data.sample import Conversation, Sample
from lit_lora.files import atomic_folder

__all__ = ["export"]


def export(prepared: Prepared, folder: Path) -> list[Path]:
    """Write ``train.jsonl`` and, with held-out rows, ``validation.jsonl``, without the dropped rows.

    Args:
        prepared: The rows of each split.
        folder: The folder to create.

    Returns:
        The files written.

    Raises:
        DiskError: The folder exists, or the disk is full or read-only.
    """
    with atomic_folder(folder) as temporary:
        written = [folder / "train.jsonl"]
        _write(temporary / "train.jsonl", prepared.train_parts)
        if prepared.validation_parts:
            written.append(folder / "validation.jsonl")
            left_out = _write(temporary / "validation.jsonl", prepared.validation_parts, prepared.train_parts)
            if left_out:
                log.warn(
                    f"{folder / 'validation.jsonl'}: without {left_out:,} texts of which other pieces are in "
                    "train.jsonl; finetune on the original files to validate on the held-out pieces"
                )
    return written


def _write(path: Path, parts: Sequence[Part], train_parts: Sequence[Part] = ()) -> int:
    """Write rows, except for texts that are also in ``train_parts``; returns how many these are."""
    left_out = 0
    with path.open("w", encoding="utf-8") as out:
        for part in parts:
            # A held-out row is of the same files as its training rows only if it was split off from them.
            train_texts: set[str] = set()
            for train_part in train_parts:
                if list(train_part.files) == list(part.files):
                    train_texts |= train_part.sources
            for sample, (file, line) in samples_of(part, part.config):
                if isinstance(sample, str) and f"{file}:{line}" in train_texts:
                    left_out += 1
                    continue
                out.write(json.dumps(_as_row(sample), ensure_ascii=False) + "\n")
    return left_out


def _as_row(sample: Sample) -> dict[str, object]:
    """A row that is read as the same sample, without any setting of the section ``data``."""
    if not isinstance(sample, Conversation):
        return {"text": sample}
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(sample.messages):
        # What is not learned is said in the message itself, as OpenAI's format does.
        messages.append({**message, "weight": 0} if index in sample.context_only else {**message})
    row: dict[str, object] = {"messages": messages}
    if sample.tools:
        row["tools"] = sample.tools
    return row

"""Write a prepared dataset as plain files: JSON Lines in the ``messages`` format, one file per split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

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
            _write(temporary / "validation.jsonl", prepared.validation_parts)
    return written


def _write(path: Path, parts: Sequence[Part]) -> None:
    with path.open("w", encoding="utf-8") as out:
        for part in parts:
            for sample, _ in samples_of(part, part.config):
                out.write(json.dumps(_as_row(sample), ensure_ascii=False) + "\n")


def _as_row(sample: Sample) -> dict[str, object]:
    if not isinstance(sample, Conversation):
        return {"text": sample}
    row: dict[str, object] = {"messages": sample.messages}
    if sample.tools:
        row["tools"] = sample.tools
    return row

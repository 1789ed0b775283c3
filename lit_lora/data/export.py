"""Write a prepared dataset as plain files: JSON Lines in the ``messages`` format, one file per split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lit_lora.data.config import DataConfig
from lit_lora.data.findings import Findings
from lit_lora.data.prepare import Prepared, read_samples
from lit_lora.data.rows import Rows
from lit_lora.data.sample import Conversation, Sample
from lit_lora.files import atomic_folder

__all__ = ["export"]


def export(config: DataConfig, prepared: Prepared, folder: Path) -> list[Path]:
    """Write ``train.jsonl`` and, with held-out rows, ``validation.jsonl``, without the dropped rows.

    Args:
        config: The settings that ``prepared`` was made with.
        prepared: The rows of each split.
        folder: The folder to create.

    Returns:
        The files written.

    Raises:
        DiskError: The folder exists, or the disk is full or read-only.
    """
    with atomic_folder(folder) as temporary:
        written = [folder / "train.jsonl"]
        _write(temporary / "train.jsonl", config, prepared.train_files, prepared.train)
        if prepared.validation is not None:
            written.append(folder / "validation.jsonl")
            _write(
                temporary / "validation.jsonl",
                config.for_validation() or config,
                prepared.validation_files,
                prepared.validation,
            )
    return written


def _write(path: Path, config: DataConfig, files: Sequence[Path], rows: Rows) -> None:
    # Rows hold tokens only, so the files are read again for the text.
    sources = {rows.table.source(int(index)) for index in rows.index}
    with path.open("w", encoding="utf-8") as out:
        for sample, (file, line) in read_samples(config, files, Findings(config.bad_rows)):
            if f"{file}:{line}" in sources:
                out.write(json.dumps(_as_row(sample), ensure_ascii=False) + "\n")


def _as_row(sample: Sample) -> dict[str, object]:
    if not isinstance(sample, Conversation):
        return {"text": sample}
    row: dict[str, object] = {"messages": sample.messages}
    if sample.tools:
        row["tools"] = sample.tools
    return row

"""A prepared dataset as plain files: JSON Lines in the ``messages`` form, one file per split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lit_lora.data.config import DataConfig
from lit_lora.data.prepare import Prepared, read_samples
from lit_lora.data.rows import Rows
from lit_lora.data.sample import Conversation, Sample
from lit_lora.files import atomic_folder

__all__ = ["export"]


def export(config: DataConfig, prepared: Prepared, folder: Path) -> list[Path]:
    """Write ``train.jsonl`` and, with held-out rows, ``validation.jsonl``; dropped rows are not in them.

    Args:
        config: What ``prepared`` was made from.
        prepared: Says which rows are in which split.
        folder: Must not exist.

    Returns:
        The files written.

    Raises:
        DiskError: The folder exists, or the disk is full or read-only.
    """
    with atomic_folder(folder) as temporary:
        names = ["train.jsonl"]
        _write(temporary / names[0], config, prepared.train_files, prepared.train)
        if prepared.validation is not None:
            names.append("validation.jsonl")
            _write(temporary / names[1], config, prepared.validation_files, prepared.validation)
    return [folder / name for name in names]


def _write(path: Path, config: DataConfig, files: Sequence[Path], rows: Rows) -> None:
    wanted = {rows.table.source(int(index)) for index in rows.index}
    with path.open("w", encoding="utf-8") as out:
        for sample, (file, line) in read_samples(config, files):
            if f"{file}:{line}" in wanted:
                out.write(json.dumps(_plain(sample), ensure_ascii=False) + "\n")


def _plain(sample: Sample) -> dict[str, object]:
    if not isinstance(sample, Conversation):
        return {"text": sample}
    return {"messages": sample.messages, **({"tools": sample.tools} if sample.tools else {})}

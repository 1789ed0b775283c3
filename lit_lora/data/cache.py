"""The cache of tokenised rows: tokenise once, start at once ever after.

An entry is a folder ``<key>/`` of Arrow files, each with the rows of so many samples, and ``complete.json``, written
last. The key is a hash of all that the tokens depend on. A run that is killed leaves whole files behind, and the next
goes on after them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from lit_lora import log
from lit_lora.data.rows import EncodedRow, TokenTable, record_batch
from lit_lora.files import disk_errors, sha256_file, write_text

__all__ = ["CODE_VERSION", "cache_key", "cached_table"]

CODE_VERSION = 3
"""Raised whenever the same file and settings give other tokens, or the layout of the cache changes."""

_SAMPLES_PER_FILE = 16_384

T = TypeVar("T")


def cache_key(files: Sequence[Path], settings: dict[str, Any]) -> str:
    """A hash of the files' names and content, the settings, and this code's version."""
    content = [[file.name, sha256_file(file)] for file in files]
    text = json.dumps([CODE_VERSION, content, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def cached_table(
    folder: Path,
    samples: Callable[[], Iterator[T]],
    encode: Callable[[Sequence[T]], Iterable[EncodedRow]],
    info: dict[str, Any],
) -> tuple[TokenTable, bool]:
    """The table in ``folder``, encoded first where it is not there yet; and whether it was there.

    Args:
        folder: The entry of the cache. One that is damaged is made anew.
        samples: Gives an iterator; read only when the entry is not complete.
        encode: Some samples to rows.
        info: What to write to ``complete.json``; filled while the samples are read.

    Raises:
        DiskError: The disk is full or read-only; what is complete stays.
    """
    done = folder / "complete.json"
    if done.is_file():
        try:
            info.update(json.loads(done.read_text(encoding="utf-8")))
            return _open(folder, info["files"]), True
        except (pa.ArrowException, OSError, ValueError, KeyError):
            log.warn(f"{folder}: damaged cache, made anew")
            shutil.rmtree(folder)
    info["files"] = _fill(folder, samples(), encode)
    write_text(done, json.dumps(info))
    return _open(folder, info["files"]), False


def _open(folder: Path, files: int) -> TokenTable:
    return TokenTable.open(folder / _name(number) for number in range(files))


def _fill(folder: Path, samples: Iterator[T], encode: Callable[[Sequence[T]], Iterable[EncodedRow]]) -> int:
    number = 0
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    while some := list(itertools.islice(samples, _SAMPLES_PER_FILE)):
        file = folder / _name(number)
        number += 1
        if not file.is_file():
            batch = record_batch(list(encode(some)))
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            with disk_errors(folder):
                try:
                    with temporary.open("wb") as out:
                        with pa.ipc.new_file(out, batch.schema) as writer:
                            writer.write_batch(batch)
                        os.fsync(out.fileno())
                    temporary.replace(file)
                finally:
                    temporary.unlink(missing_ok=True)
    return number


def _name(number: int) -> str:
    return f"rows-{number:05d}.arrow"

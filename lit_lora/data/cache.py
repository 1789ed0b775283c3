"""The cache of tokenized rows: a dataset is tokenized once per tokenizer and settings.

An entry is a folder ``<key>/`` of Arrow files, one per ``_SAMPLES_PER_FILE`` samples, and ``complete.json``, written
last. The key is a hash of everything that the tokens depend on. A killed run leaves only whole files behind, and the
next run continues after them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from lit_lora import log
from lit_lora.data.findings import Findings
from lit_lora.data.rows import EncodedRow, TokenTable, record_batch
from lit_lora.errors import InputError
from lit_lora.files import disk_errors, read_json, sha256_file, write_text

__all__ = ["CODE_VERSION", "cache_key", "cached_table"]

CODE_VERSION = 4
"""Increased whenever the same file and settings give different tokens, or the layout of the cache changes."""

_SAMPLES_PER_FILE = 16_384
_LARGE_FILE = 100_000_000  # bytes; smaller files are hashed within a fraction of a second
_SETTLED = 2_000_000_000  # nanoseconds
_FINDINGS = b"findings"  # key in a file's schema

T = TypeVar("T")


def cache_key(files: Sequence[Path], settings: dict[str, Any], hashes: Path) -> str:
    """A hash of the files' names and contents, the settings, and ``CODE_VERSION``.

    Args:
        files: The files that the rows are read from.
        settings: What the tokens depend on beside the files.
        hashes: The folder in which the hashes of large files are remembered.
    """
    content = [[file.name, _sha256(file, hashes)] for file in files]
    text = json.dumps([CODE_VERSION, content, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _sha256(file: Path, hashes: Path) -> str:
    """SHA-256 of a file; of an unchanged large one from the last time, because 5 GB take ten seconds."""
    status = file.stat()
    if status.st_size < _LARGE_FILE:
        return sha256_file(file)

    identity = [str(file.resolve()), status.st_ino, status.st_size, status.st_mtime_ns]
    entry = hashes / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
    if entry.is_file():
        digest = entry.read_text(encoding="utf-8")
        if len(digest) == 64:
            return digest
    digest = sha256_file(file)
    # A file that has just been written may be written again within the resolution of its time.
    if time.time_ns() - status.st_mtime_ns > _SETTLED:
        write_text(entry, digest)
    return digest


def cached_table(
    folder: Path,
    samples: Callable[[], Iterator[T]],
    encode: Callable[[Sequence[T], Findings], Iterable[EncodedRow]],
    findings: Findings,
) -> tuple[TokenTable, bool]:
    """The table in ``folder``, tokenized first if the entry is incomplete; and whether it came from the cache.

    Args:
        folder: The cache entry. A damaged one is rebuilt.
        samples: Returns an iterator over the samples; called only if the entry is incomplete.
        encode: Turns samples into rows, and collects what it notices.
        findings: What ``samples`` notices while it is read. What ``encode`` notices is added; on a cache hit, all is
            added from the entry.

    Raises:
        DiskError: The disk is full or read-only; complete files stay.
    """
    marker = folder / "complete.json"
    if marker.is_file():
        try:
            entry = read_json(marker)
            table = _open(folder, entry["files"])
            findings.add(entry["findings"])
            return table, True
        except (InputError, pa.ArrowException, OSError, ValueError, KeyError):
            log.warn(f"{folder}: the cache entry is damaged; rebuilding it")
            shutil.rmtree(folder)

    files = _write_files(folder, samples(), encode)
    for number in range(files):
        findings.add(_encode_findings(folder / _name(number)))
    write_text(marker, json.dumps({"files": files, "findings": findings.as_dict()}))
    return _open(folder, files), False


def _open(folder: Path, file_count: int) -> TokenTable:
    return TokenTable.open(folder / _name(number) for number in range(file_count))


def _write_files(
    folder: Path, samples: Iterator[T], encode: Callable[[Sequence[T], Findings], Iterable[EncodedRow]]
) -> int:
    """Tokenize all samples into files and return how many files there are; existing ones are not written again."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    count = 0
    while chunk := list(itertools.islice(samples, _SAMPLES_PER_FILE)):
        file = folder / _name(count)
        count += 1
        if not file.is_file():  # a killed run may have written it
            findings = Findings()
            batch = record_batch(list(encode(chunk, findings)))
            # Kept in the file itself, so that a run that continues after a kill counts what the killed one noticed.
            batch = batch.replace_schema_metadata({_FINDINGS: json.dumps(findings.as_dict())})
            with disk_errors(folder):
                _write_file(file, batch)
    return count


def _encode_findings(file: Path) -> dict[str, Any]:
    """What was noticed while the rows of a file were encoded."""
    with pa.memory_map(str(file)) as source:
        findings: dict[str, Any] = json.loads(pa.ipc.open_file(source).schema.metadata[_FINDINGS])
    return findings


def _write_file(file: Path, batch: pa.RecordBatch) -> None:
    """Write a file that is complete or absent; the process id keeps two runs from writing the same temporary file."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            with pa.ipc.new_file(out, batch.schema) as writer:
                writer.write_batch(batch)
            os.fsync(out.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _name(number: int) -> str:
    return f"rows-{number:05d}.arrow"

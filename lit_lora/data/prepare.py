"""A data section to rows that are ready to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lit_lora import log
from lit_lora.data.cache import cache_key, cached_table
from lit_lora.data.columns import RowReader, choose_format
from lit_lora.data.config import DataConfig
from lit_lora.data.encode import Place, encode_samples
from lit_lora.data.read import read_rows
from lit_lora.data.report import FileReport, Report, report_files, report_share
from lit_lora.data.rows import EncodedRow, Integers, Rows, TokenTable
from lit_lora.data.sample import Sample
from lit_lora.data.source import locate
from lit_lora.errors import InputError
from lit_lora.tokenizer import Tokenizer

__all__ = ["PlacedSample", "Prepared", "prepare", "read_samples", "split_places"]

PlacedSample = tuple[Sample, Place]


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, rows held out, and what was found on the way."""

    train: Rows
    validation: Rows | None
    report: Report
    train_files: Sequence[Path]
    """Where the training rows were read from."""
    validation_files: Sequence[Path]
    """Where the held-out rows were read from: the training files when they were split off."""


def prepare(config: DataConfig, tokenizer: Tokenizer, *, cache: Path, seed: int) -> Prepared:
    """Read, tokenise (or take from the cache) and split a dataset.

    Args:
        config: The data section.
        tokenizer: The model's tokenizer with its chat template.
        cache: The folder of the cache.
        seed: Decides which rows are held out.

    Raises:
        UsageError: The settings do not go with the data.
        InputError: A file or row cannot be read, or no row is left to learn from.
        DiskError: The cache cannot be written.
    """
    source = locate(config.path, cache)
    table, file_report = _load(config, source.train, tokenizer, cache, config.limit)
    rows, files = _require_rows(table, file_report, config), [file_report]
    if config.deduplicate:
        rows = rows.subset(np.sort(np.unique(rows.hashes, return_index=True)[1]))
    deduplicated = int(len(table.kept()) - len(rows))

    validation: Rows | None = None
    held_out = locate(config.validation, cache).train if isinstance(config.validation, str) else source.validation
    if isinstance(config.validation, int | float):
        places, held = split_places(len(rows), config.validation, seed)
        rows, validation = rows.subset(places), rows.subset(held) if len(held) else None
        held_out = source.train
    elif held_out:
        other, other_report = _load(config, held_out, tokenizer, cache, None)
        validation = _require_rows(other, other_report, config)
        files.append(other_report)

    overlap = int(np.isin(validation.hashes, rows.hashes).sum()) if validation else 0
    if overlap:
        log.warn(
            f"{overlap:,} of {len(validation or ()):,} validation rows are exactly equal to training rows: "
            "the validation loss will look better than it is (deduplicate: true leaves repeated rows out)"
        )
    shares = report_share(rows), report_share(validation) if validation else None
    return Prepared(rows, validation, Report(files, *shares, deduplicated, overlap), source.train, held_out)


def read_samples(
    config: DataConfig, files: Sequence[Path], info: dict[str, Any] | None = None
) -> Iterator[PlacedSample]:
    """The samples of some files with their places, lazily.

    Args:
        config: Says the format and the mapping, or leaves them to be found from the first row.
        files: Data files.
        info: Is given the name of the format, the columns that nothing reads, and whether there are tools.

    Raises:
        InputError: A file or row cannot be read, or there is no row.
    """
    reader: RowReader | None = None
    for file in files:
        for line, row in read_rows(file):
            where = f"{file}:{line}"
            if reader is None:
                reader = choose_format(config, row, where)
                (info if info is not None else {}).update(
                    format=reader.name, unused=list(reader.unused), tools=reader.format.nested and "tools" in row
                )
            yield reader.sample(row, where), (file.name, line)
    if reader is None:
        raise InputError(f"{', '.join(map(str, files))}: no rows in it", hint="expected one row per line or a list")


def _load(
    config: DataConfig, files: Sequence[Path], tokenizer: Tokenizer, cache: Path, limit: int | None
) -> tuple[TokenTable, FileReport]:
    decisive = {"format", "columns", "values", "system", "max_seq_length", "too_long", "learn"}
    settings = {**config.model_dump(include=decisive), "limit": limit, "tokenizer": tokenizer.fingerprint}
    folder = cache / "rows" / cache_key(files, settings)
    info: dict[str, Any] = {}

    def samples() -> Iterator[PlacedSample]:
        for number, sample in enumerate(
            log.progress(read_samples(config, files, info), what="tokenising", unit=" rows")
        ):
            if number == limit:
                return
            yield sample

    table, hit = cached_table(folder, samples, partial(_encode, tokenizer, config), info)
    if info["tools"] and "tools" not in (tokenizer.chat_template or ""):
        log.warn("the rows have tools, which the model's chat template does not know: they are left out")
    return table, report_files(", ".join(map(str, files)), table, info, from_cache=hit)


def _encode(tokenizer: Tokenizer, config: DataConfig, samples: Sequence[PlacedSample]) -> Iterator[EncodedRow]:
    return encode_samples(tokenizer, [sample for sample, _ in samples], [place for _, place in samples], config)


def _require_rows(table: TokenTable, report: FileReport, config: DataConfig) -> Rows:
    """The rows to learn from; none at all stops here, before a model is loaded.

    Raises:
        InputError: There is none.
    """
    rows = table.kept()
    if len(rows):
        return rows
    if len(report.too_long) >= len(report.nothing_to_learn):
        hint = f"the longest has {report.longest:,} tokens: raise max_seq_length, or set too_long: truncate_prompt"
        why = (
            f"{len(report.too_long):,} of {report.rows:,} rows are longer than max_seq_length {config.max_seq_length:,}"
        )
    else:
        hint = "every conversation needs an assistant message with text; lit-lora prepare --show 3 prints rows"
        why = f"{len(report.nothing_to_learn):,} of {report.rows:,} rows hold no answer that could be learned"
    raise InputError(f"{report.name}: nothing to learn from: {why}", hint=hint)


def split_places(count: int, validation: float, seed: int) -> tuple[Integers, Integers]:
    """Positions of the rows to train on and of those held out, drawn by ``seed``; both keep the file's order.

    Args:
        count: Rows that there are.
        validation: A fraction of them, or a number of rows as an int.
        seed: Decides which.

    Raises:
        InputError: That many rows leave none to train on.
    """
    held = round(validation * count) if isinstance(validation, float) else int(validation)
    if held >= count:
        raise InputError(
            f"validation: {validation} holds out {held:,} rows, but there are only {count:,}",
            hint="ask for fewer, or leave validation out",
        )
    if held == 0:
        log.warn(f"validation: {validation} of {count:,} rows is no row: there will be no validation loss")
    order = np.random.Generator(np.random.PCG64([seed, 0x5B117])).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])

"""From a ``data`` section to rows that are ready to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from lit_lora import log
from lit_lora.data.cache import cache_key, cached_table
from lit_lora.data.columns import RowReader
from lit_lora.data.config import DataConfig
from lit_lora.data.encode import Place, encode_samples
from lit_lora.data.findings import Findings
from lit_lora.data.read import read_rows
from lit_lora.data.report import FileReport, Report, report_files, report_share
from lit_lora.data.rows import EncodedRow, Integers, Rows, TokenTable
from lit_lora.data.sample import Sample
from lit_lora.data.source import held_out_files, locate, warn_of_name
from lit_lora.errors import InputError
from lit_lora.tokenizer import Tokenizer

__all__ = ["PlacedSample", "Prepared", "draw_places", "prepare", "read_samples", "split_places"]

PlacedSample = tuple[Sample, Place]


@dataclass(frozen=True)
class Prepared:
    """Training rows, held-out rows, and a report on both."""

    train: Rows
    validation: Rows | None
    report: Report
    train_files: Sequence[Path]
    """Files of the training rows."""
    validation_files: Sequence[Path]
    """Files of the held-out rows: the training files if the rows were split off."""


def prepare(config: DataConfig, tokenizer: Tokenizer, *, cache: Path, seed: int) -> Prepared:
    """Read, tokenize (or take from the cache) and split a dataset.

    Args:
        config: The data section.
        tokenizer: The model's tokenizer with its chat template.
        cache: The cache folder.
        seed: Seeds the choice of the held-out rows.

    Raises:
        UsageError: The settings do not fit the data.
        InputError: A file or row cannot be read, or no row has a target token.
        DiskError: The cache cannot be written.
    """
    source = locate(config.path, cache)
    source.log_use(validation_given=config.validation is not None)
    warn_of_name(config.path)
    table, file_report = _load(config, source.train, tokenizer, cache, config.limit)
    rows = _require_rows(table, file_report, config)
    if config.deduplicate:
        first_positions = np.unique(rows.hashes, return_index=True)[1]
        rows = rows.subset(np.sort(first_positions))
    deduplicated = len(table.kept()) - len(rows)

    file_reports = [file_report]
    validation: Rows | None = None
    if isinstance(config.validation, int | float):
        validation_files = source.train
        train_positions, validation_positions = split_places(len(rows), config.validation, seed)
        if len(validation_positions):
            validation = rows.subset(validation_positions)
        rows = rows.subset(train_positions)
    else:
        validation_files = source.validation
        validation_config = config.for_validation()
        if validation_config is None:
            validation_config = config.model_copy(update={"limit": None})  # of a folder that has both
        else:
            validation_files = held_out_files(validation_config.path, cache)
        if validation_files:
            validation_table, validation_report = _load(
                validation_config, validation_files, tokenizer, cache, validation_config.limit
            )
            validation = _require_rows(validation_table, validation_report, validation_config)
            file_reports.append(validation_report)

    overlap = 0
    if validation is not None:
        overlap = int(np.isin(validation.hashes, rows.hashes).sum())
        if overlap:
            log.warn(
                f"{overlap:,} of {len(validation):,} validation rows are also training rows: the validation loss will "
                "be optimistic (deduplicate: true removes repeated rows)"
            )
    report = Report(
        files=file_reports,
        train=report_share(rows),
        validation=report_share(validation) if validation is not None else None,
        deduplicated=deduplicated,
        overlap=overlap,
    )
    return Prepared(rows, validation, report, source.train, validation_files)


def read_samples(config: DataConfig, files: Sequence[Path], findings: Findings) -> Iterator[PlacedSample]:
    """The samples of some files with their file and line, read lazily.

    Args:
        config: Names the format and the mapping, or leaves them to be detected from each row.
        files: Data files.
        findings: Collects what is noticed in the rows. After a bad row, no sample is yielded any more unless bad
            rows are skipped, but reading goes on, to name all of them.

    Raises:
        InputError: A file cannot be read, a row is bad, or there is no row.
    """
    reader = RowReader(config, findings)
    count = 0
    for file in files:
        for line, row in read_rows(file, findings):
            count += 1
            sample = reader.sample(row, f"{file}:{line}")
            if sample is not None and not findings.failed:
                yield sample, (file.name, line)
    findings.check()
    if count == 0:
        raise InputError(f"{', '.join(map(str, files))}: no rows in it", hint="expected one row per line or a list")


def _load(
    config: DataConfig, files: Sequence[Path], tokenizer: Tokenizer, cache: Path, limit: int | None
) -> tuple[TokenTable, FileReport]:
    """The rows of some files, tokenized or from the cache, and the report on them."""
    # Everything that decides which tokens come out: a setting that is missing here would give stale rows.
    settings = config.model_dump(
        include={"format", "columns", "roles", "values", "system", "max_seq_length", "too_long", "learn", "bad_rows"}
    )
    settings |= {"limit": limit, "tokenizer": tokenizer.fingerprint}
    folder = cache / "rows" / cache_key(files, settings)
    findings = Findings(config.bad_rows)

    def samples() -> Iterator[PlacedSample]:
        all_samples = log.progress(read_samples(config, files, findings), what="tokenizing", unit=" rows")
        return islice(all_samples, limit)

    def encode(samples: Sequence[PlacedSample], findings: Findings) -> Iterator[EncodedRow]:
        yield from encode_samples(
            tokenizer, [sample for sample, _ in samples], [place for _, place in samples], config, findings
        )

    table, from_cache = cached_table(folder, samples, encode, findings)
    findings.log_warnings()
    return table, report_files(", ".join(map(str, files)), table, findings, from_cache=from_cache)


def _require_rows(table: TokenTable, report: FileReport, config: DataConfig) -> Rows:
    """The rows to train on. A dataset without any is refused before a model is loaded.

    Raises:
        InputError: There is none.
    """
    rows = table.kept()
    if len(rows):
        return rows
    if len(report.too_long) >= len(report.nothing_to_learn):
        reason = (
            f"{len(report.too_long):,} of {report.rows:,} rows are longer than max_seq_length {config.max_seq_length:,}"
        )
        hint = f"the longest has {report.longest:,} tokens: raise max_seq_length"
        if config.too_long == "truncate_prompt":
            hint += "; their answers alone are too long, so cutting prompts does not help"
        else:
            hint += ", or set too_long: truncate_prompt"
    else:
        reason = f"{len(report.nothing_to_learn):,} of {report.rows:,} rows have no target tokens"
        hint = "every conversation needs an assistant message with text; lit-lora prepare --show 3 prints rows"
    raise InputError(f"{report.name}: no rows to train on: {reason}", hint=hint)


def split_places(count: int, validation: float, seed: int) -> tuple[Integers, Integers]:
    """Positions of the training rows and of the held-out rows, drawn with ``seed``; both stay in file order.

    Args:
        count: Number of rows.
        validation: A fraction of them as a float, or a number of rows as an int.
        seed: Seeds the choice.

    Raises:
        InputError: Too many rows are held out: none is left to train on.
    """
    held_out = round(validation * count) if isinstance(validation, float) else int(validation)
    if held_out >= count:
        raise InputError(
            f"validation: {validation} holds out {held_out:,} rows, but there are only {count:,}",
            hint="hold out fewer, or omit validation",
        )
    if held_out == 0:
        log.warn(f"validation: {validation} of {count:,} rows rounds to 0, so there is no validation set")
    chosen = draw_places(count, held_out, seed)
    return np.setdiff1d(np.arange(count), chosen), chosen


def draw_places(count: int, most: int, seed: int) -> Integers:
    """Positions of at most ``most`` of ``count`` rows, drawn with ``seed``, in file order."""
    # The second number keeps this order apart from those of the epochs, which are drawn from (seed, epoch).
    order = np.random.Generator(np.random.PCG64([seed, 0x5B117])).permutation(count)
    return np.sort(order[:most])

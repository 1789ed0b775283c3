"""From a ``data`` section to rows that are ready to train on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from lit_lora import log
from lit_lora.data.cache import cache_key, cached_table
from lit_lora.data.columns import RowReader
from lit_lora.data.config import READING, DataConfig
from lit_lora.data.encode import Place, encode_samples
from lit_lora.data.findings import Findings
from lit_lora.data.mixing import Mixture, apportion
from lit_lora.data.read import read_rows
from lit_lora.data.report import FileReport, Report, report_data_sets, report_files, report_share
from lit_lora.data.rows import EncodedRow, Integers, Rows, TokenTable
from lit_lora.data.sample import Sample
from lit_lora.data.source import held_out_files, locate, warn_of_name
from lit_lora.errors import InputError, UsageError
from lit_lora.tokenizer import Tokenizer

__all__ = ["Part", "PlacedSample", "Prepared", "draw_places", "prepare", "read_samples", "samples_of", "split_places"]

PlacedSample = tuple[Sample, Place]


@dataclass
class Part:
    """Rows of one data set that go into the same split, and where they come from."""

    config: DataConfig
    """How the files are read."""
    files: Sequence[Path]
    rows: Rows

    @property
    def sources(self) -> set[str]:
        """``file:line`` of the rows; the pieces of a text have the same."""
        return {self.rows.table.source(int(index)) for index in self.rows.index}


@dataclass(frozen=True)
class Prepared:
    """Training rows, held-out rows, and a report on both."""

    train: Rows
    validation: Rows | None
    report: Report
    train_parts: Sequence[Part]
    """The training rows by data set, in the order of ``train``."""
    validation_parts: Sequence[Part]
    """The held-out rows by data set."""
    mixture: Mixture | None = None
    """How the training rows are drawn, if their data sets have weights."""

    @property
    def name(self) -> str:
        """The names of the training files, of many only the first of each data set."""
        return ", ".join(part.files[0].name for part in self.train_parts)


def prepare(config: DataConfig, tokenizer: Tokenizer, *, cache: Path, seed: int) -> Prepared:
    """Read, tokenize (or take from the cache) and split one data set or several.

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
    reports: list[FileReport] = []

    def load(section: DataConfig, files: Sequence[Path]) -> Part:
        table, report = _load(section, files, tokenizer, cache, section.limit)
        reports.append(report)
        return Part(section, files, _require_rows(table, report, section))

    train: list[Part] = []
    held_out_by_name: list[Sequence[Path]] = []
    for number, section in enumerate(config.data_sets):
        with _named(config, number, ".path"):
            source = locate(section.path, cache)
            source.log_use(validation_given=(section.validation or config.validation) is not None)
            warn_of_name(section.path)
        with _named(config, number):
            train.append(load(section, source.train))
        held_out_by_name.append(source.validation)

    deduplicated = _deduplicate(train) if config.deduplicate else 0
    validation: list[Part] = []
    for number, amount in enumerate(_held_out_amounts(config, train)):
        part = train[number]
        with _named(config, number):
            own_section = part.config.for_validation() if config.mix else None
            if own_section is not None:
                validation.append(load(own_section, held_out_files(own_section.path, cache)))
            elif amount is not None:
                validation += _split_off(part, amount, seed)
            elif config.validation is None and held_out_by_name[number]:
                all_rows = part.config.model_copy(update={"limit": None})
                validation.append(load(all_rows, held_out_by_name[number]))
    validation_section = config.for_validation()
    if validation_section is not None:
        validation.append(load(validation_section, held_out_files(validation_section.path, cache)))

    rows = Rows.joined([part.rows for part in train])
    validation_rows = Rows.joined([part.rows for part in validation]) if validation else None
    mixture = Mixture([len(part.rows) for part in train], config.weights) if config.weights else None
    report = Report(
        files=reports,
        train=report_share(rows),
        validation=report_share(validation_rows) if validation_rows is not None else None,
        deduplicated=deduplicated,
        overlap=_overlap(rows, validation_rows),
        data_sets=report_data_sets([(part.config.path, part.rows) for part in train], mixture) if config.mix else [],
    )
    return Prepared(rows, validation_rows, report, train, validation, mixture)


@contextmanager
def _named(config: DataConfig, number: int, key: str = "") -> Iterator[None]:
    """Let errors about one of several data sets begin with its entry in the config."""
    try:
        yield
    except (InputError, UsageError) as error:
        if not config.mix:
            raise
        raise type(error)(f"data.mix[{number}]{key}: {error}", hint=error.hint) from error


def _deduplicate(parts: Sequence[Part]) -> int:
    """Keep only the first of identical rows, in place; returns how many were removed.

    Raises:
        InputError: A data set only repeats the rows of those before it.
    """
    hashes = np.concatenate([part.rows.hashes for part in parts])
    is_first = np.zeros(len(hashes), np.bool_)
    is_first[np.unique(hashes, return_index=True)[1]] = True
    start = 0
    for number, part in enumerate(parts):
        end = start + len(part.rows)
        positions = np.flatnonzero(is_first[start:end])
        if not len(positions):
            raise InputError(
                f"data.mix[{number}]: all rows are also in the data sets before it",
                hint="remove the entry, or set data.deduplicate: false",
            )
        part.rows = part.rows.subset(positions)
        start = end
    return len(hashes) - int(is_first.sum())


def _held_out_amounts(config: DataConfig, parts: Sequence[Part]) -> list[int | float | None]:
    """What to hold out of each data set: its own share or number of rows, else its part of the section's."""
    own = [part.config.validation for part in parts]
    amounts: list[int | float | None] = [amount if isinstance(amount, int | float) else None for amount in own]
    common = [number for number, amount in enumerate(own) if amount is None]
    if not config.mix or not isinstance(config.validation, int | float) or not common:
        return amounts

    if isinstance(config.validation, float):
        shared: Sequence[int | float] = [config.validation] * len(common)
    else:
        shared = apportion(config.validation, [len(parts[number].rows) for number in common])
    for number, amount in zip(common, shared, strict=True):
        amounts[number] = amount
    return amounts


def _split_off(part: Part, amount: float, seed: int) -> list[Part]:
    """Take held-out rows out of a part, in place, and return them as a part of their own; none if there are none."""
    train_positions, held_out_positions = split_places(len(part.rows), amount, seed)
    held_out = part.rows.subset(held_out_positions)
    part.rows = part.rows.subset(train_positions)
    return [Part(part.config, part.files, held_out)] if len(held_out) else []


def _overlap(rows: Rows, validation: Rows | None) -> int:
    """Number of validation rows that are also training rows, with a warning if there are any."""
    if validation is None:
        return 0
    overlap = int(np.isin(validation.hashes, rows.hashes).sum())
    if overlap:
        log.warn(
            f"{overlap:,} of {len(validation):,} validation rows are also training rows: the validation loss will "
            "be optimistic (deduplicate: true removes repeated rows)"
        )
    return overlap


def samples_of(part: Part, config: DataConfig) -> Iterator[PlacedSample]:
    """The samples that prepared rows were made of, read again, because rows hold tokens only.

    Args:
        part: Of :func:`prepare`.
        config: How to read them: as in ``part`` for the same samples.

    Raises:
        InputError: A file cannot be read, or a row is bad.
    """
    sources = part.sources
    for sample, (file, line) in read_samples(config, part.files, Findings(config.bad_rows)):
        if f"{file}:{line}" in sources:
            yield sample, (file, line)


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
    settings = config.model_dump(include=set(READING) | {"max_seq_length", "too_long", "bad_rows"})
    settings |= {"limit": limit, "tokenizer": tokenizer.fingerprint}
    folder = cache / "rows" / cache_key(files, settings, cache / "hashes")
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

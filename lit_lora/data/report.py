"""Report on a dataset in a few lines: rows, tokens, lengths, and the rows that cannot be used."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from lit_lora import log
from lit_lora.data.findings import Findings, name_rows
from lit_lora.data.mixing import Mixture
from lit_lora.data.rows import Row, Rows, Status, TokenTable
from lit_lora.tokenizer import Tokenizer

__all__ = [
    "DataSetReport",
    "FileReport",
    "Report",
    "Share",
    "report_data_sets",
    "report_files",
    "report_share",
    "show_rows",
]

_BAR_WIDTH = 40
_SMALLEST_EDGE = 32


@dataclass(frozen=True)
class FileReport:
    """The report on the training files, or on the validation files."""

    name: str
    """The files' paths, in one line."""
    format: str
    """The format of the rows; those of several, the most frequent first."""
    unused_columns: dict[str, int]
    """Columns that nothing reads, and how many rows have each."""
    notes: list[str]
    """What else was noticed, a line per finding."""
    rows: int
    """Number of rows read; for plain text, the number of pieces."""
    documents: int
    """Number of rows of the files, before plain texts are split into pieces."""
    truncated: list[str]
    """``file:line`` of each row whose prompt was cut."""
    too_long: list[str]
    """``file:line`` of each row dropped for its length."""
    nothing_to_learn: list[str]
    """``file:line`` of each row dropped because it has no target token."""
    duplicates: int
    """Number of rows that repeat an earlier one."""
    from_cache: bool
    longest: int
    """Tokens in the longest row, before any cut."""


@dataclass(frozen=True)
class Share:
    """The report on one split."""

    rows: int
    tokens: int
    targets: int
    """Number of target tokens."""
    lengths: dict[int, int] = field(default_factory=dict)
    """A histogram: upper edge in tokens -> number of rows between the edge before it and this one."""


@dataclass(frozen=True)
class DataSetReport:
    """The report on the training rows of one of several data sets."""

    name: str
    rows: int
    tokens: int
    targets: int
    weight: float | None
    passes: float
    """How often an epoch reads the data set."""
    token_share: float
    """Share of the tokens of an epoch."""
    repeated: int
    """Number of rows that are also in a data set before it."""


@dataclass(frozen=True)
class Report:
    """The report on a prepared dataset."""

    files: list[FileReport]
    train: Share
    validation: Share | None
    deduplicated: int
    """Number of rows removed because they repeat an earlier one."""
    overlap: int
    """Number of validation rows that are also training rows."""
    data_sets: list[DataSetReport] = field(default_factory=list)
    """The training rows by data set, if there are several."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def length_warnings(self, max_seq_length: int, context: int | None) -> list[str]:
        """A line on the rows of each file that were dropped for their length, with what would keep them.

        Args:
            max_seq_length: The length that the rows were limited to, in tokens.
            context: The length that the model takes, in tokens; ``None`` if it is unknown.
        """
        lines = []
        for file in self.files:
            if not file.too_long:
                continue
            remedy = "data.too_long=truncate_prompt cuts prompts instead"
            if context is None:
                remedy = f"data.max_seq_length={file.longest} keeps all, if the model takes as many"
            elif max_seq_length < context:
                kept = "all" if file.longest <= context else "more"
                length = min(file.longest, context)
                remedy = f"data.max_seq_length={length} keeps {kept} (the model's context is {context:,})"
            lines.append(
                f"{file.name}: {len(file.too_long):,} of {file.rows:,} rows are longer than data.max_seq_length "
                f"{max_seq_length:,} and are dropped; {remedy}"
            )
        return lines

    def lines(self) -> list[str]:
        """The report as text."""
        lines = []
        for file in self.files:
            lines += _file_lines(file)
        noun = "pieces" if all(file.format == "text" for file in self.files) else "rows"
        if self.deduplicated:
            lines.append(f"removed {self.deduplicated:,} duplicate rows")
        lines += [_data_set_line(data_set) for data_set in self.data_sets]
        lines.append(_share_line("training", self.train, noun))
        if self.validation:
            lines.append(_share_line("validation", self.validation, noun))
        if self.overlap:
            lines.append(f"{self.overlap:,} validation rows are also training rows")
        return [*lines, "", *_histogram(self.train.lengths)]


def report_files(name: str, table: TokenTable, findings: Findings, *, from_cache: bool) -> FileReport:
    """The report on one table, and on what was noticed in its rows."""

    def sources(status: Status) -> list[str]:
        return [table.source(int(i)) for i in np.flatnonzero(table.status == status)]

    hashes = table.kept().hashes
    return FileReport(
        name=name,
        format=findings.format_names,
        unused_columns=findings.unused_columns,
        notes=[str(finding) for finding in findings.of_level("note")],
        rows=len(table),
        documents=sum(findings.formats.values()),
        truncated=sources(Status.TRUNCATED),
        too_long=sources(Status.TOO_LONG),
        nothing_to_learn=sources(Status.NOTHING_TO_LEARN),
        duplicates=len(hashes) - len(np.unique(hashes)),
        from_cache=from_cache,
        longest=int(table.length.max(initial=0)),
    )


def report_share(rows: Rows) -> Share:
    """The report on the rows of one split."""
    counts = rows.token_counts
    lengths: dict[int, int] = {}
    edge = _SMALLEST_EDGE
    below = 0
    while below < len(counts):
        up_to_edge = int((counts <= edge).sum())
        if up_to_edge:  # no empty bars before the first
            lengths[edge] = up_to_edge - below
        below = up_to_edge
        edge *= 2
    return Share(rows=len(rows), tokens=int(counts.sum()), targets=int(rows.target_counts.sum()), lengths=lengths)


def report_data_sets(parts: Sequence[tuple[str, Rows]], mixture: Mixture | None) -> list[DataSetReport]:
    """The report on each of several data sets.

    Args:
        parts: The name and the training rows of each.
        mixture: How they are drawn from, if they have weights.
    """
    passes = [1.0] * len(parts)
    if mixture is not None:
        passes = [draws / size for draws, size in zip(mixture.draws, mixture.sizes, strict=True)]
    tokens = [int(rows.token_counts.sum()) for _, rows in parts]
    tokens_of_epoch = sum(count * times for count, times in zip(tokens, passes, strict=True))

    reports = []
    hashes_before = np.empty(0, np.uint64)
    for number, (name, rows) in enumerate(parts):
        repeated = int(np.isin(rows.hashes, hashes_before).sum())
        hashes_before = np.concatenate([hashes_before, rows.hashes])
        reports.append(
            DataSetReport(
                name=name,
                rows=len(rows),
                tokens=tokens[number],
                targets=int(rows.target_counts.sum()),
                weight=mixture.weights[number] if mixture is not None else None,
                passes=passes[number],
                token_share=tokens[number] * passes[number] / tokens_of_epoch,
                repeated=repeated,
            )
        )
    return reports


def show_rows(rows: Rows, tokenizer: Tokenizer, count: int) -> None:
    """Print the first rows as the model sees them: targets are green on a terminal, between ⟦ and ⟧ in a pipe.

    A backslash stands before a special token's text that is no token.
    """
    in_color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    before, after = ("\x1b[32m", "\x1b[0m") if in_color else ("⟦", "⟧")
    for number in range(min(count, len(rows))):
        row = rows[number]
        targets = int(row.loss_mask[1:].sum())
        log.say(f"--- {row.source}: {len(row.input_ids)} tokens, {targets} of them targets", style="bold")
        text = ""
        for is_target, part in _parts(row, tokenizer):
            text += f"{before}{part}{after}" if is_target else part
        sys.stdout.write(text + "\n")  # log.say would drop control characters such as \r


def _parts(row: Row, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """The row's text, split where the targets begin and end."""
    for is_target, positions in groupby(range(len(row.input_ids)), key=lambda position: bool(row.loss_mask[position])):
        ids = [int(row.input_ids[position]) for position in positions]
        yield is_target, _decode(ids, tokenizer)


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of ids, with a backslash before what reads like a special token and is text."""
    text = tokenizer.decode(ids, skip_special=False)
    specials = [token_id for token_id in ids if tokenizer.special_pattern.fullmatch(tokenizer.token(token_id) or "")]
    if len(tokenizer.special_pattern.findall(text)) == len(specials):
        return text
    text = ""
    for is_special, run in groupby(ids, key=specials.__contains__):
        part = tokenizer.decode(list(run), skip_special=False)
        text += part if is_special else tokenizer.special_pattern.sub(lambda match: "\\" + match[0], part)
    return text


def _file_lines(file: FileReport) -> list[str]:
    origin = "tokens from the cache" if file.from_cache else "tokenized now and cached"
    amount = f"{file.rows:,} rows"
    if file.format == "text":
        amount = f"{_counted(file.documents, 'document')} in {_counted(file.rows, 'piece')}"
    lines = [f"{file.name}: {amount}, format {file.format}, {origin}"]
    problems = [
        (file.truncated, "too long, shortened by the middle of the prompt"),
        (file.too_long, f"too long, dropped (the longest has {file.longest:,} tokens)"),
        (file.nothing_to_learn, "with no target tokens, dropped"),
    ]
    for rows, problem in problems:
        if rows:
            lines.append(f"  {len(rows):,} {problem}: {name_rows(rows)}")
    if file.duplicates:
        lines.append(f"  {file.duplicates:,} identical to an earlier row")
    if file.unused_columns:
        names = []
        for name, row_count in file.unused_columns.items():
            names.append(name if row_count >= file.rows else f"{name} ({row_count:,} rows)")
        lines.append(f"  columns not used: {', '.join(names)}")
    lines += [f"  {note}" for note in file.notes]
    return lines


def _data_set_line(data_set: DataSetReport) -> str:
    line = f"{_share_line(data_set.name, data_set)}, {data_set.token_share:.1%} of an epoch's tokens"
    if data_set.weight is not None:
        line += f"; weight {data_set.weight:g}, read {data_set.passes:.3g} times per epoch"
    if data_set.repeated:
        line += f"; {data_set.repeated:,} rows are also in a data set before it"
    return line


def _counted(count: int, noun: str) -> str:
    return f"1 {noun}" if count == 1 else f"{count:,} {noun}s"


def _share_line(name: str, share: Share | DataSetReport, noun: str = "rows") -> str:
    return f"{name}: {share.rows:,} {noun}, {share.tokens:,} tokens, {share.targets:,} of them targets"


def _histogram(lengths: dict[int, int]) -> list[str]:
    most = max(lengths.values(), default=1)
    lines = ["tokens per row"]
    for edge, rows in lengths.items():
        low = edge // 2 + 1 if edge > _SMALLEST_EDGE else 1
        width = round(_BAR_WIDTH * rows / most)
        if rows:
            width = max(width, 1)  # a single row shows too
        lines.append(f"{low:>7} – {edge:<6} {rows:>8,} {'█' * width}".rstrip())
    return lines

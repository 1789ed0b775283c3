"""What is in a dataset, said in a few lines: rows, tokens, lengths, and what could not be used."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from lit_lora import log
from lit_lora.data.rows import Row, Rows, Status, TokenTable
from lit_lora.tokenizer import Tokenizer

__all__ = ["FileReport", "Report", "Share", "name_rows", "report_files", "report_share", "show_rows"]

_BAR = 40
_NAMED_ROWS = 8


@dataclass(frozen=True)
class FileReport:
    """What was found in the training files, or in the validation files."""

    name: str
    """The files, as given."""
    format: str
    unused_columns: list[str]
    rows: int
    """Rows read; of plain text, the pieces it was cut into."""
    truncated: list[str]
    """``file:line`` of the rows whose prompt was cut."""
    too_long: list[str]
    """``file:line`` of the rows that were dropped for their length."""
    nothing_to_learn: list[str]
    """``file:line`` of the rows that were dropped because no token in them is learned."""
    duplicates: int
    """Rows that are exactly equal to an earlier one."""
    from_cache: bool
    longest: int
    """Tokens of the longest row, before anything was cut."""


@dataclass(frozen=True)
class Share:
    """The rows of one split."""

    rows: int
    tokens: int
    targets: int
    """Tokens that are learned."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Upper edge in tokens -> rows up to it."""


@dataclass(frozen=True)
class Report:
    """What ``prepare`` found and did."""

    files: list[FileReport]
    train: Share
    validation: Share | None
    deduplicated: int
    """Rows left out because they are exactly equal to an earlier one."""
    overlap: int
    """Validation rows that are exactly equal to a training row."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as text."""
        return [
            *(line for file in self.files for line in _file_lines(file)),
            *([f"left out {self.deduplicated:,} duplicate rows"] if self.deduplicated else []),
            _share_line("training", self.train),
            *([_share_line("validation", self.validation)] if self.validation else []),
            *([f"{self.overlap:,} validation rows are also training rows"] if self.overlap else []),
            "",
            *_histogram(self.train.lengths),
        ]


def report_files(name: str, table: TokenTable, info: dict[str, Any], *, from_cache: bool) -> FileReport:
    """The report on one table; ``info`` has the format and the unused columns."""

    def sources(status: Status) -> list[str]:
        return [table.source(int(i)) for i in np.flatnonzero(table.status == status)]

    kept = table.kept().hashes
    return FileReport(
        name=name,
        format=info["format"],
        unused_columns=info["unused"],
        rows=len(table),
        truncated=sources(Status.TRUNCATED),
        too_long=sources(Status.TOO_LONG),
        nothing_to_learn=sources(Status.NOTHING_TO_LEARN),
        duplicates=len(kept) - len(np.unique(kept)),
        from_cache=from_cache,
        longest=int(table.length.max(initial=0)),
    )


def report_share(rows: Rows) -> Share:
    """The report on the rows of one split."""
    counts = rows.token_counts
    lengths: dict[int, int] = {}
    edge, below = 32, 0
    while below < len(counts):
        up_to = int((counts <= edge).sum())
        if up_to:
            lengths[edge] = up_to - below
        edge, below = edge * 2, up_to
    return Share(len(rows), int(counts.sum()), int(rows.target_counts.sum()), lengths)


def show_rows(rows: Rows, tokenizer: Tokenizer, count: int) -> None:
    """Print the first rows as the model sees them: learned text is green on a terminal, between ⟦ and ⟧ in a pipe."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number in range(min(count, len(rows))):
        row = rows[number]
        log.say(f"--- {row.source}: {len(row.input_ids)} tokens, {int(row.loss_mask[1:].sum())} learned", style="bold")
        if colour:
            text = "".join(
                f"\x1b[32m{part}\x1b[0m" if is_target else part for is_target, part in _parts(row, tokenizer)
            )
        else:
            text = "".join(f"⟦{part}⟧" if is_target else part for is_target, part in _parts(row, tokenizer))
        sys.stdout.write(text + "\n")


def _parts(row: Row, tokenizer: Tokenizer) -> Iterator[tuple[bool, str]]:
    """The row's text, cut where learning begins and ends."""
    for is_target, group in groupby(range(len(row.input_ids)), key=lambda t: bool(row.loss_mask[t])):
        yield is_target, tokenizer.decode([int(row.input_ids[t]) for t in group], skip_special=False)


def _file_lines(file: FileReport) -> list[str]:
    how = "tokens from the cache" if file.from_cache else "tokenised now, cached for the next time"
    lines = [f"{file.name}: {file.rows:,} rows, format {file.format}, {how}"]
    found = [
        (file.truncated, "too long, the middle of the prompt cut out"),
        (file.too_long, f"too long, dropped (the longest has {file.longest:,} tokens)"),
        (file.nothing_to_learn, "with nothing to learn, dropped"),
    ]
    lines += [f"  {len(rows):,} {what}: {name_rows(rows)}" for rows, what in found if rows]
    if file.duplicates:
        lines.append(f"  {file.duplicates:,} exactly equal to an earlier row")
    if file.unused_columns:
        lines.append(f"  columns not used: {', '.join(file.unused_columns)}")
    return lines


def name_rows(rows: Sequence[str]) -> str:
    """``a.jsonl:3, 8, 9 and 4 more`` of ``file:line``: a file's name stands once."""
    places = [row.rpartition(":") for row in rows[:_NAMED_ROWS]]
    groups = groupby(places, key=lambda place: place[0])
    shown = ", ".join(f"{file}:{', '.join(line for _, _, line in lines)}" for file, lines in groups)
    more = len(rows) - _NAMED_ROWS
    return shown + (f" and {more:,} more" if more > 0 else "")


def _share_line(name: str, share: Share) -> str:
    return f"{name}: {share.rows:,} rows, {share.tokens:,} tokens, {share.targets:,} of them learned"


def _histogram(lengths: dict[int, int]) -> list[str]:
    most = max(lengths.values(), default=1)
    lines = ["tokens per row"]
    for edge, rows in lengths.items():
        low = edge // 2 + 1 if edge > 32 else 1
        lines.append(
            f"{low:>7} – {edge:<6} {rows:>8,} {'█' * max(round(_BAR * rows / most), 1 if rows else 0)}".rstrip()
        )
    return lines

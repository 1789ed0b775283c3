"""What was noticed about rows while they were read: counted, and named by the first places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from lit_lora import log
from lit_lora.errors import InputError

__all__ = ["Finding", "Findings", "Level", "Notice", "name_rows"]

Level: TypeAlias = Literal["bad", "warning", "note"]
"""A row that cannot be used; one from which the model may learn something else than meant; or one worth a word."""

Notice: TypeAlias = Callable[[str], None]
"""Counts a warning about the row that is being read."""

_NAMED_ROWS = 8
_NAMED_PROBLEMS = 20


@dataclass
class Finding:
    """One thing noticed, and in which rows."""

    level: Level
    message: str
    """What is wrong with a bad row; else what follows "3 rows": ``with an empty answer, which is not learned``."""
    hint: str | None = None
    count: int = 0
    """Number of rows."""
    places: list[str] = field(default_factory=list)
    """``file:line`` of the first rows."""

    @property
    def where(self) -> str:
        """The places in short, such as ``rows.jsonl:3, 8 and 4 more``."""
        return name_rows(self.places, self.count)

    def __str__(self) -> str:
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        return f"{rows} {self.message}: {self.where}"


class Findings:
    """Counts what is noticed in rows, and collects the rows that cannot be read.

    Readers report a bad row and go on with the next, so that all of them can be named at once.

    Args:
        bad_rows: ``error``: :meth:`check` raises if there is a bad row. ``skip``: bad rows are left out and counted.
    """

    def __init__(self, bad_rows: Literal["error", "skip"] = "error") -> None:
        self._policy = bad_rows
        self.formats: dict[str, int] = {}
        """Format -> number of rows read in it."""
        self.unused_columns: dict[str, int] = {}
        """The file's column that nothing reads -> number of rows that have it."""
        self._findings: dict[tuple[Level, str], Finding] = {}

    def bad_row(self, where: str, problem: str, hint: str | None = None) -> None:
        """Count a row that cannot be read."""
        self._add(Finding("bad", problem, hint, 1, [where]))

    def warn(self, message: str, where: str) -> None:
        """Count a row from which the model may learn something else than meant."""
        self._add(Finding("warning", message, None, 1, [where]))

    def note(self, message: str, where: str) -> None:
        """Count a row of which the user may want to know something."""
        self._add(Finding("note", message, None, 1, [where]))

    def of_level(self, level: Level) -> list[Finding]:
        """The findings of a level, in the order of their first rows."""
        return [finding for finding in self._findings.values() if finding.level == level]

    @property
    def format_names(self) -> str:
        """The formats of the rows, that of most rows first: ``messages, alpaca``."""
        return ", ".join(sorted(self.formats, key=lambda name: -self.formats[name]))

    @property
    def bad_count(self) -> int:
        """Number of bad rows."""
        return sum(finding.count for finding in self.of_level("bad"))

    @property
    def failed(self) -> bool:
        """Whether :meth:`check` will raise; work on further rows would be wasted."""
        return self._policy == "error" and self.bad_count > 0

    def check(self) -> None:
        """Stop if there are bad rows, unless they are to be skipped.

        Raises:
            InputError: Names the bad rows with what is wrong: a line per problem, of which the first 20 are named.
        """
        if not self.failed:
            return
        bad = self.of_level("bad")
        lines = [f"{finding.where}: {finding.message}" for finding in bad[:_NAMED_PROBLEMS]]
        others = sum(finding.count for finding in bad[_NAMED_PROBLEMS:])
        if others:
            lines.append(f"and {others:,} more bad rows")
        hints = [finding.hint for finding in bad if finding.hint]
        skip = "bad_rows: skip leaves out what cannot be read"
        raise InputError("\n".join(lines), hint=f"{hints[0]}; {skip}" if hints else skip)

    def log_warnings(self) -> None:
        """Warn about the rows that were left out, and of each warning once."""
        for finding in self.of_level("bad"):
            log.warn(f"{finding.where}: left out: {finding.message}")
        for finding in self.of_level("warning"):
            log.warn(str(finding))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "formats": self.formats,
            "unused_columns": self.unused_columns,
            "findings": [asdict(finding) for finding in self._findings.values()],
        }

    def add(self, saved: dict[str, Any]) -> None:
        """Add those of another ``Findings``, which it gave as :meth:`as_dict`."""
        for counts, new_counts in ((self.formats, saved["formats"]), (self.unused_columns, saved["unused_columns"])):
            for name, count in new_counts.items():
                counts[name] = counts.get(name, 0) + count
        for values in saved["findings"]:
            self._add(Finding(**values))

    def _add(self, new: Finding) -> None:
        finding = self._findings.get((new.level, new.message))
        if finding is None:
            self._findings[new.level, new.message] = new
            return
        finding.count += new.count
        finding.places += new.places[: _NAMED_ROWS - len(finding.places)]


def name_rows(rows: Sequence[str], count: int | None = None) -> str:
    """The ``file:line`` of rows in short, each file named once: ``a.jsonl:3, 8, 9 and 4 more``.

    Args:
        rows: Places of rows, perhaps only of the first.
        count: Number of all rows, if there are more than in ``rows``.
    """
    lines_by_file: dict[str, list[str]] = {}
    named = rows[:_NAMED_ROWS]
    for row in named:
        file, _, line = row.rpartition(":")
        lines_by_file.setdefault(file, []).append(line)

    shown = ", ".join(f"{file}:{', '.join(lines)}" for file, lines in lines_by_file.items())
    others = max(count or 0, len(rows)) - len(named)
    return f"{shown} and {others:,} more" if others else shown

"""Output for the user: lines, tables, progress bars; plain and parseable if it is not a terminal.

Results go to stdout; notes, warnings and progress go to stderr, so that a pipe receives results only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

__all__ = ["note", "progress", "say", "shortened", "table", "warn"]


def _console(stderr: bool = False) -> Console:
    """A console for the current stdout or stderr, which may be redirected; markup in user text is never interpreted."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def _line(stderr: bool = False) -> Iterator[Console]:
    """A console for whole lines: a progress bar is cleared first and drawn again below them."""
    with tqdm.external_write_mode(sys.stderr):
        yield _console(stderr)


def say(text: str = "", style: str | None = None) -> None:
    """Print a result line to stdout. ``style`` is a rich style such as ``bold green``."""
    with _line() as console:
        console.print(text, style=style)


def shortened(text: str, most: int) -> str:
    """One line of at most ``most`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def note(text: str) -> None:
    """Print a line about progress or circumstances to stderr."""
    with _line(stderr=True) as console:
        console.print(text, style="dim")


def warn(text: str) -> None:
    """Print a warning to stderr: something to act on, though work continues."""
    with _line(stderr=True) as console:
        console.print(f"warning: {text}", style="yellow")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[int] = ()) -> None:
    """Print a table to stdout: drawn on a terminal, tab-separated lines in a pipe.

    Args:
        title: The line above the table.
        columns: The header.
        rows: The cells, converted with ``str``.
        right: Indices of right-aligned columns.
    """
    console = _console()
    cells = [[str(cell) for cell in row] for row in rows]
    if not console.is_terminal:
        console.print(f"# {title}")
        for row in [list(columns), *cells]:
            print("\t".join(row))  # rich would turn tabs into spaces
        return
    drawn = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        drawn.add_column(column, justify="right" if index in right else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*row)
    with _line() as console:
        console.print(drawn)


def progress(
    items: Iterable[Any] | None = None, *, total: int | None = None, what: str, unit: str = "it", initial: int = 0
) -> tqdm[Any]:
    """A progress bar with rate and time left on stderr; disabled if stderr is not a terminal."""
    return tqdm(
        items,
        total=total,
        desc=what,
        unit=unit,
        initial=initial,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
    )

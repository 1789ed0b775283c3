"""``lit-lora prepare``: read and tokenise a dataset, and report what is in it."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from lit_lora import log
from lit_lora.config import validate
from lit_lora.errors import UsageError
from lit_lora.files import require_new

__all__ = ["command", "parse_columns", "parse_validation"]


def command(
    path: Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder, hub:OWNER/NAME, alpaca or dolly.")],
    model: Annotated[
        Path, typer.Option(metavar="DIR", help="The checkpoint whose tokenizer and chat template are used.")
    ],
    format_: Annotated[str | None, typer.Option("--format", help="Instead of looking at the columns.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="A=B", help="The format's column A is your column B; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message for rows without one.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="The most tokens a row may have.")] = None,
    too_long: Annotated[str | None, typer.Option(help="drop, truncate_prompt or error.")] = None,
    learn: Annotated[str | None, typer.Option(help="answers or all.")] = None,
    validation: Annotated[str | None, typer.Option(help="A fraction (0.1), a number of rows (200) or a file.")] = None,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Keep only the first of equal rows.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only the first rows.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows are held out.")] = 0,
    show: Annotated[int, typer.Option(help="Print so many rows with what is learned of them marked.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Also write the rows as plain JSON Lines.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report only; keep nothing.")] = False,
) -> None:
    """Read and tokenise a dataset, and report what is in it.

    The tokens are kept in a cache, so that finetuning with the same settings starts at once.

    Examples:
        lit-lora prepare alpaca --model checkpoints/smollm2

        lit-lora prepare reviews.csv --model checkpoints/smollm2 --columns prompt=review --columns completion=label

        lit-lora prepare chats.jsonl --model checkpoints/smollm2 --validation 0.1 --show 3 --out data/chats
    """
    from lit_lora.data import DataConfig, cache_folder, prepare, show_rows
    from lit_lora.data.export import export
    from lit_lora.tokenizer import Tokenizer

    if out is not None and not dry_run:
        require_new(out)
    given: dict[str, Any] = {
        "path": path,
        "format": format_,
        "columns": parse_columns(columns or []) or None,
        "system": system,
        "max_seq_length": max_seq_length,
        "too_long": too_long,
        "learn": learn,
        "validation": parse_validation(validation),
        "deduplicate": deduplicate or None,
        "limit": limit,
    }
    config = validate({key: value for key, value in given.items() if value is not None}, DataConfig, name="prepare")
    tokenizer = Tokenizer.load(model)
    with tempfile.TemporaryDirectory(prefix="lit-lora-") as temporary:
        cache = Path(temporary) if dry_run else cache_folder()
        prepared = prepare(config, tokenizer, cache=cache, seed=seed)
        for line in prepared.report.lines():
            log.say(line)
        show_rows(prepared.train, tokenizer, show)
        if out is not None and not dry_run:
            for file in export(config, prepared, out):
                log.say(f"wrote {file}")
    # What --out wrote is in a form that needs no telling.
    told = [("--format", format_), ("--system", system), *(("--columns", pair) for pair in columns or [])]
    same = [word for option in told if option[1] and out is None for word in option]
    log.say(f"next: {shlex.join(['lit-lora', 'init', str(out or path), '--model', str(model), *map(str, same)])}")


def parse_columns(pairs: list[str]) -> dict[str, str]:
    """``prompt=question`` pairs as a mapping.

    Raises:
        UsageError: A pair has no ``=``, or a column is given twice.
    """
    columns: dict[str, str] = {}
    for pair in pairs:
        name, sign, source = pair.partition("=")
        if not sign or not name or not source:
            raise UsageError(f"--columns {pair}: expected FORMAT_COLUMN=YOUR_COLUMN, such as prompt=question")
        if name in columns:
            raise UsageError(f"--columns {pair}: {name} is given twice")
        columns[name] = source
    return columns


def parse_validation(text: str | None) -> int | float | str | None:
    """A fraction, a number of rows, or else a file's name."""
    for kind in (int, float):
        try:
            return kind(text or "")
        except ValueError:
            continue
    return text

"""``lit-lora prepare``: read and tokenize a dataset, and report its contents."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from lit_lora import log
from lit_lora.cli import options
from lit_lora.config import validate
from lit_lora.errors import InputError, UsageError
from lit_lora.files import read_json, require_new

__all__ = ["command", "model_context", "parse_columns", "parse_validation", "parse_values", "reading_options"]


def command(
    path: options.Data,
    model: Annotated[Path, typer.Option(metavar="DIR", help="Checkpoint whose tokenizer and chat template to use.")],
    template: options.Template = None,
    format_: options.Format = None,
    columns: options.Columns = None,
    values: options.Values = None,
    system: options.RowSystem = None,
    system_role: options.SystemRole = None,
    bad_rows: options.BadRows = None,
    max_seq_length: options.MaxSeqLength = None,
    too_long: options.TooLong = None,
    learn: options.Learn = None,
    validation: options.Validation = None,
    deduplicate: options.Deduplicate = False,
    limit: options.Limit = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the choice of held-out rows.")] = 0,
    show: Annotated[int, typer.Option(metavar="N", help="Print the first N rows with their target tokens marked.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder to write the rows to, as JSON Lines.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report only; write nothing.")] = False,
) -> None:
    """Read and tokenize a dataset, and report its contents.

    The tokens are cached, so that finetuning with the same settings need not tokenize again.

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
    settings: dict[str, Any] = {
        "path": path,
        **reading_options(format_, columns, values, system),
        "system_role": system_role,
        "bad_rows": bad_rows,
        "max_seq_length": max_seq_length,
        "too_long": too_long,
        "learn": learn,
        "validation": parse_validation(validation),
        "deduplicate": deduplicate or None,
        "limit": limit,
    }
    config = validate({key: value for key, value in settings.items() if value is not None}, DataConfig, name="prepare")
    tokenizer = Tokenizer.load(model)
    if template is not None:
        tokenizer.choose_template(template)
    with tempfile.TemporaryDirectory(prefix="lit-lora-") as temporary:
        cache = Path(temporary) if dry_run else cache_folder()
        prepared = prepare(config, tokenizer, cache=cache, seed=seed)
        for line in prepared.report.lines():
            log.say(line)
        for warning in prepared.report.length_warnings(config.max_seq_length, model_context(model)):
            log.warn(warning)
        show_rows(prepared.train, tokenizer, show)
        if out is not None and not dry_run:
            for file in export(prepared, out):
                log.say(f"wrote {file}")

    command_line = ["lit-lora", "init", str(out or path), "--model", str(model)]
    given: list[tuple[str, object]] = [("--template", template), ("--max-seq-length", max_seq_length)]
    given += [("--too-long", too_long), ("--learn", learn)]
    if out is None:  # what --out wrote is in the messages format, split and with its system messages
        given += [("--format", format_), ("--system", system), ("--system-role", system_role)]
        given.append(("--bad-rows", bad_rows))
        given += [("--columns", pair) for pair in columns or []]
        given += [("--values", words) for words in values or []]
        given += [("--validation", validation), ("--limit", limit)]
    for option, value in given:
        if value is not None:
            command_line += [option, str(value)]
    if deduplicate and out is None:
        command_line.append("--deduplicate")
    log.say(f"next: {shlex.join(command_line)}")


def model_context(model: Path) -> int | None:
    """The model's context in tokens; ``None`` if its config does not say."""
    try:
        return int(read_json(model / "config.json")["max_position_embeddings"])
    except (InputError, ValueError, KeyError, TypeError):
        return None


def reading_options(
    format_: str | None, columns: list[str] | None, values: list[str] | None, system: str | None
) -> dict[str, Any]:
    """The options that say how rows are read, as keys of the config section ``data``; those omitted are missing.

    ``--columns none`` and ``--system ""`` are empty values, which turn off what a model was trained with.

    Raises:
        UsageError: A value is not of the expected form.
    """
    settings: dict[str, Any] = {"format": format_, "system": system}
    if columns:
        settings["columns"] = {} if columns == ["none"] else parse_columns(columns)
    if values:
        settings["values"] = parse_values(values)
    return {key: value for key, value in settings.items() if value is not None}


def parse_columns(pairs: list[str]) -> dict[str, Any]:
    """``prompt=question`` pairs as a mapping; ``roles.agent=assistant`` is an entry of the mapping ``roles``.

    Raises:
        UsageError: A pair has no ``=``, or a column is given twice.
    """
    columns: dict[str, Any] = {}
    for pair in pairs:
        name, sign, source = pair.partition("=")
        mapping = columns
        if name.startswith("roles."):
            mapping = columns.setdefault("roles", {})
            name = name.removeprefix("roles.")
        if not sign or not name or not source:
            raise UsageError(f"--columns {pair}: expected FORMAT_COLUMN=YOUR_COLUMN, such as prompt=question")
        if name in mapping:
            raise UsageError(f"--columns {pair}: {name} is given twice")
        mapping[name] = source
    return columns


def parse_values(options: list[str]) -> dict[str, dict[str, str]]:
    """``label=0:no,1:yes`` as a mapping of mappings.

    Raises:
        UsageError: An option is of another form, or a value is given twice.
    """
    values: dict[str, dict[str, str]] = {}
    for option in options:
        column, sign, pairs = option.partition("=")
        if not sign or not column:
            raise UsageError(f"--values {option}: expected YOUR_COLUMN=VALUE:WORD,…, such as label=0:no,1:yes")
        words = values.setdefault(column, {})
        for pair in pairs.split(","):
            value, sign, word = pair.partition(":")
            if not sign or not value.strip() or not word.strip():
                raise UsageError(f"--values {option}: expected VALUE:WORD, such as 0:no, got {pair!r}")
            if value.strip() in words:
                raise UsageError(f"--values {option}: {value.strip()} is given twice")
            words[value.strip()] = word.strip()
    return values


def parse_validation(text: str | None) -> int | float | str | None:
    """A number of rows, a fraction, or else the name of a file."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

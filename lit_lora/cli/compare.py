"""``lit-lora compare``: methods on the same rows, seeds and budget, and what each reached and cost."""

from __future__ import annotations

import os
import platform
import time
from typing import TYPE_CHECKING, Annotated

import typer

from lit_lora import __version__, log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lit_lora.compare import CompareConfig, Outcome, Row, Runner, Variant

__all__ = ["command"]


def command(
    config: Annotated[str, typer.Option("--config", "-c", help="YAML file, or name of a shipped one: compare.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as base.train.max_steps=20.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and how long they take; run none.")] = False,
) -> None:
    """Compare methods fairly: the same rows, seeds and budget, each at a learning rate of its own.

    Every run of the list is trained at the learning rates of the grid; the one with the lowest validation loss is
    chosen and run with all seeds. Each run is an ordinary run folder, made by a process of its own. The same command
    goes on where it was stopped. The result: a table, and comparison.csv, .html and .png in the folder out.

    Examples:
        lit-lora compare --config compare --dry-run

        lit-lora compare --config my_compare.yaml

        lit-lora compare --config my_compare.yaml base.train.max_steps=20 grid=[1] out=out/quick
    """
    from lit_lora.compare import (
        Runner,
        check_folders,
        load_comparison,
        locked,
        rows_of,
        seconds_per_run,
        write_report,
    )

    settings, variants = load_comparison(config, overrides or [])
    check_folders(settings, variants)
    seconds = seconds_per_run(settings, variants)
    _show_plan(settings, variants, seconds)
    if dry_run:
        log.say(f"dry run: nothing trained; next: lit-lora compare --config {config}")
        return
    outcomes: list[Outcome] = []
    with locked(settings.out) as lock:
        runner = Runner(lock)
        try:
            with runner.signals():
                _train(runner, settings, variants, outcomes)
        finally:
            written = write_report(settings.out, outcomes, _about(settings)) if outcomes else []
    rows = rows_of(outcomes)
    _show(rows)
    log.say(f"wrote {', '.join(map(str, written))}", style="bold green")
    if rows[0].kept:
        log.say(f"next: lit-lora chat {rows[0].kept[0].job.folder}")


def _show_plan(settings: CompareConfig, variants: Sequence[Variant], seconds: Sequence[float]) -> None:
    """The table of what will run, and how long all of it takes."""
    from lit_lora.compare import count_runs
    from lit_lora.recipe import duration

    counts = [count_runs(settings, variant) for variant in variants]
    times = [each * count for each, count in zip(seconds, counts, strict=True)]
    rows = []
    for variant, count, its_time in zip(variants, counts, times, strict=True):
        rates = " ".join(f"{rate:g}" for rate in variant.rates)
        own, takes = variant.config, duration(its_time) if its_time else "done"
        rows.append([variant.name, own.recipe, own.peft.about, rates, str(count), takes])
    columns = ["run", "recipe", "method", "learning rates", "runs", "estimated time"]
    log.table("What will run", columns, rows, right=(4, 5))
    seeds = " ".join(map(str, settings.seeds))
    measured = "" if settings.evaluate is None else f", without measuring on {settings.evaluate.data}"
    log.say(f"{sum(counts)} runs, seeds {seeds}, about {duration(sum(times))}{measured}; folder {settings.out}")


def _train(runner: Runner, settings: CompareConfig, variants: Sequence[Variant], outcomes: list[Outcome]) -> None:
    """Do all runs, with a line for each."""
    from lit_lora.compare import count_runs, run_all
    from lit_lora.recipe import duration

    total = sum(count_runs(settings, variant) for variant in variants)
    started, found = time.perf_counter(), 0
    for outcome in run_all(runner, settings, variants):
        outcomes.append(outcome)
        found += outcome.found
        what = f"failed: {outcome.error}" if outcome.error else f"validation loss {outcome.loss:.4f}"
        rest = ""
        if outcome.found:
            rest = " (found)"
        elif len(outcomes) < total:
            each = (time.perf_counter() - started) / (len(outcomes) - found)
            rest = f"; about {duration(each * (total - len(outcomes)))} left"
        log.note(f"[{len(outcomes)}/{total}] {outcome.job}: {what}{rest}")


def _show(rows: Sequence[Row]) -> None:
    """The table, and what to know before believing it."""
    from lit_lora.compare import summary_table

    header, lines = summary_table(rows)
    log.table("Comparison, the lowest validation loss first", header, lines, right=range(1, len(header)))
    for row in rows:
        for note in row.notes:
            log.warn(f"{row.variant.name}: {note}")


def _about(settings: CompareConfig) -> dict[str, object]:
    """For the report: the settings, versions, machine and day."""
    import torch

    from lit_lora.config import dump_yaml

    versions = f"lit-lora {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {"Day": time.strftime("%Y-%m-%d"), "Versions": versions, "Machine": machine, "Settings": dump_yaml(settings)}

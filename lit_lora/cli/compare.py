"""``lit-lora compare``: methods on the same rows, seeds and budget, with what each reaches and costs."""

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
    config: Annotated[str, typer.Option("--config", "-c", help="YAML file of a comparison; compare is a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the config, such as base.train.max_steps=20."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and their estimated time; train nothing.")
    ] = False,
) -> None:
    """Compare methods fairly: on the same rows, seeds and budget, each at its own best learning rate.

    Each method is trained at every learning rate of the grid; the rate with the lowest validation loss is run with all
    seeds. Each run is an ordinary run folder, trained in a process of its own. If stopped, the same command resumes.
    The result is a table, and comparison.csv, .html and .png in the folder out.

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
        log.say("dry run: nothing was trained")
        log.say(f"next: lit-lora compare --config {config}")
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
    if rows[0].finished:
        log.say(f"next: lit-lora chat {rows[0].finished[0].job.folder}")


def _show_plan(settings: CompareConfig, variants: Sequence[Variant], seconds: Sequence[float]) -> None:
    """Print the runs and their estimated time."""
    from lit_lora.compare import count_runs
    from lit_lora.recipe import duration

    total_count = 0
    total_seconds = 0.0
    rows = []
    for variant, seconds_per_run in zip(variants, seconds, strict=True):
        count = count_runs(settings, variant)
        variant_seconds = count * seconds_per_run
        total_count += count
        total_seconds += variant_seconds
        rates = " ".join(f"{rate:g}" for rate in variant.rates)
        estimate = duration(variant_seconds) if variant_seconds else "done"
        rows.append([variant.name, variant.config.recipe, variant.config.peft.about, rates, str(count), estimate])
    columns = ["run", "recipe", "method", "learning rates", "runs", "estimated time"]
    log.table("Runs", columns, rows, right=(4, 5))

    seeds = " ".join(map(str, settings.seeds))
    evaluation = "" if settings.evaluate is None else f" plus evaluation on {settings.evaluate.data}"
    log.say(f"{total_count} runs, seeds {seeds}, about {duration(total_seconds)}{evaluation}; folder {settings.out}")


def _train(runner: Runner, settings: CompareConfig, variants: Sequence[Variant], outcomes: list[Outcome]) -> None:
    """Train all runs, with a line for each."""
    from lit_lora.compare import count_runs, run_all
    from lit_lora.recipe import duration

    total = sum(count_runs(settings, variant) for variant in variants)
    started = time.perf_counter()
    trained = 0
    for outcome in run_all(runner, settings, variants):
        outcomes.append(outcome)
        line = f"[{len(outcomes)}/{total}] {outcome.job}: "
        line += f"failed: {outcome.error}" if outcome.error else f"validation loss {outcome.loss:.4f}"
        if outcome.reused:
            line += " (from an earlier run)"
        else:
            trained += 1
            if len(outcomes) < total:
                seconds_per_run = (time.perf_counter() - started) / trained
                line += f"; about {duration(seconds_per_run * (total - len(outcomes)))} left"
        log.note(line)


def _show(rows: Sequence[Row]) -> None:
    """Print the table, and warnings about its rows."""
    from lit_lora.compare import summary_table

    header, lines = summary_table(rows)
    log.table("Comparison, by validation loss", header, lines, right=range(1, len(header)))
    for row in rows:
        for note in row.notes:
            log.warn(f"{row.variant.name}: {note}")


def _about(settings: CompareConfig) -> dict[str, object]:
    """Settings, versions, machine and date, for the report."""
    import torch

    from lit_lora.config import dump_yaml

    versions = f"lit-lora {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "Date": time.strftime("%Y-%m-%d"),
        "Versions": versions,
        "Machine": machine,
        "Settings": dump_yaml(settings),
    }

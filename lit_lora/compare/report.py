"""The table of a comparison: on the terminal, as CSV with every run, and as one HTML file with the plot in it."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_lora.compare.jobs import Outcome
from lit_lora.compare.plot import plot_rows
from lit_lora.compare.rows import Row, rows_of
from lit_lora.files import human_bytes, write_text

__all__ = ["summary_table", "write_report"]

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 80em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 2em; font-variant-numeric: tabular-nums }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child, td.why { text-align: left }
th { border-bottom: 2px solid #888 } tr.failed { color: #a33 } img { max-width: 100% } pre { background: #f5f5f5 }
"""


def summary_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: of every variant the chosen runs, with mean and standard deviation over the seeds."""
    metrics = _metrics([outcome for row in rows for outcome in row.chosen])
    header = ["run", "lr", "trains", "memory", "tokens/s", "seconds", "written", "merges", "validation loss"]
    header += [f"held-out {metric}" if metric == "loss" else metric for metric in metrics]
    lines = [_line(row, metrics) for row in rows]
    base = next((outcome for row in rows for outcome in row.kept if outcome.base_scores), None)
    first = next((outcome for row in rows for outcome in row.kept), None)
    if first is not None:
        before = f"{first.result['untrained_validation_loss']:.4f}"
        known = base.base_scores if base else {}
        scores = [_figure(metric, [known[metric]] if metric in known else []) for metric in metrics]
        lines.append(["base, untrained", *[""] * 7, before, *scores])
    return header, lines


def _line(row: Row, metrics: Sequence[str]) -> list[str]:
    if not row.kept:
        return [row.variant.name, "failed", *[""] * (7 + len(metrics))]
    trained, speeds, seconds = (row.values(key) for key in ("trainable", "tokens_per_second", "seconds"))
    return [
        row.variant.name,
        f"{row.rate:g}",
        f"{trained[0]:,.0f}",
        human_bytes(max(row.values("peak_memory_bytes"))),
        f"{statistics.fmean(speeds):,.0f}",
        f"{statistics.fmean(seconds):,.0f}",
        human_bytes(row.values("written_bytes")[0]),
        row.merges,
        _figure("validation_loss", row.values("validation_loss")),
        *(_figure(metric, row.values(metric)) for metric in metrics),
    ]


def _metrics(outcomes: Sequence[Outcome]) -> list[str]:
    """The scores of the table; perplexity says what the loss beside it says."""
    return list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores if name != "perplexity"))


def _figure(name: str, values: Sequence[float]) -> str:
    """Mean and, over several seeds, standard deviation; shares as percentages."""
    if not values:
        return ""
    share = "loss" not in name
    mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    text = f"{mean:.1%}" if share else f"{mean:.4f}"
    return text if spread is None else f"{text} ± {100 * spread if share else spread:.{1 if share else 4}f}"


def write_report(out: Path, outcomes: Sequence[Outcome], about: Mapping[str, object]) -> list[Path]:
    """Write ``comparison.csv`` with every run, ``comparison.png`` and ``comparison.html``.

    Args:
        out: The folder.
        outcomes: The runs so far.
        about: What to say about the whole, such as versions and the config.

    Raises:
        DiskError: They cannot be written.
    """
    rows = rows_of(outcomes)
    table, page, plot = (out / f"comparison.{ending}" for ending in ("csv", "html", "png"))
    write_text(table, _csv(rows))
    plot_rows(rows, plot)
    write_text(page, _page(rows, plot, about))
    return [path for path in (table, page, plot) if path.exists()]


def _csv(rows: Sequence[Row]) -> str:
    """Every run with all its figures, unrounded."""
    records = [
        _record(row, run) for row in rows for run in [*row.tried, *(run for run in row.chosen if run not in row.tried)]
    ]
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(row: Row, outcome: Outcome) -> dict[str, Any]:
    chosen = outcome in row.chosen
    own = {"name": row.variant.name, "method": row.variant.config.peft.about, "lr": outcome.job.rate}
    own |= {"seed": outcome.job.seed, "chosen": chosen, "merges": row.merges, "error": outcome.error}
    return {**own, **outcome.result, **{f"measured: {name}": score for name, score in outcome.scores.items()}}


def _page(rows: Sequence[Row], plot: Path, about: Mapping[str, object]) -> str:
    """The report as a page that needs nothing beside it."""
    header, lines = summary_table(rows)
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Comparison</title>", f"<style>{_STYLE}</style>"]
    parts += ["<h1>Comparison</h1>", _html_table(header, lines)]
    notes = [(row.variant.name, note) for row in rows for note in row.notes]
    if notes:
        parts += ["<h2>Before believing it</h2><ul>"]
        parts += [f"<li><b>{html.escape(name)}</b>: {html.escape(note)}" for name, note in notes] + ["</ul>"]
    if plot.is_file():
        data = base64.b64encode(plot.read_bytes()).decode()
        parts.append(f"<img alt='the figures of the table as bars and lines' src='data:image/png;base64,{data}'>")
    tried = [_tried(row, outcome) for row in rows for outcome in row.tried]
    parts += ["<h2>Learning rates</h2>", _html_table(["run", "lr", "validation loss", "chosen", ""], tried)]
    parts.append("<h2>How it was made</h2>")
    parts += [f"<h3>{html.escape(key)}</h3><pre>{html.escape(str(value))}</pre>" for key, value in about.items()]
    return "\n".join([*parts, "</html>"]) + "\n"


def _tried(row: Row, outcome: Outcome) -> list[str]:
    loss = f"{outcome.loss:.4f}" if math.isfinite(outcome.loss) else ""
    chosen = "yes" if outcome.job.rate == row.rate else ""
    return [row.variant.name, f"{outcome.job.rate:g}", loss, chosen, outcome.error]


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [f"<tr>{''.join(f'<th>{html.escape(cell)}' for cell in header)}"]
    for line in lines:
        failed = " class=failed" if "failed" in line else ""
        rows.append(f"<tr{failed}>{''.join(f'<td>{html.escape(cell)}' for cell in line)}")
    return "\n".join(["<table>", *rows, "</table>"])

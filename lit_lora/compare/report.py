"""The results of a comparison: a table on the terminal, every run as CSV, and one HTML file with the plot in it."""

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
    """Header and lines: the chosen runs of every variant, with mean and standard deviation over the seeds."""
    metrics = _metrics([outcome for row in rows for outcome in row.chosen])
    header = ["run", "lr", "trainable", "memory", "tokens/s", "seconds", "written", "merges", "validation loss"]
    header += [f"held-out {metric}" if metric == "loss" else metric for metric in metrics]
    lines = [_line(row, metrics) for row in rows]

    finished = [outcome for row in rows for outcome in row.finished]
    if finished:
        base_loss = f"{finished[0].result['untrained_validation_loss']:.4f}"  # the same in every run
        base_scores = next((outcome.base_scores for outcome in finished if outcome.base_scores), {})
        scores = [_score(metric, [base_scores[metric]] if metric in base_scores else []) for metric in metrics]
        lines.append(["base, untrained", *[""] * 7, base_loss, *scores])
    return header, lines


def _line(row: Row, metrics: Sequence[str]) -> list[str]:
    if not row.finished:
        return [row.variant.name, "failed", *[""] * (7 + len(metrics))]
    return [
        row.variant.name,
        f"{row.rate:g}",
        f"{row.values('trainable')[0]:,.0f}",
        human_bytes(max(row.values("peak_memory_bytes"))),
        f"{statistics.fmean(row.values('tokens_per_second')):,.0f}",
        f"{statistics.fmean(row.values('seconds')):,.0f}",
        human_bytes(row.values("written_bytes")[0]),
        row.merges,
        _score("validation_loss", row.values("validation_loss")),
        *(_score(metric, row.values(metric)) for metric in metrics),
    ]


def _metrics(outcomes: Sequence[Outcome]) -> list[str]:
    """The scores to show, without perplexity, which only repeats the loss beside it."""
    names: dict[str, None] = {}
    for outcome in outcomes:
        names |= dict.fromkeys(outcome.scores)
    names.pop("perplexity", None)
    return list(names)


def _score(name: str, values: Sequence[float]) -> str:
    """Mean and, over several seeds, standard deviation of a score; a share as a percentage."""
    if not values:
        return ""
    is_share = "loss" not in name
    mean = statistics.fmean(values)
    text = f"{mean:.1%}" if is_share else f"{mean:.4f}"
    if len(values) == 1:
        return text
    deviation = statistics.stdev(values)
    return f"{text} ± {100 * deviation:.1f}" if is_share else f"{text} ± {deviation:.4f}"


def write_report(out: Path, outcomes: Sequence[Outcome], about: Mapping[str, object]) -> list[Path]:
    """Write ``comparison.csv`` with every run, ``comparison.png`` and ``comparison.html``.

    Args:
        out: The folder.
        outcomes: The runs so far.
        about: Text for the end of the page by heading, such as versions and the config.

    Returns:
        The files; no plot if no run has a result.

    Raises:
        DiskError: They cannot be written.
    """
    rows = rows_of(outcomes)
    table = out / "comparison.csv"
    page = out / "comparison.html"
    plot = out / "comparison.png"
    write_text(table, _csv(rows))
    plot_rows(rows, plot)
    write_text(page, _page(rows, plot, about))
    return [path for path in (table, page, plot) if path.exists()]


def _csv(rows: Sequence[Row]) -> str:
    """Every run with all its values, unrounded."""
    records = []
    for row in rows:
        other_seeds = [run for run in row.chosen if run not in row.tried]
        records += [_record(row, run) for run in [*row.tried, *other_seeds]]
    columns = list(dict.fromkeys(key for record in records for key in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _record(row: Row, outcome: Outcome) -> dict[str, Any]:
    return {
        "name": row.variant.name,
        "method": row.variant.config.peft.about,
        "lr": outcome.job.rate,
        "seed": outcome.job.seed,
        "chosen": outcome in row.chosen,
        "merges": row.merges,
        "error": outcome.error,
        **outcome.result,
        **{f"measured: {name}": score for name, score in outcome.scores.items()},
    }


def _page(rows: Sequence[Row], plot: Path, about: Mapping[str, object]) -> str:
    """The report as one self-contained HTML page."""
    header, lines = summary_table(rows)
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Comparison</title>", f"<style>{_STYLE}</style>"]
    parts += ["<h1>Comparison</h1>", _html_table(header, lines)]

    notes = [(row.variant.name, note) for row in rows for note in row.notes]
    if notes:
        parts.append("<h2>Before you rely on it</h2><ul>")
        parts += [f"<li><b>{html.escape(name)}</b>: {html.escape(note)}" for name, note in notes]
        parts.append("</ul>")

    if plot.is_file():
        data = base64.b64encode(plot.read_bytes()).decode()
        parts.append(f"<img alt='the table as lines and bars' src='data:image/png;base64,{data}'>")

    tried = [_tried(row, outcome) for row in rows for outcome in row.tried]
    parts += ["<h2>Learning rates</h2>", _html_table(["run", "lr", "validation loss", "chosen", ""], tried)]
    parts.append("<h2>How it was made</h2>")
    parts += [f"<h3>{html.escape(key)}</h3><pre>{html.escape(str(value))}</pre>" for key, value in about.items()]
    parts.append("</html>")
    return "\n".join(parts) + "\n"


def _tried(row: Row, outcome: Outcome) -> list[str]:
    loss = f"{outcome.loss:.4f}" if math.isfinite(outcome.loss) else ""
    chosen = "yes" if outcome.job.rate == row.rate else ""
    return [row.variant.name, f"{outcome.job.rate:g}", loss, chosen, outcome.error]


def _html_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = ["<tr>" + _html_cells("th", header)]
    for line in lines:
        failed = " class=failed" if "failed" in line else ""
        rows.append(f"<tr{failed}>" + _html_cells("td", line))
    return "\n".join(["<table>", *rows, "</table>"])


def _html_cells(tag: str, cells: Sequence[str]) -> str:
    return "".join(f"<{tag}>{html.escape(cell)}" for cell in cells)

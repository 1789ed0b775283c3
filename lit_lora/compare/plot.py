"""The plot of a comparison: the learning rates that were tried, and the scores and costs of the chosen runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_lora.compare.rows import Row
from lit_lora.files import disk_errors
from lit_lora.plots import new_figure

__all__ = ["plot_rows"]

# key of result.json, or name of a score -> title of the panel, and factor of its unit
_BARS = {
    "validation_loss": ("validation loss", 1.0),
    "exact match": ("exact match, %", 100.0),
    "trainable": ("trainable parameters", 1.0),
    "peak_memory_bytes": ("peak memory, GB", 1e-9),
    "tokens_per_second": ("tokens per second", 1.0),
}


def plot_rows(rows: Sequence[Row], target: Path) -> None:
    """Draw the rows into a PNG file; nothing is drawn if no run has a result.

    Raises:
        DiskError: The file cannot be written.
    """
    rows = [row for row in rows if row.finished]
    if not rows:
        return
    bars = [key for key in _BARS if any(row.values(key) for row in rows)]
    rates_height = 4.2
    bars_height = 1.2 + 0.3 * len(rows)
    figure = new_figure(3.2 * (len(bars) + 0.8), bars_height + rates_height)
    above, below = figure.subfigures(2, 1, height_ratios=[rates_height, bars_height], squeeze=False)[:, 0]
    _draw_rates(above.subplots(), rows)
    panels = below.subplots(1, len(bars), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, bars, strict=True):
        _draw_bars(panel, rows, key)
    with disk_errors(target):
        figure.savefig(target, format="png", dpi=110)


def _draw_rates(panel: Any, rows: Sequence[Row]) -> None:
    """Validation loss by learning rate: one line per row, with the chosen rate filled."""
    for number, row in enumerate(rows):
        points = [(run.job.rate, run.loss) for run in row.tried if math.isfinite(run.loss)]
        color = f"C{number % 10}"
        marker = "osD^vPX*"[number // 10 % 8]  # the ten colors repeat with another marker
        panel.plot(*zip(*points, strict=True), color=color, marker=marker, mfc="white", label=row.variant.name)
        chosen = [point for point in points if point[0] == row.rate]
        panel.plot(*zip(*chosen, strict=True), color=color, marker=marker, linestyle="")
    panel.set_yscale("log")  # one diverged run shall not flatten the others
    panel.set_xscale("log")
    panel.set_xlabel("learning rate; filled: chosen")
    panel.set_ylabel("validation loss")
    panel.grid(alpha=0.3, which="both")
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", ncols=1 + len(rows) // 16)


def _draw_bars(panel: Any, rows: Sequence[Row], key: str) -> None:
    """One metric of all rows as bars, the first row on top; error bars show the standard deviation over the seeds."""
    title, factor = _BARS[key]
    means = []
    deviations = []
    for row in rows:
        values = [factor * value for value in row.values(key)]
        means.append(statistics.fmean(values) if values else 0.0)
        deviations.append(statistics.stdev(values) if len(values) > 1 else 0.0)

    places = range(len(rows))
    panel.barh(places, means, xerr=deviations if any(deviations) else None, color="#6baed6")
    panel.set_yticks(places, [row.variant.name for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    if key == "trainable":
        panel.set_xscale("log")
    if key == "validation_loss" and min(means) > 0:
        # Losses differ by little: the axis begins near the lowest one instead of at 0.
        low, high = min(means), max(means)
        panel.set_xlim(max(0, low - 0.3 * (high - low) - 0.01), high + 0.05 * (high - low) + 0.01)
    panel.set_title(title, fontsize="medium")
    panel.grid(axis="x", alpha=0.3)

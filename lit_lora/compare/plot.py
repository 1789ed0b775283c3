"""A comparison as a picture: the learning rates that were tried, and what the chosen runs reached and cost."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_lora.compare.rows import Row
from lit_lora.files import disk_errors

__all__ = ["plot_rows"]

# key of result.json or of a score -> (title, factor)
_BARS = {
    "validation_loss": ("validation loss", 1.0),
    "exact match": ("exact match, %", 100.0),
    "trainable": ("numbers that train", 1.0),
    "peak_memory_bytes": ("peak memory, GB", 1e-9),
    "tokens_per_second": ("tokens per second", 1.0),
}


def plot_rows(rows: Sequence[Row], target: Path) -> None:
    """Draw the rows into a PNG file; nothing is drawn where no run has a result.

    Raises:
        DiskError: The file cannot be written.
    """
    rows = [row for row in rows if row.kept]
    if not rows:
        return
    # matplotlib takes a second to import: only when there is something to draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    bars = [key for key in _BARS if any(row.values(key) for row in rows)]
    height = 1.2 + 0.3 * len(rows)
    figure = Figure(figsize=(3.2 * (len(bars) + 0.8), height + 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=[4.2, height], squeeze=False)[:, 0]
    _draw_rates(above.subplots(), rows)
    panels = below.subplots(1, len(bars), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, bars, strict=True):
        _draw_bars(panel, rows, key)
    with disk_errors(target):
        figure.savefig(target, format="png", dpi=110)


def _draw_rates(panel: Any, rows: Sequence[Row]) -> None:
    """Validation loss by learning rate, a line for each row, its chosen rate filled."""
    for number, row in enumerate(rows):
        points = [(run.job.rate, run.loss) for run in row.tried if math.isfinite(run.loss)]
        colour, marker = f"C{number % 10}", "osD^vPX*"[number // 10 % 8]
        panel.plot(*zip(*points, strict=True), color=colour, marker=marker, mfc="white", label=row.variant.name)
        chosen = [point for point in points if point[0] == row.rate]
        panel.plot(*zip(*chosen, strict=True), color=colour, marker=marker, linestyle="")
    panel.set_yscale("log")  # a run that went wrong shall not flatten all others
    panel.set_xscale("log")
    panel.set_xlabel("learning rate; filled: chosen")
    panel.set_ylabel("validation loss")
    panel.grid(alpha=0.3, which="both")
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize="small", ncols=1 + len(rows) // 16)


def _draw_bars(panel: Any, rows: Sequence[Row], key: str) -> None:
    """One figure of all rows, the first on top; a line shows how far seeds lie apart."""
    title, factor = _BARS[key]
    found = [[factor * value for value in row.values(key)] for row in rows]
    means = [statistics.fmean(values) if values else 0.0 for values in found]
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in found]
    places = range(len(rows))
    panel.barh(places, means, xerr=spreads if any(spreads) else None, color="#6baed6")
    panel.set_yticks(places, [row.variant.name for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    if key == "trainable":
        panel.set_xscale("log")
    if key == "validation_loss" and min(means) > 0:  # differences are small beside the value
        low, high = min(means), max(means)
        panel.set_xlim(max(0, low - 0.3 * (high - low) - 0.01), high + 0.05 * (high - low) + 0.01)
    panel.set_title(title, fontsize="medium")
    panel.grid(axis="x", alpha=0.3)

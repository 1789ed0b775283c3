"""What a run records: one JSON line per step, a plot of the loss, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from lit_lora import log
from lit_lora.files import disk_errors, write_text
from lit_lora.plots import new_figure

__all__ = ["RunLog", "loss_figure", "plot_losses", "read_metrics"]

_LOG_FROM = 10
"""The loss axis is logarithmic where the loss falls by more than this factor."""

_LOG_TO = 1e4
"""The largest ratio of losses that a logarithmic axis shows."""


class RunLog:
    """Appends to ``metrics.jsonl`` of a run folder, one flushed line per record.

    Args:
        folder: The run folder.
        first_step: Finished steps of a resumed run. Records of later ones, which were lost with the stop, are dropped.
        tensorboard: Also write TensorBoard events; ignored when TensorBoard is not installed.

    Raises:
        DiskError: The disk is full or read-only.
    """

    def __init__(self, folder: Path, *, first_step: int = 0, tensorboard: bool = True) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        earlier = read_metrics(self.path) if first_step else []
        lines = [json.dumps(record) + "\n" for record in earlier if record["step"] <= first_step]
        write_text(self.path, "".join(lines))
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard"):
            # An optional package that takes a second to import: only for runs that want it.
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

            self._board = SummaryWriter(str(folder))

    def record(self, step: int, **values: float | None) -> None:
        """Write one record. A value that is not finite is written as null, never left out or averaged away.

        Raises:
            DiskError: The disk is full.
        """
        record: dict[str, float | None] = {"step": step}
        for key, value in values.items():
            finite = value is not None and math.isfinite(value)
            record[key] = value if finite else None  # JSON has no NaN
        with disk_errors(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

        if self._board is not None:
            for key, value in values.items():
                if value is not None:
                    self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Close the files.

        Raises:
            DiskError: The disk is full.
        """
        with disk_errors(self.path):
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line that was cut off by a crash is left out."""
    if not Path(path).is_file():
        return []
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot_losses(path: Path, target: Path, *, unit: str = "target token", best_step: int | None = None) -> None:
    """Plot the training and validation loss of a ``metrics.jsonl``, and the other validation metrics, as a PNG file.

    Without losses nothing is written. All numbers are in ``metrics.jsonl``, so a plot that cannot be written is only a
    warning.

    Args:
        path: The ``metrics.jsonl``.
        target: The PNG file.
        unit: What the loss is a mean over.
        best_step: The step whose weights the run keeps; it is marked.
    """
    figure = loss_figure(read_metrics(path), title=f"Run {path.absolute().parent.name}", unit=unit, best_step=best_step)
    if figure is None:
        return
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        log.warn(f"{target}: the plot could not be written: {error.strerror}")


def loss_figure(records: list[dict[str, Any]], *, title: str, unit: str, best_step: int | None = None) -> Any:
    """The matplotlib figure of :func:`plot_losses`; ``None`` without losses."""
    training = _points(records, "loss")
    validation = _points(records, "validation_loss")
    if not training and not validation:
        return None
    # matplotlib takes a second to import: only when there is something to draw.
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    smoothed = _smooth(training)
    if smoothed != training:
        axes.plot(*zip(*training, strict=True), color="#9ecae1", linewidth=1, label="training, each step")
        axes.plot(*zip(*smoothed, strict=True), color="#08519c", linewidth=2, label="training, smoothed")
    elif training:
        axes.plot(*zip(*training, strict=True), color="#08519c", marker=".", label="training, each step")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d94801", marker="o", label="validation")
    if best_step is not None:
        axes.axvline(best_step, color="#636363", linewidth=1, linestyle=":", label=f"best weights, step {best_step}")

    _scale_losses(axes, [loss for _, loss in [*smoothed, *validation]], [loss for _, loss in training])
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss per {unit}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.grid(alpha=0.3)
    lines = [*axes.get_lines(), *_plot_metrics(axes, records)]
    # Below the plot, where it covers no curve.
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _points(records: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Step and value of the records that have this value."""
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def _scale_losses(axes: Any, curves: list[float], each_step: list[float]) -> None:
    """Choose the scale of the loss: logarithmic where the curves fall by more than ten times.

    A logarithmic axis has no place for 0, and a single tiny loss would stretch it over many decades: where there are
    such, it is linear below a floor, down to 0. Negative losses leave it linear everywhere.
    """
    losses = [*curves, *each_step]
    lowest, top = min(losses), max(losses)
    lowest_positive = min((loss for loss in curves if loss > 0), default=top)
    if lowest < 0 or max(curves) <= _LOG_FROM * lowest_positive:
        # From 0 only where that leaves the curves room: 1.9 to 1.7 would be a flat line at the top.
        if 0 <= lowest < top / 2:
            axes.set_ylim(bottom=0)
        return
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: PLC0415

    # A label at 1, 2 and 5 of each decade; matplotlib's own locators crowd the linear part, or label powers of 10 only.
    ticks = [digit * 10.0**decade for decade in range(-12, 13) for digit in (1, 2, 5)]
    if lowest >= top / _LOG_TO:
        axes.set_yscale("log")
        axes.set_ylim(lowest / 1.3, top * 1.3)
    else:
        floor = max(lowest_positive / 2, top / _LOG_TO)
        axes.set_yscale("symlog", linthresh=floor, linscale=0.3)
        # A little below 0, so that points at 0 show whole.
        axes.set_ylim(-floor / 8, top * 1.3)
        ticks = [0.0, *(tick for tick in ticks if tick >= floor)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))


def _plot_metrics(axes: Any, records: list[dict[str, Any]]) -> list[Any]:
    """Plot the other validation metrics on an axis of their own, at the right; returns the lines."""
    last: dict[str, Any] = next((record for record in reversed(records) if "validation_loss" in record), {})
    names = [name for name in last if name.startswith("validation_") and name != "validation_loss"]
    if not names:
        return []

    right = axes.twinx()
    right.set_ylabel("validation metrics")
    for name, color in zip(names, ("#31a354", "#756bb1", "#636363", "#c51b8a"), strict=False):
        points = _points(records, name)
        if points:
            label = name.removeprefix("validation_").replace("_", " ")
            right.plot(*zip(*points, strict=True), color=color, marker=".", linestyle="--", label=label)
    lines: list[Any] = right.get_lines()
    return lines


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The mean over a window around each step, a twentieth of the run wide.

    Near the start the window is narrower, so that the curve begins at the run's first loss.
    """
    losses = np.array([loss for _, loss in points])
    reach = len(points) // 40
    smoothed = []
    for index, (step, _) in enumerate(points):
        half = min(index, reach)
        smoothed.append((step, float(losses[index - half : index + half + 1].mean())))
    return smoothed

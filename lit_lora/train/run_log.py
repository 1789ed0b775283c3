"""What a run records: one JSON line per step, a plot of the loss, and TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

from lit_lora import log
from lit_lora.files import disk_errors, write_text

__all__ = ["RunLog", "plot_losses", "read_metrics"]


class RunLog:
    """Appends to ``metrics.jsonl`` of a run folder, one flushed line per record.

    Args:
        folder: The run folder.
        first_step: Records of this step and later, left by a run that was stopped after its checkpoint, are dropped.
        tensorboard: Also write TensorBoard events; ignored when TensorBoard is not installed.

    Raises:
        DiskError: The disk is full or read-only.
    """

    def __init__(self, folder: Path, *, first_step: int = 0, tensorboard: bool = True) -> None:
        self.path = Path(folder) / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] <= first_step] if first_step else []
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
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
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in values.items()}
        with disk_errors(self.path):
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        for key, value in values.items():
            if self._board is not None and value is not None:
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


def plot_losses(path: Path, target: Path, *, unit: str = "learned token") -> None:
    """Draw training and validation loss of a ``metrics.jsonl`` into a PNG file, and what else validations measured.

    Nothing is drawn of nothing; and since all figures are in the other file, a disk that cannot take it is a warning.
    """
    records = read_metrics(path)
    training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["step"], r["validation_loss"]) for r in records if r.get("validation_loss") is not None]
    if not training and not validation:
        return
    # matplotlib takes a second to import: only when there is something to draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), color="#9ecae1", linewidth=1, label="training, each step")
        axes.plot(*zip(*_smooth(training), strict=True), color="#08519c", linewidth=2, label="training, smoothed")
    if validation:
        axes.plot(*zip(*validation, strict=True), color="#d94801", marker="o", label="validation")
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss per {unit}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    lines = [*axes.get_lines(), *_plot_figures(axes, records)]
    axes.legend(lines, [line.get_label() for line in lines])
    try:
        figure.savefig(target, dpi=120)
    except OSError as error:
        log.warn(f"{target}: the plot could not be written: {error.strerror}")


def _plot_figures(axes: Any, records: list[dict[str, Any]]) -> list[Any]:
    """Lines of the validation's other figures on a scale of their own, at the right."""
    last: dict[str, Any] = next((record for record in reversed(records) if "validation_loss" in record), {})
    names = [name for name in last if name.startswith("validation_") and name != "validation_loss"]
    if not names:
        return []
    right = axes.twinx()
    right.set_ylabel("validation figures")
    for name, colour in zip(names, ("#31a354", "#756bb1", "#636363", "#e6550d"), strict=False):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            label = name.removeprefix("validation_").replace("_", " ")
            right.plot(*zip(*points, strict=True), color=colour, marker=".", linestyle="--", label=label)
    lines: list[Any] = right.get_lines()
    return lines


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Exponential moving average with its start corrected."""
    smoothed, average, weight, decay = [], 0.0, 0.0, 0.9
    for step, value in points:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, average / weight))
    return smoothed

"""The singular values of every changed matrix as a picture: a panel for each kind of module, a line for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_lora.errors import DiskError
from lit_lora.merge.spectrum import Change

__all__ = ["plot_spectra"]

_FLOOR = 1e-5  # of the largest: below it lies what rounding left


def plot_spectra(changes: Sequence[Change], target: Path) -> None:
    """Draw the changes into a PNG file; those of vectors and of zeros are left out, one at least is neither.

    Raises:
        DiskError: The file cannot be written.
    """
    # matplotlib takes a second to import: only when there is something to draw.
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import Normalize  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    kinds: dict[str, list[Change]] = {}
    for change in changes:
        if change.stable_rank is not None:
            kinds.setdefault(change.kind, []).append(change)
    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure = Figure(figsize=(1.5 + 3.2 * columns, 2.8 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    last = max((change.layer or 0) for found in kinds.values() for change in found)
    colours = ScalarMappable(Normalize(0, max(last, 1)), colormaps["viridis"])
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, (kind, found) in zip(panels, kinds.items(), strict=False):
        _draw(panel, kind, found, colours)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    if last:
        figure.colorbar(colours, ax=panels, label="layer", fraction=0.03)
    figure.supxlabel("rank")
    figure.supylabel("singular value of the change")
    try:
        figure.savefig(target, format="png", dpi=120)
    except OSError as error:
        raise DiskError(f"{target}: the plot cannot be written: {error.strerror}") from error


def _draw(panel: Any, kind: str, changes: Sequence[Change], colours: Any) -> None:
    """One kind of module."""
    top = max(change.singular_values[0] for change in changes)
    for change in changes:
        values = [value for value in change.singular_values if value >= _FLOOR * top]
        colour = "#333333" if change.layer is None else colours.to_rgba(change.layer)
        marker = "." if len(values) <= 64 else None
        panel.plot(range(1, len(values) + 1), values, color=colour, linewidth=1, marker=marker)
    panel.set_yscale("log")
    panel.set_title(kind)
    panel.grid(alpha=0.3)

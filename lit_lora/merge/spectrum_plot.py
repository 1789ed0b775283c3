"""The plot of the singular values of every changed matrix: one panel per kind of module, one line per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_lora.errors import DiskError
from lit_lora.merge.spectrum import Change
from lit_lora.plots import new_figure

__all__ = ["plot_spectra"]

_FLOOR = 1e-5  # of the largest singular value; what is smaller is rounding


def plot_spectra(changes: Sequence[Change], target: Path) -> None:
    """Draw the changes of matrices into a PNG file; those of vectors, and of zeros, are left out.

    Args:
        changes: At least one is of a matrix and not zero.
        target: The file.

    Raises:
        DiskError: The file cannot be written.
    """
    # matplotlib takes a second to import: only when there is something to draw.
    from matplotlib import colormaps  # noqa: PLC0415
    from matplotlib.cm import ScalarMappable  # noqa: PLC0415
    from matplotlib.colors import Normalize  # noqa: PLC0415

    kinds: dict[str, list[Change]] = {}
    for change in changes:
        if change.stable_rank is not None:
            kinds.setdefault(change.kind, []).append(change)

    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    figure = new_figure(1.5 + 3.2 * columns, 2.8 * lines)
    last_layer = max((change.layer or 0) for of_kind in kinds.values() for change in of_kind)
    colors = ScalarMappable(Normalize(0, max(last_layer, 1)), colormaps["viridis"])
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, (kind, of_kind) in zip(panels, kinds.items(), strict=False):
        _draw(panel, kind, of_kind, colors)
    for panel in panels[len(kinds) :]:
        panel.set_axis_off()
    if last_layer:
        figure.colorbar(colors, ax=panels, label="layer", fraction=0.03)
    figure.supxlabel("rank")
    figure.supylabel("singular value of the change")
    try:
        figure.savefig(target, format="png", dpi=120)
    except OSError as error:
        raise DiskError(f"{target}: the plot cannot be written: {error.strerror}") from error


def _draw(panel: Any, kind: str, changes: Sequence[Change], colors: Any) -> None:
    """One kind of module, with the color of a line for its layer."""
    largest = max(change.singular_values[0] for change in changes)
    for change in changes:
        values = [value for value in change.singular_values if value >= _FLOOR * largest]
        color = "#333333" if change.layer is None else colors.to_rgba(change.layer)
        marker = "." if len(values) <= 64 else None
        panel.plot(range(1, len(values) + 1), values, color=color, linewidth=1, marker=marker)
    panel.set_yscale("log")
    panel.set_title(kind)
    panel.grid(alpha=0.3)

"""Figures for plots that are saved as files, without a display."""

from __future__ import annotations

from typing import Any

__all__ = ["new_figure"]


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure that never opens a window and changes no global state.

    Args:
        width: In inches.
        height: In inches.
    """
    # matplotlib takes a second to import: only when there is something to draw.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure

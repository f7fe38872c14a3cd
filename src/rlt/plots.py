"""The only module that imports matplotlib, and only when a picture is asked for; colours and lines of pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlt.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PIXELS_PER_INCH = 160
"""Of all pictures."""
INK, QUIET_INK, RULE = "#1f2328", "#59636e", "#d8dee4"
"""Colours of text, of what stands back, and of lines."""
KEPT, MARK = "#0072b2", "#d55e00"
"""Colours of data and of what is pointed at, by Okabe and Ito: told apart with any colour vision."""


def require_viz() -> None:
    """Say in one line, as a `MissingDependencyError`, what is missing for pictures."""
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            'pictures need matplotlib, which cannot be imported; install with: pip install "rlt[viz]"'
        ) from None


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of this size in inches, on its own Agg canvas: no global state, no display."""
    require_viz()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=PIXELS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png", metadata={"Software": "rlt"})


def figure_pixels(figure: Figure) -> Any:
    """A figure as NumPy uint8 [H, W, 3]."""
    canvas: Any = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def style_chart(axes: Axes) -> None:
    """Quiet axes: horizontal rules behind the data, a line below it, none at the sides."""
    axes.grid(axis="y", color=RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(RULE)
    axes.tick_params(colors=QUIET_INK, length=3)
    axes.xaxis.label.set_color(QUIET_INK)
    axes.yaxis.label.set_color(QUIET_INK)


def add_colour_bar(figure: Figure, axes: Axes, picture: AxesImage, label: str) -> None:
    """A bar at the right of `axes` that says what the colours of `picture` mean."""
    bar = figure.colorbar(picture, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, color=QUIET_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=QUIET_INK, length=3)
    if bar.solids is not None:
        bar.solids.set_alpha(1)

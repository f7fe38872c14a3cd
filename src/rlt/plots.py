"""The only module that imports matplotlib and Pillow, both when a picture is asked for and not before."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rlt.errors import MissingDependencyError

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL import Image, ImageFont

_PIXELS_PER_INCH = 160


def require_viz() -> None:
    """Say in one line what is missing for pictures.

    Raises:
        MissingDependencyError: if matplotlib or Pillow is not installed.
    """
    missing = [name for name, load in (("matplotlib", _load_matplotlib), ("pillow", _load_pillow)) if not load()]
    if missing:
        raise MissingDependencyError(
            f'pictures need {" and ".join(missing)}, which cannot be imported; install with: pip install "rlt[viz]"'
        )


def _load_matplotlib() -> bool:
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def _load_pillow() -> bool:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont  # noqa: F401
    except ImportError:
        return False
    return True


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of this size in inches, on its own Agg canvas: no global state, no display."""
    require_viz()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_PIXELS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png", metadata={"Software": "rlt"})


def new_image(width: int, height: int, colour: str) -> Image.Image:
    """An RGB image of one colour, in pixels."""
    require_viz()
    from PIL import Image

    return Image.new("RGB", (width, height), colour)


def image_from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    """An RGB image with the pixels of a uint8 [H, W, 3] array."""
    require_viz()
    from PIL import Image

    return Image.fromarray(pixels)


def draw_text(
    image: Image.Image, left: int, top: int, text: str, *, size: int, colour: str, bold: bool = False
) -> None:
    """Write one line of text, its top left corner at (left, top), `size` pixels high."""
    from PIL import ImageDraw

    ImageDraw.Draw(image).text((left, top), text, fill=colour, font=_font(size, bold))


def text_width(text: str, *, size: int, bold: bool = False) -> int:
    """Width of a line of text in pixels."""
    return round(_font(size, bold).getlength(text))


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, so that all pictures look alike on every machine."""
    require_viz()
    import matplotlib
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)

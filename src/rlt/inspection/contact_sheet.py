"""The contact sheet: one frame per time step, dropped patches dimmed, time and share kept written below."""

from __future__ import annotations

from pathlib import Path

from rlt.inspection.views import ClipView
from rlt.plots import draw_text, image_from_array, new_image, text_width

COLUMNS = 4
"""Frames side by side."""
MAX_STEPS = 16
"""More time steps than this are thinned out evenly."""
GAP = 12
"""Pixels between frames and around them."""
CAPTION_HEIGHT = 34
"""Pixels below each frame."""

_INK = "#1f2328"
_QUIET_INK = "#59636e"
_CAPTION_SIZE = 17


def shown_steps(num_steps: int) -> list[int]:
    """Which time steps the sheet shows: all of them, or 16 that are spread evenly."""
    if num_steps <= MAX_STEPS:
        return list(range(num_steps))
    return [index * (num_steps - 1) // (MAX_STEPS - 1) for index in range(MAX_STEPS)]


def frame_position(index: int, height: int, width: int) -> tuple[int, int]:
    """(top, left) in pixels of the frame at this place of the sheet."""
    row, column = divmod(index, COLUMNS)
    return GAP + row * (height + CAPTION_HEIGHT + GAP), GAP + column * (width + GAP)


def write_contact_sheet(view: ClipView, path: Path) -> None:
    """Write the sheet as PNG, with the last frame of each time step: the one that was compared with the step before."""
    frames, steps = list(view.dimmed()), shown_steps(view.num_steps)
    height, width = view.frames.shape[1:3]
    columns, rows = min(COLUMNS, len(steps)), -(-len(steps) // COLUMNS)
    sheet = new_image(GAP + columns * (width + GAP), rows * (height + CAPTION_HEIGHT + GAP) + GAP, "white")
    shares = view.mask.flatten(1).double().mean(1).tolist()
    for index, step in enumerate(steps):
        frame = min((step + 1) * view.tubelet_size, len(frames)) - 1
        top, left = frame_position(index, height, width)
        sheet.paste(image_from_array(frames[frame].numpy()), (left, top))
        below = top + height + 7
        draw_text(sheet, left, below, f"{view.times[frame]:.2f} s", size=_CAPTION_SIZE, colour=_QUIET_INK)
        share = f"{shares[step]:.0%} kept"
        right = left + width - text_width(share, size=_CAPTION_SIZE, bold=True)
        draw_text(sheet, right, below, share, size=_CAPTION_SIZE, colour=_INK, bold=True)
    sheet.save(path, format="PNG")

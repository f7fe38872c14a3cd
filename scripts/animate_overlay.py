"""Make a small animation for README from the overlay that `rlt inspect` wrote.

python scripts/animate_overlay.py OVERLAY.mp4 ANIMATION.webp
"""

from __future__ import annotations

import sys

import av
from PIL import Image

EVERY, MOST, WIDTH = 2, 48, 480
"""Frames that are taken, how many at most, and their width in pixels."""


def main() -> None:
    """Write the animation at half the rate of the overlay, of the same duration."""
    source, target = sys.argv[1:3]
    with av.open(source) as container:
        rate = float(container.streams.video[0].average_rate or 25)
        frames = [frame.to_image() for number, frame in enumerate(container.decode(video=0)) if number % EVERY == 0]
    small = [frame.resize((WIDTH, frame.height * WIDTH // frame.width), Image.Resampling.LANCZOS) for frame in frames]
    first, *others = small[:MOST]
    duration = round(1000 * EVERY / rate)
    first.save(target, save_all=True, append_images=others, duration=duration, loop=0, quality=55, method=6)


if __name__ == "__main__":
    main()

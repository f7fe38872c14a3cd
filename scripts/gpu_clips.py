"""Write the clips that a GPU is measured on: one compressed file of uint8 frames, for a machine without a decoder.

    python scripts/gpu_clips.py DATA [--output FILE]

DATA has the videos whose licences let them travel, in clips/, and labelled clips in surveillance/{train,val}/<class>.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rlt import assets
from rlt.benchmark.frame_files import Frames, unpack_archive, write_archive
from rlt.errors import InvalidArgumentError
from rlt.video import ClipSpec, list_videos, read_spread

ROOT = Path(__file__).parents[1]
CLIPS = ROOT / "output" / "gpu-clips.npz"
MAX_BYTES = 40_000_000
BUNDLED = {"traffic": 120, "animation": 72}
"""Bundled videos, and how many frames of them, all one after the other."""
STATIC = "corridor"
OTHERS = {STATIC: ("one-by-one-person-detection.mp4", 192), "bottles": ("bottle-detection.mp4", 72)}
"""Others by their names here: file below DATA/clips, and frames."""
LABELLED = ClipSpec(8, 4, size=112)
NOTES = """traffic, corridor, bottles: Intel Corporation, Intel IoT Devkit sample videos, CC BY 4.0
animation: (c) 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0
surveillance: S. Akti et al., IPTA 2019, fight-detection-surv-dataset, MIT
All are scaled and cut to their middle.
"""


def main() -> None:
    """Write the file, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=CLIPS)
    options = parser.parse_args()
    size = write_clips(options.output, options.data)
    print(f"{options.output}: {size / 1e6:.1f} MB")


def write_clips(target: Path, data: Path) -> int:
    """Write all clips; gives the size of the file in bytes.

    Raises:
        InvalidArgumentError: if the file is larger than what can travel; it is written nevertheless.
    """
    size = write_archive(target, _videos(data), notes=NOTES, on_progress=lambda name: print(f"  {name}", flush=True))
    if size >= MAX_BYTES:
        raise InvalidArgumentError(f"{target} has {size:,} bytes; below {MAX_BYTES:,} are needed, take fewer frames")
    return size


def write_tiny_clips(target: Path) -> int:
    """What a rehearsal runs on: the same names, of the bundled videos alone and small."""

    def videos() -> Iterator[tuple[str, Frames]]:
        frames = {name: _frames(assets.path(f"{name}.mp4"), ClipSpec(16, 1, size=64)) for name in BUNDLED}
        yield from frames.items()
        yield from ((name, frames["traffic"]) for name in OTHERS)
        for split in ("train", "val"):
            for name, label in zip(BUNDLED, ("fight", "noFight"), strict=True):
                clips = read_spread(assets.path(f"{name}.mp4"), ClipSpec(4, 2, size=32), 4)
                yield f"surveillance-{split}-{label}", np.stack([clip.frames.numpy() for clip in clips])

    return write_archive(target, videos(), notes=NOTES)


def clip_files(archive: Path) -> dict[str, Path]:
    """The frames of each video by name, unpacked beside the archive."""
    return {path.stem: path for path in unpack_archive(archive, archive.with_suffix(""))}


def _videos(data: Path) -> Iterator[tuple[str, Frames]]:
    for name, count in BUNDLED.items():
        yield name, _frames(assets.path(f"{name}.mp4"), ClipSpec(count, 1))
    for name, (file, count) in OTHERS.items():
        yield name, _frames(data / "clips" / file, ClipSpec(count, 1))
    for split in ("train", "val"):
        for folder in sorted(path for path in (data / "surveillance" / split).iterdir() if path.is_dir()):
            clips = [_frames(path, LABELLED) for path in list_videos(folder)]
            yield f"surveillance-{split}-{folder.name}", np.stack(clips)


def _frames(path: Path, spec: ClipSpec) -> Frames:
    """The clip in the middle of a video."""
    return read_spread(path, spec)[0].frames.numpy()


if __name__ == "__main__":
    main()

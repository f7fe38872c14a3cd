"""Frames in files that need no decoder: `.npy` of one video, and one compressed file of many to travel.

The compressed file is an `.npz` whose members are packed by LZMA. A frame is in it as its difference from the one
before (uint8, which wraps around), because most of a video repeats: static cameras shrink to a seventh.

Shape legend: T frames, H and W pixels; axes before T number videos.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlt.errors import InvalidArgumentError, VideoError
from rlt.files import replacing
from rlt.video import ClipSpec

Frames = NDArray[np.uint8]
SUFFIX = ".npy"
"""Of a file that holds the frames of one video as they are."""


def read_clips(path: Path, spec: ClipSpec, num_clips: int) -> list[Tensor]:
    """Clips uint8 [num_frames, H, W, 3], spread over the video as `rlt.video.read_spread` spreads them.

    Raises:
        VideoError: if the file holds no uint8 [T, H, W, 3].
        InvalidArgumentError: if its frames have another size, since nothing here scales, or a rate is asked for, which
            it does not know.
    """
    frames = read_frames(path, axes=4)
    if spec.fps is not None:
        raise InvalidArgumentError(f"fps is {spec.fps}, and {path} knows no times; give frame_stride")
    if frames.shape[1:3] != spec.frame_size:
        raise InvalidArgumentError(f"size is {spec.size}; the frames of {path} are {frames.shape[1]}x{frames.shape[2]}")
    last = len(frames) - 1
    spread = spec.spread(num_clips, len(frames), Fraction(1))
    return [torch.from_numpy(frames[[min(int(place), last) for place in places]]) for places in spread]


def read_frames(path: Path, *, axes: int) -> Frames:
    """The uint8 array [..., T, H, W, 3] of a file, with so many axes; it is read when it is looked at.

    Raises:
        VideoError: if the file cannot be read or holds another array.
    """
    try:
        frames = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise VideoError(f"{path}: cannot be read ({error}); make the file again") from None
    if frames.dtype != np.uint8 or frames.ndim != axes or frames.shape[-1] != 3 or frames.size == 0:
        raise VideoError(f"{path}: holds {frames.dtype} {list(frames.shape)}; uint8 frames of {axes} axes are needed")
    return frames


def write_archive(
    path: Path,
    videos: Iterable[tuple[str, Frames]],
    *,
    notes: str = "",
    on_progress: Callable[[str], None] = lambda _: None,
) -> int:
    """Write videos, by name, each uint8 [..., T, H, W, 3]; gives the size of the file in bytes.

    `notes`, such as authors and licences, go in as notes.txt. `on_progress` is called with each name.
    """
    with replacing(path) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_LZMA) as archive:
            archive.writestr("notes.txt", notes)
            for name, frames in videos:
                on_progress(name)
                changes = frames.copy()
                changes[..., 1:, :, :, :] -= frames[..., :-1, :, :, :]
                with archive.open(name + SUFFIX, "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, changes, allow_pickle=False)
        return temporary.stat().st_size


def unpack_archive(path: Path, folder: Path) -> list[Path]:
    """Write each video as NAME.npy into a folder, those that are newer than the archive excepted; gives all of them.

    Raises:
        VideoError: if the file is no such archive, or damaged.
    """
    written = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(SUFFIX)):
                target = folder / Path(name).name
                written.append(target)
                if target.exists() and target.stat().st_mtime >= path.stat().st_mtime:
                    continue
                with archive.open(name) as member:
                    changes = np.lib.format.read_array(member, allow_pickle=False)
                with replacing(target) as temporary, temporary.open("wb") as file:
                    np.save(file, np.add.accumulate(changes, axis=changes.ndim - 4, dtype=np.uint8))
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise VideoError(f"{path}: no whole archive of frames ({error}); make it again") from None
    return written

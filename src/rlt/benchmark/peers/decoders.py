"""Decoders that `rlt benchmark decode` compares: ours, and those that others use. The only importer of OpenCV."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlt.benchmark.harness import BenchmarkSettings
from rlt.errors import VideoError
from rlt.video import read_spread

Decoder = Callable[[Path], Tensor]
"""File -> uint8 [T, H, W, 3], the clip in the middle of the video."""


def decoders(settings: BenchmarkSettings) -> dict[str, Decoder]:
    """Every decoder that is installed, by name, each with one thread; "pyav_threads" with as many as libav likes.

    "pyav" is what `rlt.read_clip` and the data loaders use, "pyav_whole" the same without leaving frames out.
    "torchcodec" and "opencv" are optional packages.
    """
    found: dict[str, Decoder] = {
        "pyav": partial(_read, settings, "pyav", 1),
        "pyav_whole": partial(_read, settings, "pyav_whole", 1),
        "pyav_threads": partial(_read, settings, "pyav", 0),
    }
    if _works("torchcodec"):
        found["torchcodec"] = partial(_read, settings, "torchcodec", 1)
    if find_spec("cv2") is not None:
        found["opencv"] = partial(_read_with_opencv, settings)
    return found


def _works(package: str) -> bool:
    """Whether a package imports; torchcodec is often installed beside no FFmpeg, or one that it cannot load."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _read(settings: BenchmarkSettings, decoder: str, num_threads: int, path: Path) -> Tensor:
    return read_spread(path, settings.clip, decoder=decoder, num_threads=num_threads)[0].frames


def _read_with_opencv(settings: BenchmarkSettings, path: Path) -> Tensor:
    """The usual way: seek by frame number, grab what is skipped, resize the short side, cut out the centre."""
    import cv2

    clip = settings.clip
    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        stride = max(round(clip.step(Fraction(capture.get(cv2.CAP_PROP_FPS)))), 1)
        span = (clip.num_frames - 1) * stride + 1
        start = max((int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) - span) // 2, 0)
        if start:
            capture.set(cv2.CAP_PROP_POS_FRAMES, start)
        frames: list[Tensor] = []
        for number in range(span):
            if not capture.grab():
                break
            if number % stride == 0:
                frames.append(_scale_with_opencv(cv2, capture.retrieve()[1], clip.size))
    finally:
        capture.release()
    if not frames:
        raise VideoError(f"{path}: OpenCV reads no frame of it")
    frames += frames[-1:] * (clip.num_frames - len(frames))
    return torch.stack(frames)


def _scale_with_opencv(cv2: Any, image: Any, size: int) -> Tensor:
    height, width = image.shape[:2]
    scale = size / min(height, width)
    target = (max(round(width * scale), size), max(round(height * scale), size))
    image = cv2.resize(image, target, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return torch.from_numpy(cv2.cvtColor(image[top : top + size, left : left + size], cv2.COLOR_BGR2RGB))

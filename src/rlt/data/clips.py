"""Which frames and which part of the picture training and evaluation see of a video file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from rlt.data.sampler import derive_seed
from rlt.errors import InvalidArgumentError
from rlt.structures import Clip
from rlt.video import ClipPlan, Source, read_views
from rlt.video.geometry import CropBox, View, random_resized_box
from rlt.video.sampling import clip_span, clip_starts, frame_indices, segment_indices

if TYPE_CHECKING:
    from rlt.data.augment import AugmentConfig

SAMPLINGS = ("dense", "uniform")
"""Values of `ClipConfig.sampling`."""
CROP_COUNTS = (1, 3)
"""Values of `ViewConfig.num_crops`."""


@dataclass
class ClipConfig:
    """Frames and size of a clip."""

    num_frames: int = 16
    """Frames in a clip, at least 1; a multiple of the model's tubelet size."""
    frame_stride: int = 4
    """For "dense": distance of two sampled frames in frames of the video, at least 1."""
    size: int = 224
    """Height and width in pixels, at least 1; a multiple of the model's patch size."""
    sampling: str = "dense"
    """One of `SAMPLINGS`: "dense" takes frames `frame_stride` apart from one part of the video (Kinetics), "uniform"
    takes one frame of each of `num_frames` equal segments of the whole video (Something-Something)."""

    def __post_init__(self) -> None:
        """Hold values.

        Raises:
            InvalidArgumentError: naming the field.
        """
        clip_span(self.num_frames, self.frame_stride)
        if self.size < 1:
            raise InvalidArgumentError(f"size is {self.size}; at least 1 pixel is needed")
        if self.sampling not in SAMPLINGS:
            raise InvalidArgumentError(f"sampling is {self.sampling!r}; allowed are {', '.join(SAMPLINGS)}")


@dataclass
class ViewConfig:
    """Views of a video in evaluation; their predictions are averaged."""

    num_clips: int = 5
    """Clips over time, at least 1."""
    num_crops: int = 3
    """Crops of each clip, 1 (the centre) or 3 (both ends and the centre of the longer side)."""

    def __post_init__(self) -> None:
        """Hold values.

        Raises:
            InvalidArgumentError: naming the field.
        """
        if self.num_clips < 1:
            raise InvalidArgumentError(f"num_clips is {self.num_clips}; a whole number of at least 1 is needed")
        if self.num_crops not in CROP_COUNTS:
            raise InvalidArgumentError(f"num_crops is {self.num_crops}; {' or '.join(map(str, CROP_COUNTS))} is needed")

    @property
    def num_views(self) -> int:
        """Clips times crops."""
        return self.num_clips * self.num_crops


def training_places(num_video_frames: int, config: ClipConfig, generator: torch.Generator) -> list[int]:
    """Frame numbers of a random clip: a random start, or a random frame of each segment.

    A video shorter than a dense clip starts at 0 and its last frame is repeated: numbers past the end mean that.
    """
    if config.sampling == "uniform":
        return segment_indices(num_video_frames, torch.rand(config.num_frames, generator=generator).tolist())
    room = max(num_video_frames - clip_span(config.num_frames, config.frame_stride), 0)
    start = int(torch.randint(room + 1, (), generator=generator))
    return frame_indices(start, config.num_frames, config.frame_stride)


def evaluation_places(num_video_frames: int, config: ClipConfig, num_clips: int) -> list[list[int]]:
    """Frame numbers of `num_clips` clips, always the same ones.

    Dense clips are spread evenly from the beginning to the end of the video, a single one lies in its middle. Uniform
    clip j of n takes from each segment the frame at j / n of its length, as VideoMAE does for two; a single one takes
    the middle frames.
    """
    if config.sampling == "uniform":
        offsets = [clip / num_clips for clip in range(num_clips)] if num_clips > 1 else [0.5]
        return [segment_indices(num_video_frames, [offset] * config.num_frames) for offset in offsets]
    starts = clip_starts(num_video_frames, num_clips, clip_span(config.num_frames, config.frame_stride))
    return [frame_indices(start, config.num_frames, config.frame_stride) for start in starts]


def evaluation_views(config: ClipConfig, num_crops: int) -> tuple[View, ...]:
    """The crops of a clip: left or top, centre, right or bottom of the longer side, or the centre alone."""
    places = (0.5,) if num_crops == 1 else (0.0, 0.5, 1.0)
    # The shorter side fits exactly, so the place along it does not matter.
    return tuple(View(config.size, position=(place, place)) for place in places)


def read_training_clip(source: Source, config: ClipConfig, augment: AugmentConfig, *, seed: int) -> Clip:
    """A random clip of a video; frames, crop and mirroring are a function of `seed`.

    Crop, scaling and mirroring happen in the decoder's filter graph, so that only the pixels that are used are
    converted.

    Raises:
        VideoError: if the file cannot be opened, or a frame is damaged or cut off.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    mirrored = augment.horizontal_flip and bool(torch.rand((), generator=generator) < 0.5)
    crop = partial(_training_crop, augment=augment, seed=derive_seed(seed, 1)) if augment.random_resized_crop else None
    view = View(config.size, crop=crop, hflip=mirrored)

    def plan(num_video_frames: int) -> list[ClipPlan]:
        draws = torch.Generator().manual_seed(derive_seed(seed, 2))
        return [ClipPlan(tuple(training_places(num_video_frames, config, draws)), (view,))]

    return read_views(source, plan)[0][0]


def _training_crop(width: int, height: int, *, augment: AugmentConfig, seed: int) -> CropBox:
    return random_resized_box(
        width,
        height,
        scale=(augment.crop_scale_min, augment.crop_scale_max),
        ratio=(augment.crop_ratio_min, augment.crop_ratio_max),
        generator=torch.Generator().manual_seed(seed),
    )


def read_evaluation_clips(source: Source, config: ClipConfig, views: ViewConfig) -> list[Clip]:
    """All views of a video, clip by clip and crop by crop within a clip; it is opened once, a frame decoded once.

    Raises:
        VideoError: if the file cannot be opened, or a frame is damaged or cut off.
    """
    crops = evaluation_views(config, views.num_crops)

    def plan(num_video_frames: int) -> list[ClipPlan]:
        return [
            ClipPlan(tuple(places), crops) for places in evaluation_places(num_video_frames, config, views.num_clips)
        ]

    return [clip for clips in read_views(source, plan) for clip in clips]

"""Which frames and which part of the picture training and evaluation see of a video file."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import TYPE_CHECKING

import torch

from rlt.checks import at_least, one_of
from rlt.data.sampler import derive_seed
from rlt.structures import Clip
from rlt.video import ClipPlan, ClipSpec, Source, VideoFile, read_views
from rlt.video.geometry import CropBox, View, random_resized_box
from rlt.video.sampling import segment_indices
from rlt.video.spec import Place

if TYPE_CHECKING:
    from rlt.data.augment import AugmentConfig


@dataclass
class ViewConfig:
    """Views of a video in evaluation; their predictions are averaged."""

    num_clips: int = 5
    """Clips over time, at least 1."""
    num_crops: int = 3
    """Crops of each clip, 1 (the centre) or 3 (both ends and the centre of the longer side)."""

    def __post_init__(self) -> None:
        at_least(1, num_clips=self.num_clips)
        one_of((1, 3), num_crops=self.num_crops)


def training_places(clip: ClipSpec, num_video_frames: int, rate: Fraction, generator: torch.Generator) -> list[Place]:
    """Where the frames of a random clip lie: from a random start on, or a random frame of each segment.

    A video shorter than a dense clip starts at 0 and its last frame is repeated: places past the end mean that.
    """
    if clip.sampling == "uniform":
        return [*segment_indices(num_video_frames, torch.rand(clip.num_frames, generator=generator).tolist())]
    room = max(num_video_frames - clip.span(rate), 0)
    return clip.places(int(torch.randint(room + 1, (), generator=generator)), rate)


def read_training_clip(
    source: Source, clip: ClipSpec, augment: AugmentConfig, *, seed: int, decoder: str = "pyav"
) -> Clip:
    """A random clip of a video; frames, crop and mirroring are a function of `seed`.

    Crop, scaling and mirroring happen in the decoder's filter graph, so that only the pixels that are used are
    converted.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    mirrored = augment.horizontal_flip and bool(torch.rand((), generator=generator) < 0.5)

    def crop(width: int, height: int) -> CropBox:
        return random_resized_box(
            width,
            height,
            scale=(augment.crop_scale_min, augment.crop_scale_max),
            ratio=(augment.crop_ratio_min, augment.crop_ratio_max),
            generator=torch.Generator().manual_seed(derive_seed(seed, 1)),
        )

    view = View(clip.size, crop=crop if augment.random_resized_crop else None, hflip=mirrored)

    def plan(file: VideoFile) -> list[ClipPlan]:
        draws = torch.Generator().manual_seed(derive_seed(seed, 2))
        return [ClipPlan(training_places(clip, file.num_frames, file.rate, draws), (view,))]

    return read_views(source, plan, decoder=decoder)[0][0]


def read_evaluation_clips(source: Source, clip: ClipSpec, views: ViewConfig, *, decoder: str = "pyav") -> list[Clip]:
    """All views of a video, clip by clip and crop by crop within a clip; it is opened once, a frame decoded once."""
    # Crops lie at the left or top, the centre, the right or bottom; the shorter side fits, so that one number will do.
    places = (0.5,) if views.num_crops == 1 else (0.0, 0.5, 1.0)
    crops = tuple(View(clip.size, position=(place, place)) for place in places)

    def plan(file: VideoFile) -> list[ClipPlan]:
        return [ClipPlan(frames, crops) for frames in clip.spread(views.num_clips, file.num_frames, file.rate)]

    return [*chain.from_iterable(read_views(source, plan, decoder=decoder))]

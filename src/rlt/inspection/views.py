"""Frames for people to look at: read at a readable size, dropped patches dimmed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlt._sources import Source
from rlt.errors import InvalidArgumentError, VideoWarning
from rlt.inspection.scan import ScanResult
from rlt.structures import Clip, TokenGrid
from rlt.tokens import keep_mask
from rlt.transforms import Size
from rlt.video import VideoInfo, read_clip

_SHORT_SIDE = 336  # pixels of a frame in the pictures: four of them side by side fit on a page
_LUMA = (77, 150, 29)  # BT.601 weights of red, green and blue in 1/256
_DIMMED_PERCENT = 36  # brightness of a dropped patch: it stands back, but what was dropped can still be seen
_DIMMED_TINT = (14, 18, 30)  # added to it, a trace of blue that tells it from dark things that are kept


@dataclass(frozen=True)
class ClipSettings:
    """How a video is sampled and cut into tokens."""

    num_frames: int
    """Frames in a clip."""
    frame_stride: int
    """Distance of two sampled frames, in frames of the video."""
    size: Size
    """Size of the frames that tokens are made of, see `rlt.read_clip`."""
    tubelet_size: int
    """Frames per token."""
    patch_size: int
    """Height and width of a token in pixels."""
    threshold: float
    """Tokens that differ by more than this from the one before are kept, see `rlt.keep_mask`."""


@dataclass(frozen=True, eq=False)
class ClipView:
    """One clip as it is shown."""

    frames: Tensor
    """uint8 [T, H, W, 3], larger than what tokens are made of, if the video allows; the padding at its end is left
    out, so T can be less than the number of sampled frames."""
    times: Tensor
    """float64 [T], seconds."""
    mask: Tensor
    """bool [T', H', W'], True where a token is kept."""
    tubelet_size: int
    """Frames per token."""

    @property
    def num_steps(self) -> int:
        """Time steps that hold at least one frame."""
        return min(-(-len(self.frames) // self.tubelet_size), len(self.mask))

    def dimmed(self) -> Tensor:
        """uint8 [T, H, W, 3]: kept patches as they are, dropped ones grey and dark, with a trace of blue."""
        step = torch.arange(len(self.frames)) // self.tubelet_size
        return dim_dropped(self.frames, self.mask[step.clamp(max=len(self.mask) - 1)])


def dim_dropped(frames: Tensor, mask: Tensor) -> Tensor:
    """Take the colour and most of the light from dropped patches.

    Args:
        frames: uint8 [T, H, W, 3].
        mask: bool [T, H', W'], True where a patch is kept and stays as it is; H' divides H and W' divides W.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        InvalidArgumentError: if the mask does not fit the frames.
    """
    num_frames, height, width, _ = frames.shape
    rows, columns = mask.shape[-2:]
    if len(mask) != num_frames or height % rows or width % columns:
        raise InvalidArgumentError(f"mask has shape {list(mask.shape)}, which does not fit frames {list(frames.shape)}")
    kept = mask.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
    luma = sum(frames[..., channel].int() * weight for channel, weight in enumerate(_LUMA))
    dark = (luma * _DIMMED_PERCENT // (256 * 100))[..., None] + torch.tensor(_DIMMED_TINT)
    return torch.where(kept[..., None], frames, dark.to(torch.uint8))


def display_size(grid: TokenGrid, patch_size: int, info: VideoInfo) -> tuple[int, int]:
    """(height, width) in pixels at which to show frames: the same cut, an even number of pixels per patch.

    About 336 pixels on the short side, but not more than the video has, unless the tokens are made of more.
    """
    cells = min(grid.height, grid.width)
    finest = max(min(info.width, info.height) // cells, patch_size)
    cell = max(min(_SHORT_SIDE // cells, finest), 1)
    cell += cell % 2  # H.264 in its common form wants even sides
    return grid.height * cell, grid.width * cell


def view_clip(source: Source, info: VideoInfo, settings: ClipSettings, start: float) -> ClipView:
    """Read the clip that begins at `start` seconds: at the size of the tokens for the mask, larger for the eye."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)  # given when the video was counted
        clip = _read(source, settings, settings.size, start)
        mask = keep_mask(
            clip.frames[None],
            threshold=settings.threshold,
            tubelet_size=settings.tubelet_size,
            patch_size=settings.patch_size,
        )[0]
        shown = display_size(TokenGrid(*mask.shape), settings.patch_size, info)
        if shown != tuple(clip.frames.shape[1:3]):
            clip = _read(source, settings, shown, start)
    num_real = max(len(clip.frames) - clip.num_repeated, 1)
    return ClipView(clip.frames[:num_real], clip.times[:num_real], mask, settings.tubelet_size)


def view_window(
    source: Source, info: VideoInfo, settings: ClipSettings, scan: ScanResult, max_seconds: float
) -> Iterator[ClipView]:
    """Clips on end, at most `max_seconds` of them around the representative clip, one in memory at a time."""
    for start in window_starts(info, settings, scan, max_seconds):
        view = view_clip(source, info, settings, start)
        within = int((view.times < start + max_seconds).sum())
        yield ClipView(view.frames[:within], view.times[:within], view.mask, view.tubelet_size)


def window_starts(info: VideoInfo, settings: ClipSettings, scan: ScanResult, max_seconds: float) -> list[float]:
    """Seconds at which the clips of the window begin: whole clips on end, the representative one among them."""
    seconds_per_clip = settings.num_frames * settings.frame_stride / info.fps
    num_clips = max(int(max_seconds / seconds_per_clip + 1e-6), 1)
    begin = scan.clips[scan.representative()].start
    end = max(clip.end for clip in scan.clips)
    after = int((end - begin) / seconds_per_clip + 1e-6) + 1
    before = min(max(num_clips - after, 0), int(begin / seconds_per_clip + 1e-6))
    first = max(begin - before * seconds_per_clip, 0.0)
    starts = [first + index * seconds_per_clip for index in range(num_clips)]
    return [start for start in starts if start <= end]


def _read(source: Source, settings: ClipSettings, size: Size, start: float) -> Clip:
    return read_clip(
        source, num_frames=settings.num_frames, frame_stride=settings.frame_stride, size=size, start=start
    )

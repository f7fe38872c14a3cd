"""Frames for people to look at: read at a readable size, dropped patches dimmed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlt.errors import InvalidArgumentError, VideoWarning
from rlt.inspection.scan import ScanResult
from rlt.structures import Clip, TokenGrid
from rlt.tokens import keep_mask
from rlt.video import ClipSpec, Source, VideoInfo, read_clip
from rlt.video.geometry import Size

_SHORT_SIDE = 336  # pixels of a frame in the pictures: four of them side by side fit on a page
_FRAMES_AT_ONCE = 64  # decoded together: every read begins at the key frame before it
_LUMA = (0.299, 0.587, 0.114)  # BT.601 weights of red, green and blue
_DIMMED = 0.36  # brightness of a dropped patch: it stands back, but what was dropped can still be seen
_DIMMED_TINT = (14.0, 18.0, 30.0)  # added to it, a trace of blue that tells it from dark things that are kept


@dataclass(frozen=True)
class ClipSettings(ClipSpec):
    """How a video is sampled, decoded and cut into tokens."""

    tubelet_size: int = 2
    """Frames per token."""
    patch_size: int = 16
    """Height and width of a token in pixels."""
    threshold: float = 0.1
    """Tokens that differ by more than this from the one before are kept, see `rlt.keep_mask`."""
    decoder: str = "pyav"
    """See `rlt.read_clip`."""


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

    def dimmed(self) -> Iterator[Tensor]:
        """uint8 [H, W, 3], frame by frame: kept patches as they are, dropped ones grey and dark."""
        for number, frame in enumerate(self.frames):
            yield dim_dropped(frame, self.mask[min(number // self.tubelet_size, len(self.mask) - 1)])


def dim_dropped(frame: Tensor, mask: Tensor) -> Tensor:
    """Take the colour and most of the light from dropped patches.

    Args:
        frame: uint8 [H, W, 3].
        mask: bool [H', W'], True where a patch is kept and stays as it is; H' divides H and W' divides W.

    Returns:
        uint8 [H, W, 3].

    Raises:
        InvalidArgumentError: if the mask does not fit the frame.
    """
    height, width, _ = frame.shape
    rows, columns = mask.shape
    if height % rows or width % columns:
        raise InvalidArgumentError(f"mask has shape {list(mask.shape)}, which does not fit frame {list(frame.shape)}")
    kept = mask.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)
    luma = (frame.float() @ torch.tensor(_LUMA))[..., None]
    dark = luma * _DIMMED + torch.tensor(_DIMMED_TINT)
    return torch.where(kept[..., None], frame, dark.to(torch.uint8))


def display_size(grid: TokenGrid, patch_size: int, info: VideoInfo) -> tuple[int, int]:
    """(height, width) in pixels at which to show frames: the same cut, an even number of pixels per patch.

    About 336 pixels on the short side, but not more than the video has, unless the tokens are made of more.
    """
    cells = min(grid.height, grid.width)
    finest = max(min(info.width, info.height) // cells, patch_size)
    cell = max(min(_SHORT_SIDE // cells, finest), 1)
    cell += cell % 2  # H.264 in its common form wants even sides
    return grid.height * cell, grid.width * cell


def view_clips(
    source: Source, info: VideoInfo, settings: ClipSettings, start: float, num_clips: int = 1
) -> list[ClipView]:
    """Read clips on end from `start` seconds: at the size of the tokens for the mask, larger for the eye.

    Fewer than `num_clips` come back where the video ends, at least one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)  # given when the video was counted
        clip = _read(source, settings, settings.size, start, num_clips)
        masks = keep_mask(
            clip.frames.unflatten(0, (num_clips, settings.num_frames)),
            threshold=settings.threshold,
            tubelet_size=settings.tubelet_size,
            patch_size=settings.patch_size,
        )
        shown = display_size(TokenGrid(*masks.shape[1:]), settings.patch_size, info)
        if shown != tuple(clip.frames.shape[1:3]):
            clip = _read(source, settings, shown, start, num_clips)
    num_real = max(len(clip.frames) - clip.num_repeated, 1)
    frames, times = (values[:num_real].split(settings.num_frames) for values in (clip.frames, clip.times))
    return [ClipView(*parts, settings.tubelet_size) for parts in zip(frames, times, masks, strict=False)]


def view_window(
    source: Source, info: VideoInfo, settings: ClipSettings, scan: ScanResult, max_seconds: float
) -> Iterator[ClipView]:
    """Clips on end, at most `max_seconds` of them around the representative clip, a few in memory at a time."""
    starts = window_starts(info, settings, scan, max_seconds)
    at_once = max(_FRAMES_AT_ONCE // settings.num_frames, 1)
    for chunk in range(0, len(starts), at_once):
        views = view_clips(source, info, settings, starts[chunk], len(starts[chunk : chunk + at_once]))
        for view in views:
            within = int((view.times < starts[0] + max_seconds).sum())
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
    # A file that is cut off has no frames to repeat at its end: only clips that lie before the cut can be read.
    needed = (settings.num_frames - 1) * settings.frame_stride / info.fps - 1e-6 if info.truncated else 0.0
    return [start for start in starts if start + needed <= end]


def _read(source: Source, settings: ClipSettings, size: Size, start: float, num_clips: int) -> Clip:
    return read_clip(
        source,
        num_frames=settings.num_frames * num_clips,
        frame_stride=settings.frame_stride,
        size=size,
        start=start,
        decoder=settings.decoder,
    )

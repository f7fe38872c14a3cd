"""Clips in, numbers out: what run-length tokenization keeps of a video, one clip at a time and none of them held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlt.errors import InvalidArgumentError, VideoError
from rlt.inspection.views import ClipSettings
from rlt.structures import Clip, TokenGrid
from rlt.tokens import PatchView
from rlt.video import VideoInfo

_CURVE_END = 0.5  # normalised units; beyond it hardly any real video keeps more than the first step of a clip
_CURVE_POINTS = 101


def curve_thresholds(threshold: float | None) -> tuple[float, ...]:
    """Thresholds of the curve, ascending: 0 to 0.5 in steps of 0.005, further if `threshold` is beyond, and itself."""
    chosen = () if threshold is None else (float(threshold),)
    if threshold == float("inf"):
        raise InvalidArgumentError(f"threshold is {threshold}; a number is needed that a curve can reach")
    end = max(_CURVE_END, *(1.25 * at for at in chosen), 0.0)
    steps = {round(end * index / (_CURVE_POINTS - 1), 6) for index in range(_CURVE_POINTS)}
    return tuple(sorted(steps | set(chosen)))


@dataclass(frozen=True)
class ClipCount:
    """How many tokens one clip keeps. Numbers only: a video of any length fits into memory."""

    start: float
    end: float
    """Times of the first and the last frame in seconds."""
    times: tuple[float, ...]
    """Seconds at which each time step begins. Steps that only repeat the last frame of the video are left out."""
    kept: tuple[int, ...]
    """Tokens kept in each of these time steps; the first step keeps all of them."""
    grid: TokenGrid
    """(T', H', W') of the clip."""
    num_repeated: int = 0
    """Frames at its end that repeat the last one of the video, see `Clip`."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one time step before anything is dropped: H' * W'."""
        return self.grid.height * self.grid.width

    @property
    def num_kept(self) -> int:
        """Tokens kept."""
        return sum(self.kept)

    @property
    def num_tokens(self) -> int:
        """Tokens before anything is dropped."""
        return len(self.kept) * self.tokens_per_step

    @property
    def tokens_kept(self) -> float:
        """Share of tokens kept, above 0 and up to 1."""
        return self.num_kept / self.num_tokens

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of tokens kept in each time step, 0 to 1."""
        return tuple(count / self.tokens_per_step for count in self.kept)


class ScanResult:
    """What all clips of a video say together. They are added one after the other, and no frames are held."""

    def __init__(self, settings: ClipSettings, info: VideoInfo) -> None:
        self._settings = settings
        self.clips: list[ClipCount] = []
        """One entry per clip, in the order of the video."""
        self._thresholds = torch.tensor(curve_thresholds(settings.threshold), dtype=torch.float64)
        self._kept_at = torch.zeros(len(self._thresholds), dtype=torch.int64)
        self._kept_at_place = torch.zeros((), dtype=torch.int64)
        self.seconds_per_step = settings.tubelet_size * float(settings.pace(info)) / info.fps
        """Seconds from one time step to the next."""

    def add(self, clip: Clip, seen: PatchView | None = None) -> None:
        """Count what one clip keeps, with these settings and at every threshold of the curve. `seen` if at hand."""
        grid = self._settings.patches.grid(clip.frames.shape)
        if self.clips and grid != self.grid:
            raise VideoError(f"{clip.source}: its frames change their size in the middle; give a size in pixels")
        steps = _real_steps(clip, self._settings.tubelet_size)
        seen = self._settings.patch_view(clip) if seen is None else seen
        differences = seen.differences[0, : steps - 1].cpu()
        # How many of the sorted differences lie above each threshold: strictly greater, as `keep_mask` has it.
        ordered = differences.flatten().sort().values
        above = len(ordered) - torch.searchsorted(ordered, self._thresholds, right=True)
        self._kept_at += above + grid.height * grid.width
        mask = self._settings.keep_mask(seen)[:steps].cpu()
        self._kept_at_place = self._kept_at_place + mask.sum(0)
        self.clips.append(
            ClipCount(
                start=float(clip.times[0]),
                end=float(clip.times[len(clip.times) - 1 - clip.num_repeated]),
                times=tuple(clip.times[:: self._settings.tubelet_size][:steps].tolist()),
                kept=tuple(mask.flatten(1).sum(1).tolist()),
                grid=grid,
                num_repeated=clip.num_repeated,
            )
        )

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Thresholds of the curve, ascending; the chosen one is among them."""
        return tuple(self._thresholds.tolist())

    @property
    def curve(self) -> tuple[float, ...]:
        """Share of tokens that each of these thresholds keeps, 0 to 1."""
        return tuple((self._kept_at.double() / self.num_tokens).tolist())

    @property
    def num_repeated(self) -> int:
        """Frames in all clips that only repeat the last one of the video."""
        return sum(clip.num_repeated for clip in self.clips)

    @property
    def run_lengths(self) -> Tensor:
        """float64 [H', W']: mean run length of the tokens at each place, in time steps, 1 to T'."""
        return sum(len(clip.kept) for clip in self.clips) / self._kept_at_place.double()

    @property
    def grid(self) -> TokenGrid:
        """(T', H', W') of one clip."""
        return self.clips[0].grid

    @property
    def num_kept(self) -> int:
        """Tokens kept in all clips."""
        return sum(clip.num_kept for clip in self.clips)

    @property
    def num_tokens(self) -> int:
        """Tokens of all clips before anything is dropped."""
        return sum(clip.num_tokens for clip in self.clips)

    @property
    def tokens_kept(self) -> float:
        """Share of all tokens that is kept, above 0 and up to 1."""
        return self.num_kept / self.num_tokens

    def representative(self) -> int:
        """Index of the clip that keeps the share nearest to that of the whole video, among clips of full length."""
        longest = max(len(clip.kept) for clip in self.clips)
        whole = [index for index, clip in enumerate(self.clips) if len(clip.kept) == longest]
        share = self.tokens_kept
        return min(whole, key=lambda index: abs(self.clips[index].tokens_kept - share))


def bend_of_curve(thresholds: Sequence[float], shares: Sequence[float]) -> float | None:
    """The threshold where a falling curve of shares bends most; None where it has no bend.

    That is the point furthest below the straight line between its ends (Satopaa et al., "Finding a Kneedle in a
    Haystack", 2011). A lower threshold keeps much more, a higher one little less.
    """
    (first, last), (high, low) = (thresholds[0], thresholds[-1]), (shares[0], shares[-1])
    line = [high + (low - high) * (at - first) / (last - first) for at in thresholds]
    below = [expected - share for expected, share in zip(line, shares, strict=True)]
    deepest = max(range(len(below)), key=below.__getitem__)
    return thresholds[deepest] if below[deepest] > 1e-9 else None


def _real_steps(clip: Clip, tubelet_size: int) -> int:
    """Time steps that hold at least one frame of the video. Padding is no saving, so it is not counted as one."""
    num_frames = len(clip.frames)
    num_real = max(num_frames - clip.num_repeated, 1)
    return min(-(-num_real // tubelet_size), num_frames // tubelet_size)

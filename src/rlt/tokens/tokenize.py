"""Frames -> run-length tokens: the kept patches, where they were, and for how long they stand (paper, section 3.1).

Shape legend: B clips, T frames, H and W pixels, T' H' W' tokens along time, height and width, N kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, overload

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Unpack

from rlt.checks import named_options
from rlt.errors import InvalidArgumentError
from rlt.structures import Clip, PatchSpec, RunLengthTokens, check_frames
from rlt.tokens.differences import UNITS, PatchView, cuda_kernels, widest
from rlt.tokens.naming import choose_rule
from rlt.tokens.rules import PAPER_THRESHOLD, Rule, Threshold, apply_rule

Frames = Clip | Sequence[Clip] | Tensor | np.ndarray[Any, Any]
"""What is cut into tokens: a clip, several of one size, or uint8 [T, H, W, 3] or [B, T, H, W, 3]."""
POLICY = "give rule=rlt.Everything(), rlt.Random(), rlt.UniformFrames() or another rule"


@named_options(std=UNITS)
def keep_mask(
    frames: Tensor | np.ndarray[Any, Any],
    *,
    threshold: float = PAPER_THRESHOLD,
    spec: PatchSpec | None = None,
    tubelet_size: int | None = None,
    patch_size: int | None = None,
) -> Tensor:
    """Mark the tokens that differ from the token before them at the same place (paper, section 3.1).

    The last frame of tubelet t is compared with the first frame of tubelet t - 1. A token is kept where the mean
    absolute difference over its pixels and channels is greater than `threshold`; the first time step is always kept.
    Differences are those of the ImageNet-normalised clip (the mean cancels), computed exactly from the integers.

    Args:
        frames: uint8 [B, T, H, W, 3].
        threshold: 0 or more, in units of the ImageNet-normalised clip; 0.1 is about 5.7 grey levels. 0 drops exact
            repeats only.
        spec: how frames are cut into tokens; or
        tubelet_size: frames per token, 2 if not given; divides T.
        patch_size: height and width of a token in pixels, 16 if not given; divides H and W.

    Returns:
        bool [B, T', H', W'], True where the token is kept.

    Raises:
        InvalidArgumentError: for frames of another dtype or shape, sizes that do not divide, or a threshold that is
            negative or not a number.
    """
    view = PatchView(_pixels(frames), PatchSpec.of(spec, tubelet_size=tubelet_size, patch_size=patch_size))
    return apply_rule(Threshold(threshold), view)


def run_lengths(mask: Tensor) -> Tensor:
    """For how many time steps each kept token stands: until the next kept token of its column, or the end.

    Args:
        mask: bool [B, T', H', W'] (or [T', H', W'] for one clip); the first time step is kept everywhere.

    Returns:
        int64 [number of True], in (b, t, h, w) order: the order of `mask.nonzero()`, not of the columns.

    Raises:
        InvalidArgumentError: if mask has another dtype or shape, or drops a token of the first time step.
    """
    if mask.dtype != torch.bool or mask.ndim not in (3, 4) or mask.shape[-3] == 0:
        raise InvalidArgumentError(f"mask is {mask.dtype} {list(mask.shape)}; bool [B, T', H', W'] is needed")
    if not bool(mask.select(-3, 0).all()):
        raise InvalidArgumentError(_FIRST_STEP)
    return length_at_place(mask)[mask]


_FIRST_STEP = "mask drops a token of the first time step; every column needs its first token"


def length_at_place(mask: Tensor) -> Tensor:
    """For how many time steps the token of each place stands if it is kept, until the next kept one of its column or
    the end: int64 [..., T', H', W'] from bool of the same shape; where nothing is kept it is not to be read."""
    time = mask.shape[-3]
    steps = torch.arange(time, device=mask.device).view(time, 1, 1)
    starts = torch.where(mask, steps, time)
    # The next kept t strictly after t: a running minimum from the end, shifted by one step.
    next_start = starts.flip(-3).cummin(-3).values.flip(-3)
    end = torch.full_like(next_start.narrow(-3, 0, 1), time)
    return torch.cat([next_start.narrow(-3, 1, time - 1), end], dim=-3) - steps


class _Options(TypedDict, total=False):
    """What `tokenize` takes beside frames."""

    threshold: float | None
    keep_ratio: float | None
    max_tokens: int | None
    reference: str | None
    exposure: str | None
    motion: str | None
    rule: Rule | str | None
    spec: PatchSpec | None
    seeds: Sequence[int] | None
    tubelet_size: int | None
    patch_size: int | None


@overload
def tokenize(frames: Clip, **options: Unpack[_Options]) -> RunLengthTokens: ...


@overload
def tokenize(frames: Frames, **options: Unpack[_Options]) -> RunLengthTokens | list[RunLengthTokens]: ...


@named_options(policy=POLICY, std=UNITS)
def tokenize(
    frames: Frames,
    *,
    threshold: float | None = None,
    keep_ratio: float | None = None,
    max_tokens: int | None = None,
    reference: str | None = None,
    exposure: str | None = None,
    motion: str | None = None,
    rule: Rule | str | None = None,
    spec: PatchSpec | None = None,
    seeds: Sequence[int] | None = None,
    tubelet_size: int | None = None,
    patch_size: int | None = None,
) -> RunLengthTokens | list[RunLengthTokens]:
    """Cut frames into tokens and drop those that repeat.

    Args:
        frames: a `Clip`, or uint8 [T, H, W, 3] (one clip); several clips of one size, or uint8 [B, T, H, W, 3].
            NumPy arrays are taken as tensors are.
        threshold: keep what differs by more from the token before it, see `keep_mask`; 0.1 where nothing else is given.
        keep_ratio: keep this share of each clip's tokens instead, those that differ most, see `rlt.Budget`.
        max_tokens: keep at most so many of each clip's tokens instead.
        reference: "previous" (paper) or "anchor": compare with the token that stands for the place.
        exposure: "none" (paper) or "gain": undo what automatic exposure, flicker and fades do to a whole step first.
        motion: "none" (paper) or "global": undo one shift of the whole picture first, see `rlt.Threshold`.
        rule: any rule, or the name of one, see `rlt.tokens.rules`.
        spec: how frames are cut into tokens (`model.config.patches`; `model.tokenize` needs none); or
        tubelet_size: frames per token, 2 if not given; divides T.
        patch_size: height and width of a token in pixels, 16 if not given; divides H and W.
        seeds: one number per clip for rules that draw; 0, 1, 2, ... if not given.

    Returns:
        The tokens of the clip; for several clips a list with the tokens of each, ready for `rlt.pack`.

    Raises:
        InvalidArgumentError: for frames or sizes that `keep_mask` does not accept, or options that exclude each other.
    """
    pixels = _pixels(frames)
    check_frames(pixels)
    tokens = tokenize_batch(
        pixels if pixels.ndim == 5 else pixels[None],
        choose_rule(
            rule,
            threshold=threshold,
            keep_ratio=keep_ratio,
            max_tokens=max_tokens,
            reference=reference,
            exposure=exposure,
            motion=motion,
        ),
        PatchSpec.of(spec, tubelet_size=tubelet_size, patch_size=patch_size),
        seeds,
    )
    return tokens if pixels.ndim == 5 else tokens[0]


def tokenize_batch(
    frames: Tensor, rule: Rule, spec: PatchSpec, seeds: Sequence[int] | None = None
) -> list[RunLengthTokens]:
    """`tokenize` for uint8 [B, T, H, W, 3] and a rule, with the one return type that a type checker can follow."""
    mask = apply_rule(rule, PatchView(frames, spec), seeds)
    return _cut(frames, mask, spec, runs=rule.runs, whole=not rule.drops_places)


def select_tokens(
    frames: Tensor,
    mask: Tensor,
    *,
    runs: bool = True,
    spec: PatchSpec | None = None,
    tubelet_size: int | None = None,
    patch_size: int | None = None,
) -> list[RunLengthTokens]:
    """Gather patches, coordinates and run lengths of the kept tokens with one mask, so that they cannot disagree.

    Args:
        frames: uint8 [B, T, H, W, 3].
        mask: bool [B, T', H', W'], True where a token is kept.
        runs: whether a token stands for what follows it; the mask then keeps the first time step. Otherwise every run
            length is 1.
        spec: how frames are cut into tokens; or
        tubelet_size: frames per token, 2 if not given.
        patch_size: height and width of a token in pixels, 16 if not given.

    Returns:
        One `RunLengthTokens` per clip.

    Raises:
        InvalidArgumentError: if the mask does not fit the frames, keeps nothing of a clip, or drops a token of the
            first time step though tokens stand for runs.
    """
    check_frames(frames, dims=(5,))
    spec = PatchSpec.of(spec, tubelet_size=tubelet_size, patch_size=patch_size)
    expected = [len(frames), *spec.grid(frames.shape)]
    if list(mask.shape) != expected:
        raise InvalidArgumentError(f"mask has shape {list(mask.shape)}; the frames need {expected}")
    return _cut(frames, mask, spec, runs=runs)


def _cut(frames: Tensor, mask: Tensor, spec: PatchSpec, *, runs: bool, whole: bool = True) -> list[RunLengthTokens]:
    counts, is_first_whole = _look(mask)
    if runs and whole and not is_first_whole:
        raise InvalidArgumentError(_FIRST_STEP)
    if kernels := cuda_kernels(frames.device):
        lengths = length_at_place(mask) if runs else mask.long()
        patches, coords, lengths = kernels.gather(frames, mask, lengths, sum(counts), spec)
    else:
        places = mask.nonzero()
        patches, coords = _gather_patches(frames, places, spec.tubelet_size, spec.patch_size), places[:, 1:]
        lengths = length_at_place(mask)[mask] if runs else torch.ones_like(places[:, 0])
    grid = spec.grid(frames.shape)
    clips = zip(patches.split(counts), coords.split(counts), lengths.split(counts), strict=True)
    return [RunLengthTokens(*rows, grid, spec) for rows in clips]


def _look(mask: Tensor) -> tuple[list[int], bool]:
    """Tokens of each clip, and whether the first time step is kept whole; the host waits for the device once."""
    *counts, dropped = torch.cat([mask.flatten(1).sum(1), (~mask[:, 0]).sum()[None]]).tolist()
    return counts, dropped == 0


def _pixels(frames: Frames) -> Tensor:
    """The frames of whatever may be cut into tokens.

    Raises:
        InvalidArgumentError: for the path of a video, or clips of several sizes.
    """
    if isinstance(frames, str | Path):
        raise InvalidArgumentError(f"frames is the path {str(frames)!r}; read it first: rlt.read_clip({str(frames)!r})")
    if isinstance(frames, Clip):
        return frames.frames
    if isinstance(frames, np.ndarray):
        return torch.from_numpy(frames if frames.flags.writeable else frames.copy())
    if isinstance(frames, Tensor):
        return frames
    if len({clip.frames.shape for clip in frames}) != 1:
        raise InvalidArgumentError(
            f"frames are {len(frames)} clips of {len({clip.frames.shape for clip in frames})} sizes; clips of one size "
            "are needed, tokenize others one by one"
        )
    return torch.stack([clip.frames for clip in frames])


def _gather_patches(frames: Tensor, places: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """Copy kept patches only: uint8 [B, T, H, W, 3], int64 [N, 4] -> uint8 [N, tubelet * patch * patch * 3].

    A patch is tubelet * patch pixel rows, each of which is contiguous in the frames, so that one `index_select` of
    pixel rows does it. Rows travel as the widest integers that divide them.
    """
    batch, num_frames, height, width, channels = frames.shape
    pixel_rows = widest(frames.reshape(batch * num_frames * height * (width // patch_size), patch_size * channels))
    b, t, h, w = places.unbind(1)
    columns = width // patch_size
    first_row = ((b * num_frames + t * tubelet_size) * height + h * patch_size) * columns + w
    frame = torch.arange(tubelet_size, device=places.device).view(-1, 1) * (height * columns)
    line = torch.arange(patch_size, device=places.device) * columns
    rows = first_row.view(-1, 1) + (frame + line).flatten()
    return pixel_rows.index_select(0, rows.flatten()).view(torch.uint8).view(len(places), -1)

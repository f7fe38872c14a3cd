"""Frames -> run-length tokens: which patches repeat, and for how long (paper, section 3.1).

Pure functions of tensors; nothing here knows a model. Shape legend: B clips, T frames, H and W pixels, T' H' W' tokens
along time, height and width (T' = T / tubelet_size, H' = H / patch_size, W' = W / patch_size), N kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args, overload

import torch
from torch import Tensor

from rlt.errors import InvalidArgumentError
from rlt.structures import Clip, RunLengthTokens, TokenGrid, check_frames

if TYPE_CHECKING:
    from rlt.tokens._cuda import DeviceTokens

Policy = Literal["rlt", "none"]
"""Which tokens are kept: "rlt" drops repeats of the token before, "none" keeps all."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of each RGB channel on the scale 0..1 that VideoMAE models are trained with."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of each RGB channel on the scale 0..1 that VideoMAE models are trained with."""

_EVEN_BYTES = 0x00FF00FF00FF00FF
_BYTES_PER_WORD = 8
_MAX_ROWS_PER_LANE = 65535 // 255  # a 16-bit lane holds the sum of this many bytes


def token_grid(frames_shape: tuple[int, ...] | torch.Size, *, tubelet_size: int = 2, patch_size: int = 16) -> TokenGrid:
    """Grid (T', H', W') of frames of shape [..., T, H, W, 3].

    Raises:
        InvalidArgumentError: if a size is below 1 or does not divide its axis.
    """
    for name, size in (("tubelet_size", tubelet_size), ("patch_size", patch_size)):
        if size < 1:
            raise InvalidArgumentError(f"{name} is {size}; at least 1 is needed")
    num_frames, height, width = frames_shape[-4:-1]
    if num_frames % tubelet_size:
        raise InvalidArgumentError(
            f"{num_frames} frames are not a multiple of tubelet_size={tubelet_size}; "
            f"sample {max(num_frames // tubelet_size, 1) * tubelet_size} frames"
        )
    if height % patch_size or width % patch_size:
        nearest = tuple(max(round(side / patch_size), 1) * patch_size for side in (height, width))
        raise InvalidArgumentError(
            f"frames of {height}x{width} pixels are not a multiple of patch_size={patch_size}; "
            f"resize or crop to {nearest[0]}x{nearest[1]}"
        )
    return TokenGrid(num_frames // tubelet_size, height // patch_size, width // patch_size)


def keep_mask(
    frames: Tensor,
    *,
    threshold: float = 0.1,
    tubelet_size: int = 2,
    patch_size: int = 16,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Tensor:
    """Mark the tokens that differ from the token before them at the same place (paper, section 3.1).

    The last frame of tubelet t is compared with the first frame of tubelet t - 1. A token is kept where the mean
    absolute difference over its pixels and channels is greater than `threshold`; the first time step is always kept.
    Differences are those of the normalised clip (the mean cancels), computed exactly from the integers.

    Args:
        frames: uint8 [B, T, H, W, 3].
        threshold: 0 or more, in units of the normalised clip; 0.1 is about 5.7 grey levels. 0 drops exact repeats only.
        tubelet_size: frames per token; divides T.
        patch_size: height and width of a token in pixels; divides H and W.
        std: standard deviation of each channel on the scale 0..1 that the network's input is divided by.

    Returns:
        bool [B, T', H', W'], True where the token is kept.

    Raises:
        InvalidArgumentError: for frames of another dtype or shape, sizes that do not divide, or a threshold that is
            negative or not a number.
    """
    check_frames(frames, dims=(5,))
    check_threshold(threshold)
    grid = token_grid(frames.shape, tubelet_size=tubelet_size, patch_size=patch_size)
    mask = torch.ones(len(frames), *grid, dtype=torch.bool, device=frames.device)
    differences = token_differences(frames, tubelet_size=tubelet_size, patch_size=patch_size, std=std)
    torch.gt(differences, threshold, out=mask[:, 1:])
    return mask


def token_differences(
    frames: Tensor,
    *,
    tubelet_size: int = 2,
    patch_size: int = 16,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Tensor:
    """How much each token differs from the one before it at the same place: what `keep_mask` holds its threshold to.

    Mean absolute difference over the pixels and channels of a token, between the last frame of tubelet t and the first
    frame of tubelet t - 1, in units of the normalised clip. One call serves any number of thresholds:
    `token_differences(frames) > threshold` is `keep_mask(frames, threshold=threshold)[:, 1:]` on every entry.

    Args:
        frames: uint8 [B, T, H, W, 3].
        tubelet_size: frames per token; divides T.
        patch_size: height and width of a token in pixels; divides H and W.
        std: standard deviation of each channel on the scale 0..1 that the network's input is divided by.

    Returns:
        float64 [B, T' - 1, H', W'], 0 or more. The first time step has no token before it and is not in it.

    Raises:
        InvalidArgumentError: for frames of another dtype or shape, or sizes that do not divide.
    """
    check_frames(frames, dims=(5,))
    time, height, width = token_grid(frames.shape, tubelet_size=tubelet_size, patch_size=patch_size)
    differences = torch.empty(len(frames), time - 1, height, width, dtype=torch.float64, device=frames.device)
    if time == 1:
        return differences
    scale = torch.tensor([255.0 * channel for channel in std], dtype=torch.float64, device=frames.device)
    values_per_token = 3 * patch_size**2
    # One clip at a time: its differences fit into the cache, which is worth a factor of six.
    for clip, differences_clip in zip(frames, differences, strict=True):
        sums = difference_sums(clip, tubelet_size, patch_size)
        torch.div((sums / scale).sum(-1), values_per_token, out=differences_clip)
    return differences


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
        raise InvalidArgumentError("mask drops a token of the first time step; every column needs its first token")
    time = mask.shape[-3]
    steps = torch.arange(time, device=mask.device).view(time, 1, 1)
    starts = torch.where(mask, steps, time)
    # The next kept t strictly after t: a running minimum from the end, shifted by one step.
    next_start = starts.flip(-3).cummin(-3).values.flip(-3)
    end = torch.full_like(next_start.narrow(-3, 0, 1), time)
    next_start = torch.cat([next_start.narrow(-3, 1, time - 1), end], dim=-3)
    return (next_start - steps)[mask]


@overload
def tokenize(
    frames: Clip, *, threshold: float = ..., policy: Policy = ..., tubelet_size: int = ..., patch_size: int = ...
) -> RunLengthTokens: ...


@overload
def tokenize(
    frames: Tensor, *, threshold: float = ..., policy: Policy = ..., tubelet_size: int = ..., patch_size: int = ...
) -> RunLengthTokens | list[RunLengthTokens]: ...


def tokenize(
    frames: Clip | Tensor,
    *,
    threshold: float = 0.1,
    policy: Policy = "rlt",
    tubelet_size: int = 2,
    patch_size: int = 16,
) -> RunLengthTokens | list[RunLengthTokens]:
    """Cut frames into tokens and drop those that repeat.

    Args:
        frames: a `Clip`, or uint8 [T, H, W, 3] (one clip), or uint8 [B, T, H, W, 3].
        threshold: see `keep_mask`; not used by policy "none".
        policy: "rlt" (the paper's rule) or "none" (keep every token).
        tubelet_size: frames per token; divides T.
        patch_size: height and width of a token in pixels; divides H and W.

    Returns:
        The tokens of the clip; for [B, T, H, W, 3] a list with the tokens of each clip, ready for `rlt.pack`.

    Raises:
        InvalidArgumentError: for an unknown policy, or anything that `keep_mask` does not accept.
    """
    pixels = frames.frames if isinstance(frames, Clip) else frames
    check_frames(pixels)
    batch = pixels if pixels.ndim == 5 else pixels[None]
    tokens = tokenize_batch(batch, threshold=threshold, policy=policy, tubelet_size=tubelet_size, patch_size=patch_size)
    return tokens if pixels.ndim == 5 else tokens[0]


def tokenize_batch(
    frames: Tensor,
    *,
    threshold: float = 0.1,
    policy: Policy = "rlt",
    tubelet_size: int = 2,
    patch_size: int = 16,
) -> list[RunLengthTokens]:
    """`tokenize` for uint8 [B, T, H, W, 3], with the one return type that a type checker can follow."""
    check_frames(frames, dims=(5,))
    check_threshold(threshold)
    if policy not in get_args(Policy):
        raise InvalidArgumentError(f"policy is {policy!r}; allowed are {', '.join(map(repr, get_args(Policy)))}")
    grid = token_grid(frames.shape, tubelet_size=tubelet_size, patch_size=patch_size)
    fused = _fused_tokenizer(frames.device) if policy == "rlt" and frames.is_cuda else None
    if fused is not None:
        found = fused(frames, threshold, tubelet_size, patch_size)
        return _split(found.patches, found.coords, found.lengths, list(found.sizes), grid, tubelet_size, patch_size)
    if policy == "none":
        mask = torch.ones(len(frames), *grid, dtype=torch.bool, device=frames.device)
    else:
        mask = keep_mask(frames, threshold=threshold, tubelet_size=tubelet_size, patch_size=patch_size)
    return select_tokens(frames, mask, tubelet_size=tubelet_size, patch_size=patch_size)


def select_tokens(
    frames: Tensor,
    mask: Tensor,
    *,
    lengths: Tensor | None = None,
    tubelet_size: int = 2,
    patch_size: int = 16,
) -> list[RunLengthTokens]:
    """Gather patches, coordinates and run lengths of the kept tokens with one mask, so that they cannot disagree.

    Args:
        frames: uint8 [B, T, H, W, 3].
        mask: bool [B, T', H', W'], True where a token is kept.
        lengths: int64 [number of True] run lengths in (b, t, h, w) order, for masks that are no runs; None computes
            them from the mask, which must then keep the first time step.
        tubelet_size: frames per token.
        patch_size: height and width of a token in pixels.

    Returns:
        One `RunLengthTokens` per clip.

    Raises:
        InvalidArgumentError: if the mask does not fit the frames, or drops a token of the first time step without
            lengths being given.
    """
    check_frames(frames, dims=(5,))
    grid = token_grid(frames.shape, tubelet_size=tubelet_size, patch_size=patch_size)
    if tuple(mask.shape) != (len(frames), *grid):
        raise InvalidArgumentError(f"mask has shape {list(mask.shape)}; the frames need {[len(frames), *grid]}")
    lengths = run_lengths(mask) if lengths is None else lengths
    places = mask.nonzero()
    patches = _gather_patches(frames, places, tubelet_size, patch_size)
    counts = mask.flatten(1).sum(1).tolist()
    return _split(patches, places[:, 1:], lengths, counts, grid, tubelet_size, patch_size)


def check_threshold(threshold: float) -> None:
    """Raise unless `threshold` is 0 or more.

    Raises:
        InvalidArgumentError: naming the value.
    """
    if not threshold >= 0:
        raise InvalidArgumentError(f"threshold is {threshold}; 0 or more is needed (0.1 is the paper's)")


@cache
def _fused_tokenizer(device: torch.device) -> Callable[..., DeviceTokens] | None:
    """The kernels for frames on this CUDA device, or None if triton is missing or cannot run here."""
    try:
        from rlt.tokens import _cuda
    except ImportError:
        return None
    return _cuda.tokenize_on_device if _cuda.can_run(device) else None


def _split(
    patches: Tensor,
    coords: Tensor,
    lengths: Tensor,
    counts: list[int],
    grid: TokenGrid,
    tubelet_size: int,
    patch_size: int,
) -> list[RunLengthTokens]:
    """Cut the rows of all clips into one `RunLengthTokens` per clip."""
    return [
        RunLengthTokens(patches_N, coords_N, lengths_N, grid, tubelet_size, patch_size)
        for patches_N, coords_N, lengths_N in zip(
            patches.split(counts), coords.split(counts), lengths.split(counts), strict=True
        )
    ]


def difference_sums(clip: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """Sum of absolute differences per patch and channel: uint8 [T, H, W, 3] -> int64 [T' - 1, H', W', 3]."""
    last = clip[2 * tubelet_size - 1 :: tubelet_size]
    first = clip[:-tubelet_size:tubelet_size]
    difference = torch.maximum(last, first)  # uint8 has no absolute difference; this one cannot wrap around
    difference -= torch.minimum(last, first)
    difference = difference.contiguous()  # elementwise results keep the layout of channels-first views
    steps, height, width, channels = difference.shape
    rows = difference.view(steps, height // patch_size, patch_size, width * channels)
    columns = _sum_rows(rows)
    return columns.view(steps, height // patch_size, width // patch_size, patch_size, channels).sum(3)


def _sum_rows(rows: Tensor) -> Tensor:
    """Sum uint8 [..., R, bytes] over R into int32 [..., bytes].

    Eight bytes at a time in the 16-bit lanes of one int64: torch has no fast widening sum of bytes. Falls back to the
    plain sum where a row is no whole number of words, or a lane could overflow.
    """
    *_, num_rows, num_bytes = rows.shape
    if num_bytes % _BYTES_PER_WORD or num_rows > _MAX_ROWS_PER_LANE:
        return rows.sum(-2, dtype=torch.int32)
    words = rows.view(torch.int64)
    even = (words & _EVEN_BYTES).sum(-2)
    odd = ((words >> 8) & _EVEN_BYTES).sum(-2)
    lanes = torch.stack([even.view(torch.int16), odd.view(torch.int16)], dim=-1).flatten(-2)
    return lanes.to(torch.int32) & 0xFFFF


def _gather_patches(frames: Tensor, places: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """Copy kept patches only: uint8 [B, T, H, W, 3], int64 [N, 4] -> uint8 [N, tubelet * patch * patch * 3].

    A patch is tubelet * patch pixel rows, each of which is contiguous in the frames, so that one `index_select` of
    pixel rows does it. Rows travel as the widest integers that divide them.
    """
    batch, num_frames, height, width, channels = frames.shape
    pixel_rows = frames.reshape(batch * num_frames * height * (width // patch_size), patch_size * channels)
    for wide in (torch.int64, torch.int32, torch.int16):
        if pixel_rows.shape[1] % wide.itemsize == 0 and pixel_rows.storage_offset() % wide.itemsize == 0:
            pixel_rows = pixel_rows.view(wide)
            break
    b, t, h, w = places.unbind(1)
    columns = width // patch_size
    first_row = ((b * num_frames + t * tubelet_size) * height + h * patch_size) * columns + w
    frame = torch.arange(tubelet_size, device=places.device).view(-1, 1) * (height * columns)
    line = torch.arange(patch_size, device=places.device) * columns
    rows = first_row.view(-1, 1) + (frame + line).flatten()
    return pixel_rows.index_select(0, rows.flatten()).view(torch.uint8).view(len(places), -1)

"""The rule of `rlt.tokens` as two fused kernels for frames on a CUDA device. The only importer of triton.

The torch code of `rlt.tokens` makes a dozen passes over the frames; here they are read once to compare them, and the
kept patches once more to copy them. `rlt.tokens` imports this module for CUDA frames only, and does without where
triton is not installed or cannot compile. Shape legend as in `rlt.tokens`.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlt.errors import InvalidArgumentError
from rlt.structures import TokenGrid, check_frames
from rlt.tokens.tokenize import IMAGENET_STD, check_threshold, token_grid

_MAX_BLOCK = 1024  # values that one program holds at a time; larger patches take several turns


class DeviceTokens(NamedTuple):
    """Kept tokens of all clips in (b, t, h, w) order, on the device of the frames. M rows: N, or the capacity."""

    patches: Tensor
    """uint8 [M, tubelet_size * patch_size**2 * 3], laid out (frame, row, column, channel)."""
    coords: Tensor
    """int64 [M, 3] = (t, h, w), in tokens."""
    lengths: Tensor
    """int64 [M], 1..T': for how many time steps the token stands."""
    counts: Tensor
    """int64 [B], kept tokens of each clip. Their sum N may exceed a given capacity: tokens were left out then."""
    mask: Tensor
    """bool [B, T', H', W'], True where a token is kept."""
    sizes: tuple[int, ...]
    """`counts` on the host; empty with a given capacity, where the host does not know them."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _difference_sum(last: tl.tensor, first: tl.tensor, offsets: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Sum of absolute differences of one channel of two patches: int64 scalar."""
    last_values = tl.load(last + offsets, mask=inside, other=0).to(tl.int32)
    first_values = tl.load(first + offsets, mask=inside, other=0).to(tl.int32)
    return tl.sum(tl.abs(last_values - first_values), axis=0).to(tl.int64)


# Specialised to a clip of one step the loop could never run, which triton 3.6 fails to compile.
@triton.jit(do_not_specialize=["time"])  # type: ignore[untyped-decorator,unused-ignore]
def _mark_kernel(
    frames: tl.tensor,  # uint8 [B, T, H, W, 3]
    threshold: tl.tensor,  # float64 [1]; a float argument would arrive as float32
    mask: tl.tensor,  # out: uint8 [B, T', H', W'], 1 where kept
    lengths: tl.tensor,  # out: int32 [B, T', H', W'], run length where kept, else 0
    time: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    stride_c: tl.tensor,
    SCALE_0: tl.constexpr,
    SCALE_1: tl.constexpr,
    SCALE_2: tl.constexpr,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per token column (b, h, w). It walks backwards, so that the end of each run is known at its start."""
    column = tl.program_id(0).to(tl.int64)
    places = height * width
    b = column // places
    place = column % places
    corner = frames + b * stride_b + (place // width) * PATCH * stride_h + (place % width) * PATCH * stride_w
    limit = tl.load(threshold)
    step = b * time * places + place
    end = tl.full((), 0, tl.int64) + time
    t = end - 1
    while t > 0:
        last = corner + (t * TUBELET + TUBELET - 1) * stride_t
        first = corner + (t - 1) * TUBELET * stride_t
        sum_0 = tl.full((), 0, tl.int64)
        sum_1 = tl.full((), 0, tl.int64)
        sum_2 = tl.full((), 0, tl.int64)
        for start in range(0, PATCH * PATCH, BLOCK):
            pixel = start + tl.arange(0, BLOCK)
            inside = pixel < PATCH * PATCH
            offsets = (pixel // PATCH).to(tl.int64) * stride_h + (pixel % PATCH).to(tl.int64) * stride_w
            sum_0 += _difference_sum(last, first, offsets, inside)
            sum_1 += _difference_sum(last, first, offsets + stride_c, inside)
            sum_2 += _difference_sum(last, first, offsets + 2 * stride_c, inside)
        # The same operations in the same order as rlt.tokens.token_differences: the last bit decides at the threshold.
        total = sum_0.to(tl.float64) / tl.full((), SCALE_0, tl.float64)
        total = total + sum_1.to(tl.float64) / tl.full((), SCALE_1, tl.float64)
        total = total + sum_2.to(tl.float64) / tl.full((), SCALE_2, tl.float64)
        kept = total / tl.full((), 3 * PATCH * PATCH, tl.float64) > limit
        tl.store(mask + step + t * places, kept.to(tl.uint8))
        tl.store(lengths + step + t * places, tl.where(kept, end - t, 0).to(tl.int32))
        end = tl.where(kept, t, end)
        t -= 1
    tl.store(mask + step, tl.full((), 1, tl.uint8))
    tl.store(lengths + step, end.to(tl.int32))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gather_kernel(
    pixels: tl.tensor,  # [B, T, H, units of a line, CHANNELS], see _widest
    run_lengths: tl.tensor,  # int32 [B, T', H', W'], 0 where dropped
    ranks: tl.tensor,  # int64 [B, T', H', W'], inclusive cumulative sum of the mask
    patches: tl.tensor,  # out: [M, TUBELET * PATCH * UNITS * CHANNELS]
    coords: tl.tensor,  # out: int64 [M, 3]
    lengths: tl.tensor,  # out: int64 [M]
    capacity: tl.tensor,
    time: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    stride_b: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    stride_w: tl.tensor,
    stride_c: tl.tensor,
    TUBELET: tl.constexpr,
    PATCH: tl.constexpr,
    UNITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per token: copies it to its row, or does nothing if the token is dropped or beyond the capacity."""
    token = tl.program_id(0).to(tl.int64)
    run_length = tl.load(run_lengths + token).to(tl.int64)
    row = tl.load(ranks + token) - 1
    if (run_length > 0) & (row < capacity):
        w = token % width
        h = token // width % height
        t = token // width // height % time
        b = token // width // height // time
        tl.store(coords + row * 3, t)
        tl.store(coords + row * 3 + 1, h)
        tl.store(coords + row * 3 + 2, w)
        tl.store(lengths + row, run_length)
        corner = pixels + b * stride_b + t * TUBELET * stride_t + h * PATCH * stride_h + w * UNITS * stride_w
        target = patches + row * (TUBELET * PATCH * UNITS * CHANNELS)
        for start in range(0, TUBELET * PATCH * UNITS * CHANNELS, BLOCK):
            value = start + tl.arange(0, BLOCK)
            inside = value < TUBELET * PATCH * UNITS * CHANNELS
            channel = (value % CHANNELS).to(tl.int64)
            unit = (value // CHANNELS % UNITS).to(tl.int64)
            line = (value // (CHANNELS * UNITS) % PATCH).to(tl.int64)
            frame = (value // (CHANNELS * UNITS * PATCH)).to(tl.int64)
            source = corner + frame * stride_t + line * stride_h + unit * stride_w + channel * stride_c
            tl.store(target + value, tl.load(source, mask=inside), mask=inside)


def can_run(device: torch.device) -> bool:
    """Whether the kernels compile and run on this device; warns with the reason if not."""
    try:
        sizes = tokenize_on_device(torch.zeros(1, 2, 1, 1, 3, dtype=torch.uint8, device=device), 0.0, 1, 1).sizes
    except Exception as error:  # compilers fail in many ways: no C compiler, an old device, a driver that does not fit
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"triton kernels do not run on {device} ({type(error).__name__}: {reason}); "
            "tokens are found by the slower torch code",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return sizes == (1,)


def tokenize_on_device(
    frames: Tensor,
    threshold: float = 0.1,
    tubelet_size: int = 2,
    patch_size: int = 16,
    std: tuple[float, float, float] = IMAGENET_STD,
    capacity: int | None = None,
) -> DeviceTokens:
    """Tokens of `rlt.tokens.tokenize_batch` with policy "rlt", equal to those of the CPU in every bit.

    Without a capacity the host waits once, for the number of tokens. With one it never waits: the outputs have
    `capacity` rows, of which the first min(N, capacity) are written and the others hold anything at all. Tokens that
    do not fit are left out; compare the sum of `counts` with the capacity where N is not bounded by it.

    Args:
        frames: uint8 [B, T, H, W, 3] on a CUDA device, with any strides.
        threshold: 0 or more, see `rlt.keep_mask`.
        tubelet_size: frames per token; divides T.
        patch_size: height and width of a token in pixels; divides H and W.
        std: standard deviation of each channel on the scale 0..1 that the network's input is divided by.
        capacity: rows of the outputs, 1 or more. B * T' * H' * W' always suffices. None sizes them to fit.

    Raises:
        InvalidArgumentError: for frames that are not on a CUDA device, a capacity below 1, or anything that
            `rlt.keep_mask` does not accept.
    """
    check_frames(frames, dims=(5,))
    check_threshold(threshold)
    grid = token_grid(frames.shape, tubelet_size=tubelet_size, patch_size=patch_size)
    if capacity is not None and capacity < 1:
        raise InvalidArgumentError(f"capacity is {capacity}; at least 1 is needed, or None to size the outputs to fit")
    interpreted = not isinstance(_mark_kernel, triton.JITFunction)
    if not (frames.is_cuda or interpreted):
        raise InvalidArgumentError(f"frames are on {frames.device}; a CUDA device is needed (rlt.tokenize takes any)")
    # Kernels start on the current device, whatever device their arguments are on.
    with torch.cuda.device(frames.device) if frames.is_cuda else contextlib.nullcontext():
        mask, run_lengths = _mark(frames, threshold, grid, tubelet_size, patch_size, std)
        counts = mask.flatten(1).sum(1)
        sizes = tuple(counts.tolist()) if capacity is None else ()
        rows = sum(sizes) if capacity is None else capacity
        gathered = _gather(frames, mask, run_lengths, rows, tubelet_size, patch_size)
    return DeviceTokens(*gathered, counts, mask, sizes)


def _mark(
    frames: Tensor,
    threshold: float,
    grid: TokenGrid,
    tubelet_size: int,
    patch_size: int,
    std: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    """Keep mask (bool) and run lengths (int32, 0 where dropped), both [B, T', H', W']."""
    mask = torch.empty(len(frames), *grid, dtype=torch.uint8, device=frames.device)
    lengths = torch.empty(len(frames), *grid, dtype=torch.int32, device=frames.device)
    # Filled on the device: a copy from the host would wait.
    limit = torch.full((1,), threshold, dtype=torch.float64, device=frames.device)
    _mark_kernel[(len(frames) * grid.height * grid.width,)](
        frames,
        limit,
        mask,
        lengths,
        *grid,
        *frames.stride(),
        *(255.0 * channel for channel in std),
        TUBELET=tubelet_size,
        PATCH=patch_size,
        BLOCK=_block(patch_size**2),
    )
    return mask.view(torch.bool), lengths


def _gather(
    frames: Tensor, mask: Tensor, run_lengths: Tensor, rows: int, tubelet_size: int, patch_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, coordinates and run lengths of the kept tokens, `rows` of each."""
    pixels = _widest(frames, patch_size)
    units = patch_size * pixels.shape[3] // frames.shape[3]
    channels = pixels.shape[4]
    values = tubelet_size * patch_size * units * channels
    patches = torch.empty(rows, values, dtype=pixels.dtype, device=frames.device)
    coords = torch.empty(rows, 3, dtype=torch.int64, device=frames.device)
    lengths = torch.empty(rows, dtype=torch.int64, device=frames.device)
    _gather_kernel[(mask.numel(),)](
        pixels,
        run_lengths,
        mask.flatten().cumsum(0),
        patches,
        coords,
        lengths,
        rows,
        *mask.shape[1:],
        *pixels.stride(),
        TUBELET=tubelet_size,
        PATCH=patch_size,
        UNITS=units,
        CHANNELS=channels,
        BLOCK=_block(values),
    )
    return patches.view(torch.uint8), coords, lengths


def _widest(frames: Tensor, patch_size: int) -> Tensor:
    """View [B, T, H, W, 3] as the widest integers that divide a line of a patch: [B, T, H, units, 1].

    Frames come back as they are where their layout does not allow it.
    """
    line = patch_size * 3
    if frames.stride(4) == 1 and (frames.stride(3) == 3 or frames.shape[3] == 1):
        starts = (frames.storage_offset(), *frames.stride()[:3])
        for wide in (torch.int64, torch.int32, torch.int16):
            if all(number % wide.itemsize == 0 for number in (line, *starts)):
                return frames.flatten(3).view(wide).unsqueeze(4)
    return frames


def _block(values: int) -> int:
    """Power of two that holds the values of a patch, or a part of them."""
    return min(int(triton.next_power_of_2(values)), _MAX_BLOCK)

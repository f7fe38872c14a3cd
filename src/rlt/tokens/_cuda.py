"""Comparing and gathering as two fused kernels for frames on a CUDA device. The only importer of triton.

The torch code of `rlt.tokens` makes a dozen passes over the frames; here they are read once to compare them, and the
kept patches once more to copy them. `rlt.tokens.differences` imports this module for CUDA frames only, and does without
where triton is not installed or cannot compile. Shape legend as there.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlt.structures import IMAGENET_STD, PatchSpec

_MAX_BLOCK = 1024  # values that one program holds at a time; larger patches take several turns


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
    """One program per token column (b, h, w)."""
    column = tl.program_id(0).to(tl.int64)
    places = height * width
    b = column // places
    place = column % places
    corner = frames + b * stride_b + (place // width) * PATCH * stride_h + (place % width) * PATCH * stride_w
    limit = tl.load(threshold)
    step = b * time * places + place
    t = tl.full((), 0, tl.int64) + time - 1
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
        t -= 1
    tl.store(mask + step, tl.full((), 1, tl.uint8))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gather_kernel(
    pixels: tl.tensor,  # [B, T, H, units of a line, CHANNELS], see _widest
    mask: tl.tensor,  # uint8 [B, T', H', W'], 1 where kept
    run_lengths: tl.tensor,  # int64 [B, T', H', W'], not read where dropped
    ranks: tl.tensor,  # int64 [B, T', H', W'], inclusive cumulative sum of the mask
    patches: tl.tensor,  # out: [N, TUBELET * PATCH * UNITS * CHANNELS]
    coords: tl.tensor,  # out: int64 [N, 3]
    lengths: tl.tensor,  # out: int64 [N]
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
    """One program per token: copies it to its row, or does nothing if the token is dropped."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(mask + token) != 0:
        row = tl.load(ranks + token) - 1
        w = token % width
        h = token // width % height
        t = token // width // height % time
        b = token // width // height // time
        tl.store(coords + row * 3, t)
        tl.store(coords + row * 3 + 1, h)
        tl.store(coords + row * 3 + 2, w)
        tl.store(lengths + row, tl.load(run_lengths + token))
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
        frames = torch.zeros(1, 2, 1, 1, 3, dtype=torch.uint8, device=device)
        mask = mark(frames, 0.0, PatchSpec(1, 1))
        kept = gather(frames, mask, mask.long(), 1, PatchSpec(1, 1))[0]
    except Exception as error:  # compilers fail in many ways: no C compiler, an old device, a driver that does not fit
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"triton kernels do not run on {device} ({type(error).__name__}: {reason}); "
            "tokens are found by the slower torch code",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return mask.flatten().tolist() == [True, False] and kept.shape == (1, 3)


def mark(frames: Tensor, threshold: float, spec: PatchSpec) -> Tensor:
    """`rlt.tokens.PatchView.differ`, equal to that of the CPU on every entry. The host does not wait.

    Args:
        frames: uint8 [B, T, H, W, 3] on a CUDA device, with any strides.
        threshold: in the paper's units.
        spec: how they are cut into tokens.

    Returns:
        bool [B, T', H', W'].
    """
    grid = spec.grid(frames.shape)
    mask = torch.empty(len(frames), *grid, dtype=torch.uint8, device=frames.device)
    # Filled on the device: a copy from the host would wait.
    limit = torch.full((1,), threshold, dtype=torch.float64, device=frames.device)
    with _on(frames):
        _mark_kernel[(len(frames) * grid.height * grid.width,)](
            frames,
            limit,
            mask,
            *grid,
            *frames.stride(),
            *(255.0 * channel for channel in IMAGENET_STD),
            TUBELET=spec.tubelet_size,
            PATCH=spec.patch_size,
            BLOCK=_block(spec.patch_size**2),
        )
    return mask.view(torch.bool)


def gather(
    frames: Tensor, mask: Tensor, run_lengths: Tensor, num_kept: int, spec: PatchSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """Copy what is kept. The host does not wait.

    Args:
        frames: uint8 [B, T, H, W, 3] on a CUDA device, with any strides.
        mask: bool [B, T', H', W'].
        run_lengths: int64 [B, T', H', W'], read where a token is kept.
        num_kept: entries of the mask that are True.
        spec: how the frames are cut into tokens.

    Returns:
        patches uint8 [N, tubelet * patch * patch * 3], coords int64 [N, 3] and run lengths int64 [N], in (b, t, h, w)
        order.
    """
    pixels = _widest(frames, spec.patch_size)
    units = spec.patch_size * pixels.shape[3] // frames.shape[3]
    channels = pixels.shape[4]
    values = spec.tubelet_size * spec.patch_size * units * channels
    patches = torch.empty(num_kept, values, dtype=pixels.dtype, device=frames.device)
    coords = torch.empty(num_kept, 3, dtype=torch.int64, device=frames.device)
    lengths = torch.empty(num_kept, dtype=torch.int64, device=frames.device)
    mask = mask.contiguous()
    with _on(frames):
        _gather_kernel[(mask.numel(),)](
            pixels,
            mask.view(torch.uint8),
            run_lengths.contiguous(),
            mask.flatten().cumsum(0),
            patches,
            coords,
            lengths,
            *mask.shape[1:],
            *pixels.stride(),
            TUBELET=spec.tubelet_size,
            PATCH=spec.patch_size,
            UNITS=units,
            CHANNELS=channels,
            BLOCK=_block(values),
        )
    return patches.view(torch.uint8), coords, lengths


def _on(frames: Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current device, whatever device their arguments are on."""
    return torch.cuda.device(frames.device) if frames.is_cuda else nullcontext()


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

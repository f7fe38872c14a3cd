"""How a camera that moves shifts the whole picture: one integer shift between two frames.

The shift is the peak of the phase correlation of two small grey pictures (Kuglin and Hines, "The Phase Correlation
Image Alignment Method", 1975), which neither exposure nor a minority that moves by itself changes, and then the best of
its neighbours at full size. Nothing of it is in the paper.

Shape legend: ... pairs of frames, C channels, H and W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_SHIFT = 0.25
"""Of the height and of the width: beyond it too little is left that both pictures show."""
_SMALL_SIDE = 128
"""The grey pictures that are correlated are reduced by whole factors to at most so many pixels a side."""
_PEAKS = 8
"""So many of the highest are looked at: in pictures with little detail the highest may be noise."""
_STEP = 2
"""Shifts are held against every second pixel of every second row."""
_LARGEST = 1.0
"""In median deviations of a picture: a pixel that differs by more counts no more than this, it moves by itself."""
_GAIN = 0.8
"""A shift must bring the mean difference down to so much of what it is without one, or it is none: by chance one of the
peaks brings it to 0.9 where a camera stands and its exposure changes."""


def global_shifts(earlier_CHW: Tensor, later_CHW: Tensor) -> Tensor:
    """Where the later frames show what the earlier ones do: int64 [..., 2], pixels down and to the right.

    A pixel (y, x) of the later frame shows what stood at (y - down, x - right) in the earlier one. (0, 0) where no
    shift makes the two alike, or none is needed.

    Args:
        earlier_CHW: float [..., C, H, W].
        later_CHW: float of the same shape.
    """
    pairs = earlier_CHW.shape[:-3]
    earlier, later = (_standardised(x.flatten(0, -4) if pairs else x[None]) for x in (earlier_CHW, later_CHW))
    factor = max(-(-max(earlier.shape[-2:]) // _SMALL_SIDE), 1)
    small, small_later = (F.avg_pool2d(x[:, None], factor)[:, 0] for x in (earlier, later))
    coarse = _best(small, small_later, _correlation_peaks(small, small_later)) * factor
    limit = coarse.new_tensor([int(MAX_SHIFT * side) for side in earlier.shape[-2:]])
    around = torch.arange(1 - factor, factor, device=coarse.device)
    nearby = torch.cartesian_prod(around, around)
    fine = torch.minimum(torch.maximum(coarse[:, None] + nearby, -limit), limit)
    return _best(earlier, later, fine).view(*pairs, 2)


def _best(earlier: Tensor, later: Tensor, shifts_NK2: Tensor) -> Tensor:
    """The one of K shifts, or of none, under which pictures [N, H, W] are most alike: [N, 2]."""
    none = torch.zeros_like(shifts_NK2[:, :1])
    shifts_NK2 = torch.cat([none, shifts_NK2], 1)
    mismatches = torch.stack([_mismatch(earlier, later, shift) for shift in shifts_NK2.unbind(1)], 1)
    mismatches[:, 1:] /= _GAIN
    best = mismatches.argmin(1)  # of equal ones the first, which is no shift
    return shifts_NK2.gather(1, best[:, None, None].expand(-1, 1, 2))[:, 0]


def shifted(images: Tensor, shifts: Tensor, *, outside: float = torch.inf, step: int = 1) -> Tensor:
    """Pictures moved by whole pixels; what comes from outside of them is `outside`.

    Args:
        images: float [..., C, H, W].
        shifts: int64 [..., 2], down and to the right, see `global_shifts`.
        outside: value of the pixels that no pixel came to.
        step: only every so many rows and columns of the result.
    """
    images, rows = _moved(images, shifts[..., None, 0], -2, step)
    images, columns = _moved(images, shifts[..., None, 1], -1, step)
    inside = rows[..., None, :, None] & columns[..., None, None, :]
    return torch.where(inside, images, outside)


def _moved(images: Tensor, by: Tensor, dim: int, step: int) -> tuple[Tensor, Tensor]:
    """Along one axis, and which places [..., length / step] have come from inside."""
    length = images.shape[dim]
    source = torch.arange(0, length, step, device=images.device) - by
    index = source.clamp(0, length - 1)
    index = index[..., None, :, None] if dim == -2 else index[..., None, None, :]
    shape = [*images.shape]
    shape[dim] = source.shape[-1]
    return images.gather(dim, index.expand(shape)), (source >= 0) & (source < length)


def _standardised(pictures: Tensor) -> Tensor:
    """[N, C, H, W] as grey pictures [N, H, W] of median 0 and median deviation 1, so that exposure does not count."""
    grey = pictures.mean(-3)
    sample = grey[:, ::4, ::4].flatten(1)
    middle = sample.median(1).values[:, None]
    deviation = (sample - middle).abs().median(1).values[:, None]
    return (grey - middle[..., None]) / (deviation[..., None] + 1e-3)


def _correlation_peaks(earlier: Tensor, later: Tensor) -> Tensor:
    """The shifts, in pixels of [N, H, W], at which the phases of two pictures agree best: int64 [N, K, 2]."""
    height, width = earlier.shape[-2:]
    window = torch.hann_window(height, device=earlier.device)[:, None] * torch.hann_window(width, device=earlier.device)
    spectrum = torch.fft.rfft2(later * window) * torch.fft.rfft2(earlier * window).conj()
    correlation = torch.fft.irfft2(spectrum / (spectrum.abs() + 1e-6), s=(height, width))
    down, right = (torch.fft.fftfreq(side, 1 / side, device=earlier.device).round().long() for side in (height, width))
    near = (down.abs() <= MAX_SHIFT * height)[:, None] & (right.abs() <= MAX_SHIFT * width)
    peaks = torch.where(near, correlation, -torch.inf).flatten(1).topk(_PEAKS).indices
    return torch.stack([down[peaks // width], right[peaks % width]], -1)


def _mismatch(earlier: Tensor, later: Tensor, shifts: Tensor) -> Tensor:
    """Mean difference of two pictures [N, H, W] under a shift [N, 2], each pixel up to a limit: [N].

    What comes from outside is compared as it was without a shift: else a part that happens to be alike would do for a
    large one.
    """
    moved = shifted(earlier[:, None], shifts, step=_STEP)[:, 0]
    moved = torch.where(moved.isfinite(), moved, earlier[:, ::_STEP, ::_STEP])
    return (later[:, ::_STEP, ::_STEP] - moved).abs().clamp(max=_LARGEST).mean((-2, -1))

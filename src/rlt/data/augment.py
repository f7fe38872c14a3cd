"""Random changes of training clips: RandAugment, random erasing, mixup and cutmix. uint8 in, uint8 out.

This is the only module that imports kornia. What these changes mean for the keep rule stands in docs/numerics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rlt.checks import at_least
from rlt.data.sampler import derive_seed
from rlt.errors import InvalidArgumentError, MissingDependencyError
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD, check_frames

Operation = Callable[[Any, Tensor, float], Tensor]


@dataclass
class AugmentConfig:
    """How training clips are changed at random; the defaults are VideoMAE's for fine-tuning on Kinetics.

    Raises:
        InvalidArgumentError: naming the field whose value is out of range.
    """

    random_resized_crop: bool = True
    """Whether training sees a random part of the picture, scaled to the clip's size; otherwise the centre crop."""
    crop_scale_min: float = 0.08
    """Smallest area of the crop as a share of the picture's, above 0 and up to 1."""
    crop_scale_max: float = 1.0
    """Largest area of the crop as a share of the picture's, up to 1."""
    crop_ratio_min: float = 0.75
    """Smallest width / height of the crop, above 0."""
    crop_ratio_max: float = 4 / 3
    """Largest width / height of the crop."""
    horizontal_flip: bool = True
    """Whether half of the clips are mirrored left to right. Turn it off where labels say left and right, as in
    Something-Something. There are no vertical flips."""
    rand_augment_num_ops: int = 4
    """Operations of RandAugment for each clip, each applied with probability 0.5; 0 = off."""
    rand_augment_magnitude: float = 7.0
    """Strength of these operations, 0 to 10; each draws its own from a normal distribution around it."""
    rand_augment_magnitude_std: float = 0.5
    """Standard deviation of that distribution, 0 or more."""
    erasing_probability: float = 0.25
    """Share of the clips of which a box is replaced by noise, 0 to 1."""
    mixup_alpha: float = 0.8
    """Mixup draws its share from Beta(alpha, alpha); 0 = no mixup."""
    cutmix_alpha: float = 1.0
    """Cutmix draws its share from Beta(alpha, alpha); 0 = no cutmix."""
    mixup_prob: float = 1.0
    """Share of the batches that are mixed at all, 0 to 1."""
    switch_prob: float = 0.5
    """Share of the mixed batches that take cutmix if both are on, 0 to 1."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes, 0 to below 1."""

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale_min <= self.crop_scale_max <= 1:
            raise InvalidArgumentError(
                f"crop_scale_min and crop_scale_max are {self.crop_scale_min} and {self.crop_scale_max}; "
                "0 < crop_scale_min <= crop_scale_max <= 1 is needed"
            )
        if not 0 < self.crop_ratio_min <= self.crop_ratio_max < float("inf"):
            raise InvalidArgumentError(
                f"crop_ratio_min and crop_ratio_max are {self.crop_ratio_min} and {self.crop_ratio_max}; "
                "0 < crop_ratio_min <= crop_ratio_max is needed"
            )
        for name in ("rand_augment_num_ops", "rand_augment_magnitude_std", "mixup_alpha", "cutmix_alpha"):
            at_least(0, **{name: getattr(self, name)})
        shares = ("erasing_probability", "mixup_prob", "switch_prob", "label_smoothing")
        for name, maximum in {"rand_augment_magnitude": 10, **dict.fromkeys(shares, 1)}.items():
            if not 0 <= getattr(self, name) <= maximum:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}; 0 to {maximum} is needed")
        if self.label_smoothing == 1:
            raise InvalidArgumentError("label_smoothing is 1; 0 to below 1 is needed")


def augment_clip(frames: Tensor, config: AugmentConfig, *, seed: int) -> Tensor:
    """RandAugment, then random erasing of one clip, uint8 [T, H, W, 3], as a function of `seed`.

    What stands still in the clip stands still in the result: operations and their strengths are drawn once for the
    clip, statistics of the picture (histogram, mean, extremes) are taken over all its frames, and an erased box is
    filled with the same noise in every frame.
    """
    check_frames(frames, dims=(4,))
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    operations = draw_operations(config, generator)
    if operations:
        frames = apply_operations(frames, operations)
    generator = torch.Generator().manual_seed(derive_seed(seed, 1))
    if _uniform(generator) < config.erasing_probability:
        frames = _erase(frames, generator)
    return frames


def draw_operations(config: AugmentConfig, generator: torch.Generator) -> list[tuple[str, float]]:
    """Names of operations and their strengths (0 to 1, with a random sign) for one clip."""
    operations = []
    names = tuple(OPERATIONS)
    for _ in range(config.rand_augment_num_ops):
        name = names[int(torch.randint(len(names), (), generator=generator))]
        noise = float(torch.randn((), generator=generator))
        magnitude = config.rand_augment_magnitude + config.rand_augment_magnitude_std * noise
        sign = -1.0 if _uniform(generator) < 0.5 else 1.0
        if _uniform(generator) < 0.5:
            operations.append((name, sign * min(max(magnitude, 0.0), 10.0) / 10))
    return operations


def apply_operations(frames: Tensor, operations: Sequence[tuple[str, float]]) -> Tensor:
    """Apply `OPERATIONS` by name, one after the other in float, to uint8 [T, H, W, 3]; rounded to uint8 at the end."""
    try:
        import kornia
    except ImportError:
        raise MissingDependencyError(
            'RandAugment needs kornia; run `pip install "rlt[train]"`, or set rand_augment_num_ops to 0'
        ) from None
    values = frames.permute(0, 3, 1, 2).float() / 255
    for name, strength in operations:
        values = OPERATIONS[name](kornia, values, strength).clamp(0, 1)
    return (values * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _whole(function: Operation) -> Operation:
    """An operation on all frames as one tall picture [1, 3, T * H, W], so that statistics are those of the clip."""

    def change(kornia: Any, values: Tensor, strength: float) -> Tensor:
        tall = function(kornia, values.transpose(0, 1).flatten(1, 2)[None], strength)
        return tall[0].unflatten(1, (len(values), -1)).transpose(0, 1)

    return change


def _affine(matrix: Callable[[float], tuple[float, float, float, float, float, float]]) -> Operation:
    """A warp about the centre: `matrix` gives (a, b, c, d, right, down) from the strength.

    (x, y) goes to (a x + b y + right * width, c x + d y + down * height). What comes from outside the picture is
    filled with the mean colour.
    """

    def warp(kornia: Any, values: Tensor, strength: float) -> Tensor:
        height, width = values.shape[-2:]
        a, b, c, d, right, down = matrix(strength)
        x, y = (width - 1) / 2, (height - 1) / 2
        rows = [[a, b, x - a * x - b * y + right * width], [c, d, y - c * x - d * y + down * height]]
        mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        # All frames as channels of one picture share one sampling grid, which is four times faster.
        channels = (values - mean).flatten(0, 1)[None]
        warped = kornia.geometry.transform.warp_affine(
            channels, torch.tensor([rows]), (height, width), mode="bilinear", padding_mode="zeros", align_corners=True
        )
        return warped[0].unflatten(0, (-1, 3)) + mean

    return warp


def _rotation(strength: float) -> tuple[float, float, float, float, float, float]:
    angle = math.radians(30 * strength)
    return math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle), 0.0, 0.0


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": _whole(lambda kornia, x, _: kornia.enhance.normalize_min_max(x)),
    "equalize": _whole(lambda kornia, x, _: kornia.enhance.equalize(x)),
    "invert": _whole(lambda kornia, x, _: kornia.enhance.invert(x)),
    "posterize": _whole(lambda kornia, x, s: kornia.enhance.posterize(x, max(4 - int(abs(s) * 4), 1))),
    "solarize": _whole(lambda kornia, x, s: kornia.enhance.solarize(x, 256 / 255 * (1 - abs(s)))),
    "solarize_add": lambda _, x, s: torch.where(x < 0.5, x + abs(s) * 110 / 255, x),
    "color": _whole(lambda kornia, x, s: kornia.enhance.adjust_saturation_with_gray_subtraction(x, 1 + 0.9 * s)),
    "contrast": _whole(lambda kornia, x, s: kornia.enhance.adjust_contrast_with_mean_subtraction(x, 1 + 0.9 * s)),
    "brightness": _whole(lambda kornia, x, s: kornia.enhance.adjust_brightness_accumulative(x, 1 + 0.9 * s)),
    "sharpness": lambda kornia, x, s: kornia.enhance.sharpness(x, 1 + 0.9 * s),
    "rotate": _affine(_rotation),
    "shear_x": _affine(lambda s: (1.0, 0.3 * s, 0.0, 1.0, 0.0, 0.0)),
    "shear_y": _affine(lambda s: (1.0, 0.0, 0.3 * s, 1.0, 0.0, 0.0)),
    "translate_x": _affine(lambda s: (1.0, 0.0, 0.0, 1.0, 0.45 * s, 0.0)),
    "translate_y": _affine(lambda s: (1.0, 0.0, 0.0, 1.0, 0.0, 0.45 * s)),
}
"""RandAugment's operations: functions of (kornia, values 0..1 [T, 3, H, W], strength -1..1). At strength 1: rotation by
30 degrees, shear by 0.3, translation by 0.45 of the side, factors 1.9 (0.1 at -1) for colour, contrast, brightness and
sharpness, one bit left by posterize, everything inverted by solarize, 110 grey levels added by solarize_add. All grow
with the strength, as in the "increasing" set that VideoMAE was fine-tuned with."""


def _erase(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a box with noise, the same one in every frame, so that it stands still: 2 % to a third of the picture."""
    _, height, width, _ = frames.shape
    for _ in range(10):
        area = height * width * (0.02 + (1 / 3 - 0.02) * _uniform(generator))
        aspect = math.exp((2 * _uniform(generator) - 1) * math.log(1 / 0.3))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < rows < height and 0 < columns < width:
            break
    else:
        return frames
    top = int(torch.randint(height - rows + 1, (), generator=generator))
    left = int(torch.randint(width - columns + 1, (), generator=generator))
    noise = torch.randn(rows, columns, 3, generator=generator)
    values = (torch.tensor(IMAGENET_MEAN) + torch.tensor(IMAGENET_STD) * noise) * 255
    erased = frames.clone()
    erased[:, top : top + rows, left : left + columns] = values.round().clamp(0, 255).to(torch.uint8)
    return erased


def mix_batch(frames: Tensor, targets: Tensor, config: AugmentConfig, *, seed: int) -> tuple[Tensor, Tensor]:
    """Mixup or cutmix: each clip with the next one of the batch (the last with the first), all with one share.

    Cutmix puts a box of the partner into the clip, at the same place in all frames; the targets' share is that of the
    box after it was cut to whole pixels inside the picture. Frames are uint8 [B, T, H, W, 3], targets float32
    [B, classes]; those given are left as they are.
    """
    check_frames(frames, dims=(5,))
    generator = torch.Generator().manual_seed(derive_seed(seed, 0))
    mixed, switched = _uniform(generator) < config.mixup_prob, _uniform(generator) < config.switch_prob
    if len(frames) == 1 or not mixed or config.mixup_alpha == config.cutmix_alpha == 0:
        return frames, targets
    cutmix = config.cutmix_alpha > 0 and (switched or config.mixup_alpha == 0)
    alpha = config.cutmix_alpha if cutmix else config.mixup_alpha
    share = float(np.random.default_rng(derive_seed(seed, 1)).beta(alpha, alpha))
    frames, share = _cutmix(frames, share, generator) if cutmix else (_mixup(frames, share), share)
    return frames, share * targets + (1 - share) * targets.roll(-1, 0)


def _mixup(frames: Tensor, share: float) -> Tensor:
    mixed = torch.empty_like(frames)
    for clip, partner, target in zip(frames, frames.roll(-1, 0), mixed, strict=True):
        target.copy_(torch.lerp(partner.float(), clip.float(), share).round_())  # one clip at a time fits into a cache
    return mixed


def _cutmix(frames: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """The mixed frames, and the share of the picture that is the clip's own."""
    height, width = frames.shape[2:4]
    side = math.sqrt(1 - share)
    rows, columns = int(height * side), int(width * side)
    middle_row = int(torch.randint(height, (), generator=generator))
    middle_column = int(torch.randint(width, (), generator=generator))
    top, bottom = max(middle_row - rows // 2, 0), min(middle_row - rows // 2 + rows, height)
    left, right = max(middle_column - columns // 2, 0), min(middle_column - columns // 2 + columns, width)
    mixed = frames.clone()
    mixed[:, :, top:bottom, left:right] = frames.roll(-1, 0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _uniform(generator: torch.Generator) -> float:
    """A number from 0 to below 1."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))


def soft_targets(label_ids: Tensor, num_classes: int, *, smoothing: float) -> Tensor:
    """float32 [B, classes]: `smoothing` spread over all classes, the rest on the label."""
    return one_hot(label_ids, num_classes) * (1 - smoothing) + smoothing / num_classes

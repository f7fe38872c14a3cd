"""Random changes of clips: what is drawn, what stands still, and that targets say what the pixels show."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlt.data.augment import (
    OPERATIONS,
    AugmentConfig,
    apply_operations,
    augment_clip,
    draw_operations,
    mix_batch,
    soft_targets,
)
from rlt.data.sampler import derive_seed
from rlt.errors import InvalidArgumentError, MissingDependencyError
from rlt.tokens import keep_mask

NO_AUGMENTATION = AugmentConfig(rand_augment_num_ops=0, erasing_probability=0, mixup_prob=0)


@pytest.fixture(autouse=True)
def _global_random_state_is_left_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    yield
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def still_clip(num_frames: int = 6, side: int = 64) -> Tensor:
    picture = noise(side // 4, side // 4, 3).repeat_interleave(4, 0).repeat_interleave(4, 1)
    return picture.expand(num_frames, side, side, 3).contiguous()


# RandAugment


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("strength", [-0.7, 0.7])
def test_what_stands_still_before_stands_still_after(name, strength):
    clip = still_clip()
    clip[3:, :16, :16] = 255 - clip[3:, :16, :16]  # something happens, in one corner and once
    changed = apply_operations(clip, [(name, strength)])
    assert changed.dtype == torch.uint8
    assert changed.shape == clip.shape
    assert torch.equal(changed[0], changed[2])
    assert torch.equal(changed[3], changed[5])
    if name not in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        assert torch.equal(changed[0, 20:, 20:], changed[5, 20:, 20:])


@pytest.mark.parametrize(
    ("name", "level", "expected"),
    [
        ("invert", 10, lambda v: 255 - v),
        ("posterize", 7, lambda v: v & 0b11000000),
        ("posterize", 10, lambda v: v & 0b10000000),
        ("solarize", 5, lambda v: v if v < 128 else 255 - v),
        ("solarize", 0, lambda v: v),
        ("solarize_add", 10, lambda v: v + 110 if v < 128 else v),
        ("brightness", 5, lambda v: min(round(v * 1.45), 255)),
        ("brightness", -5, lambda v: round(v * 0.55)),
    ],
)
def test_pixel_operations_are_the_closed_form(name, level, expected):
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    changed = apply_operations(values, [(name, level / 10)])
    wanted = torch.tensor([expected(value) for value in range(256)])
    assert (changed[..., 0].flatten().int() - wanted).abs().max() <= (1 if name == "brightness" else 0)


def test_contrast_colour_and_auto_contrast_are_the_closed_form():
    clip = noise(2, 16, 16, 3) // 2 + 40
    values = clip.float()
    grey = (values * torch.tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
    for name, centre in (("contrast", grey.mean()), ("color", grey)):
        wanted = (centre + (values - centre) * 1.63).clamp(0, 255)
        assert (apply_operations(clip, [(name, 0.7)]).float() - wanted).abs().max() <= 1, name
    low, high = values.amin((0, 1, 2)), values.amax((0, 1, 2))
    wanted = (values - low) / (high - low) * 255
    assert (apply_operations(clip, [("auto_contrast", 0.7)]).float() - wanted).abs().max() <= 1


def test_warps_move_the_picture_as_they_say():
    clip = torch.full((1, 40, 80, 3), 20, dtype=torch.uint8)
    clip[:, 15:25, 35:45] = 240

    def centre(frames: Tensor) -> tuple[float, float]:
        rows, columns = (frames[0, ..., 0] > 200).nonzero().float().mean(0).tolist()
        return round(rows - 19.5, 1), round(columns - 39.5, 1)

    assert centre(apply_operations(clip, [("translate_x", 0.5)])) == (0, 18)
    assert centre(apply_operations(clip, [("translate_y", -0.5)])) == (-9, 0)
    for name in ("rotate", "shear_x", "shear_y"):
        assert centre(apply_operations(clip, [(name, 0.7)])) == pytest.approx((0, 0), abs=0.5)
    shifted = apply_operations(clip, [("translate_x", 0.5)])
    assert shifted[0, 5, 2].tolist() == [124, 116, 104]  # the mean colour comes in from outside


def test_no_operation_turns_a_picture_upside_down():
    """A picture that is bright above and dark below stays so, whatever is drawn (but for inverted brightness)."""
    clip = torch.linspace(230, 25, 64).to(torch.uint8).view(1, 64, 1, 1).expand(2, 64, 64, 3).contiguous()
    inverting = {"invert", "solarize", "solarize_add"}
    config = AugmentConfig(erasing_probability=0)
    for seed in range(60):
        operations = [
            operation
            for operation in draw_operations(config, torch.Generator().manual_seed(seed))
            if operation[0] not in inverting
        ]
        changed = apply_operations(clip, operations).float()[:, 8:-8, 8:-8]
        above, below = changed[:, :24].mean(), changed[:, 24:].mean()
        assert above >= below - 1, operations


def test_draws_follow_their_configuration():
    generator = torch.Generator().manual_seed(0)
    config = AugmentConfig(rand_augment_num_ops=4, rand_augment_magnitude=7, rand_augment_magnitude_std=0.5)
    drawn = [draw_operations(config, generator) for _ in range(2000)]
    strengths = torch.tensor([strength for operations in drawn for _, strength in operations])
    assert len(strengths) / 2000 == pytest.approx(2, abs=0.1)  # four operations, each with probability one half
    assert {name for operations in drawn for name, _ in operations} == set(OPERATIONS)
    assert float(strengths.abs().mean()) == pytest.approx(0.7, abs=0.01)
    assert float(strengths.abs().std()) == pytest.approx(0.05, abs=0.005)
    assert float((strengths > 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert draw_operations(AugmentConfig(rand_augment_num_ops=0), generator) == []


# Random erasing


def erasing(**changes) -> AugmentConfig:
    return AugmentConfig(rand_augment_num_ops=0, **{"erasing_probability": 1.0, **changes})


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_an_erased_box_is_a_box_and_stands_still(seed):
    clip = torch.zeros(4, 48, 64, 3, dtype=torch.uint8)
    clip[1::2] = 1  # neither value is hit by all channels of the noise
    erased = augment_clip(clip, erasing(), seed=seed)
    changed = (erased > 1).any(-1)
    rows, columns = changed[0].any(1).nonzero().flatten(), changed[0].any(0).nonzero().flatten()
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    outside = torch.ones(48, 64, dtype=torch.bool)
    outside[box] = False
    assert torch.equal(erased[:, outside], clip[:, outside])
    assert all(torch.equal(erased[0][box], frame[box]) for frame in erased)
    assert 0.015 < len(rows) * len(columns) / (48 * 64) < 0.36
    assert erased[0][box].float().std() > 20


def test_an_erased_box_costs_no_tokens_after_the_first_step():
    clip = still_clip(16, 64)
    assert int(keep_mask(augment_clip(clip, erasing(), seed=2)[None]).sum()) == 16


def test_erasing_follows_its_probability():
    clip = still_clip(2, 32)
    config = erasing(erasing_probability=0.25)
    erased = sum(not torch.equal(augment_clip(clip, config, seed=seed), clip) for seed in range(400))
    assert 75 < erased < 125
    assert torch.equal(augment_clip(clip, erasing(erasing_probability=0), seed=1), clip)


def test_a_clip_is_changed_the_same_way_for_the_same_seed():
    clip = noise(4, 32, 32, 3)
    before = clip.clone()
    config = AugmentConfig(erasing_probability=1.0)
    outcomes = [augment_clip(clip, config, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(outcomes[0], outcomes[1])
    assert not torch.equal(outcomes[0], outcomes[2])
    assert torch.equal(clip, before)


# Mixup and cutmix


def batch(num_clips: int = 4) -> tuple[Tensor, Tensor]:
    values = torch.tensor([0, 100, 200, 40, 250][:num_clips], dtype=torch.uint8).view(-1, 1, 1, 1, 1)
    return values.expand(num_clips, 2, 30, 50, 3).contiguous(), torch.eye(6)[:num_clips]


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_mixup_mixes_pixels_and_targets_with_one_share(seed):
    frames, targets = batch()
    mixed, soft = mix_batch(frames, targets, AugmentConfig(cutmix_alpha=0), seed=seed)
    share = float(np.random.default_rng(derive_seed(seed, 1)).beta(0.8, 0.8))
    for clip in range(4):
        partner = (clip + 1) % 4
        wanted = share * float(frames[clip].float().mean()) + (1 - share) * float(frames[partner].float().mean())
        assert float((mixed[clip].float() - wanted).abs().max()) <= 0.501
        assert float(soft[clip, clip]) == pytest.approx(share, abs=1e-6)
        assert float(soft[clip, partner]) == pytest.approx(1 - share, abs=1e-6)
    assert mixed.dtype == torch.uint8
    assert soft.dtype == torch.float32


@given(st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_cutmix_counts_the_pixels_that_it_moved(seed):
    frames, targets = batch()
    mixed, soft = mix_batch(frames, targets, AugmentConfig(mixup_alpha=0), seed=seed)
    for clip in range(4):
        partner = (clip + 1) % 4
        own = (mixed[clip] == frames[clip]).all(-1)
        theirs = (mixed[clip] == frames[partner]).all(-1)
        assert bool((own ^ theirs).all())
        assert torch.equal(own[0], own[1])  # the same box in every frame
        rows, columns = theirs[0].any(1), theirs[0].any(0)
        assert int(theirs[0].sum()) == int(rows.sum()) * int(columns.sum())
        assert float(soft[clip, clip]) == pytest.approx(float(own[0].double().mean()), abs=1e-6)
        assert float(soft[clip].sum()) == pytest.approx(1, abs=1e-6)


def test_mixing_follows_its_probabilities():
    frames, targets = batch()
    frames = frames[:, :, :12, :20]

    def kinds(**changes) -> list[str]:
        found = []
        for seed in range(200):
            mixed, soft = mix_batch(frames, targets, AugmentConfig(**{"mixup_alpha": 9.0, **changes}), seed=seed)
            from_others = len(mixed[0].unique()) == 2 or torch.equal(mixed[0], frames[1])
            same = torch.equal(soft, targets) and torch.equal(mixed, frames)
            found.append("none" if same else "cutmix" if from_others else "mixup")
        return found

    usual = kinds()
    assert 60 < usual.count("mixup") < 125
    assert 60 < usual.count("cutmix") < 125
    assert kinds(mixup_prob=0).count("none") == 200
    assert kinds(mixup_alpha=0, cutmix_alpha=0).count("none") == 200
    assert kinds(switch_prob=0).count("cutmix") == 0
    assert kinds(switch_prob=1).count("mixup") == 0


def test_a_single_clip_is_not_mixed_and_inputs_are_left_alone():
    frames, targets = batch(1)
    mixed, soft = mix_batch(frames, targets, AugmentConfig(), seed=0)
    assert torch.equal(mixed, frames)
    assert torch.equal(soft, targets)
    frames, targets = batch(5)
    copies = frames.clone(), targets.clone()
    for seed in range(10):
        mix_batch(frames, targets, AugmentConfig(), seed=seed)
    assert torch.equal(frames, copies[0])
    assert torch.equal(targets, copies[1])


def test_mixing_still_clips_gives_still_clips():
    frames = torch.stack([still_clip(4, 32), 255 - still_clip(4, 32)])
    for seed in range(10):
        mixed, _ = mix_batch(frames, torch.eye(2), AugmentConfig(), seed=seed)
        assert int(keep_mask(mixed).sum()) == 2 * 4


def test_soft_targets_are_the_closed_form():
    targets = soft_targets(torch.tensor([2, 0]), 4, smoothing=0.1)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))
    assert torch.equal(soft_targets(torch.tensor([1]), 3, smoothing=0), torch.tensor([[0.0, 1.0, 0.0]]))
    mixed = mix_batch(noise(2, 2, 16, 16, 3), targets, AugmentConfig(), seed=3)[1]
    torch.testing.assert_close(mixed.sum(1), torch.ones(2))


# Configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crop_scale_min": 0}, "crop_scale_min"),
        ({"crop_scale_min": 0.9, "crop_scale_max": 0.5}, "crop_scale_max"),
        ({"crop_ratio_min": 2.0}, "crop_ratio_min"),
        ({"erasing_probability": 1.5}, "erasing_probability is 1.5; 0 to 1 is needed"),
        ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0; at least 0"),
        ({"rand_augment_magnitude": 11.0}, "rand_augment_magnitude"),
        ({"rand_augment_num_ops": -1}, "rand_augment_num_ops"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"mixup_prob": float("nan")}, "mixup_prob"),
    ],
)
def test_configuration_errors_name_the_field(changes, words):
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        AugmentConfig(**changes)
    assert "\n" not in str(caught.value)


def test_no_augmentation_changes_nothing():
    clip = noise(2, 16, 16, 3)
    assert augment_clip(clip, NO_AUGMENTATION, seed=0) is clip
    clips, targets = torch.stack([clip, 255 - clip]), torch.eye(2)
    mixed, soft = mix_batch(clips, targets, NO_AUGMENTATION, seed=0)
    assert mixed is clips
    assert soft is targets


def test_missing_kornia_names_the_remedy(monkeypatch):
    real = builtins.__import__

    def without_kornia(name, *arguments, **keywords):
        if name.split(".")[0] == "kornia":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_kornia)
    with pytest.raises(MissingDependencyError, match=r'pip install "rlt\[train\]"'):
        apply_operations(noise(1, 16, 16, 3), [("invert", 0.5)])
    clip = noise(2, 16, 16, 3)
    assert torch.equal(augment_clip(clip, NO_AUGMENTATION, seed=0), clip)

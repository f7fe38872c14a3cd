"""What tokens are compared with: anchors that bound what is lost, and exposure that is undone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
import rlt
from rlt import Budget, Threshold, assets
from rlt.errors import InvalidArgumentError
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD
from rlt.tokens import PatchView
from rlt.tokens.exposure import MAX_GAIN, fit_exposure, noise_floor
from rlt.tokens.rules import apply_rule
from video_factory import write_video

GOLDEN = np.load(Path(__file__).parent / "data" / "original_masks.npz")
SPEC = rlt.PatchSpec(patch_size=8)


def random_walk(seed: int, frames: int = 12, side: int = 16, most: int = 9) -> Tensor:
    """uint8 [T, H, W, 3] whose pixels go up and down a little in every frame."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-most, most + 1, (frames, side, side, 3), generator=generator)
    patches = torch.randint(0, 2, (frames, side // 8, side // 8, 1), generator=generator)
    moves = steps * patches.repeat_interleave(8, 1).repeat_interleave(8, 2)
    start = torch.randint(60, 196, (1, side, side, 3), generator=generator)
    return (start + moves.cumsum(0)).clamp(0, 255).to(torch.uint8)


def picture(seed: int, side: int = 64) -> Tensor:
    """float [H, W, 3] of 40..200: smooth, with contrast."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 8, 8, generator=generator) * 160 + 40
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")[0].permute(1, 2, 0)


def normalised(
    frames: Tensor, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD
) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, T, 3, H, W]."""
    return ((frames.double() / 255 - torch.tensor(mean)) / torch.tensor(std)).float().permute(0, 1, 4, 2, 3)


# Anchors


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.4))
def test_what_is_dropped_differs_by_at_most_the_threshold_from_what_stands_for_it(seed: int, threshold: float) -> None:
    clip = random_walk(seed)
    mask = apply_rule(Threshold(threshold, reference="anchor"), PatchView(clip[None], SPEC))[0].numpy()
    assert mask[0].all()
    for h, w in np.ndindex(2, 2):
        anchor = 0
        for t in range(1, 6):
            pair = np.stack([clip[2 * anchor], clip[2 * anchor], clip[2 * t + 1], clip[2 * t + 1]])
            # A clip of two tokens, whose second is compared with the first as in the paper.
            differs = oracles.keep_mask(pair, threshold, 2, 8)[1, h, w]
            assert differs == mask[t, h, w]
            anchor = t if differs else anchor


def test_a_picture_that_drifts_is_seen_again_and_again() -> None:
    levels = torch.arange(32, dtype=torch.uint8) + 100  # one grey level a frame: never more than 3 between neighbours
    clip = levels.view(-1, 1, 1, 1).expand(-1, 16, 16, 3).contiguous()
    assert rlt.tokenize(clip, spec=SPEC).lengths.tolist() == [16] * 4
    tokens = rlt.tokenize(clip, spec=SPEC, reference="anchor")
    assert tokens.lengths.max() <= 3  # 0.1 is 5.7 grey levels
    assert (tokens.expand().int() - clip.int()).abs().max() <= 6


def test_the_golden_clip_that_drifts() -> None:
    drift = torch.from_numpy(GOLDEN["frames"])[-1]
    paper, anchored = (rlt.tokenize(drift, reference=name) for name in ("previous", "anchor"))
    assert len(anchored) > len(paper)


def test_anchors_of_floats_are_those_of_pixels() -> None:
    clips = torch.stack([random_walk(seed, most=20) for seed in range(6)])
    for threshold in (0.05, 0.1, 0.3):
        rule = Threshold(threshold, reference="anchor")
        pixels = apply_rule(rule, PatchView(clips, SPEC))
        for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), ((0.5,) * 3, (0.5, 0.4, 0.3))):
            spec = rlt.PatchSpec(patch_size=8, mean=mean, std=std)
            floats = apply_rule(rule, PatchView(normalised(clips, mean, std), spec))
            assert (floats != pixels).float().mean() < 0.01  # ties within float rounding


@pytest.mark.parametrize("exposure", ["none", "gain"])
@pytest.mark.parametrize("max_tokens", [4, 7, 15, 24])
def test_a_budget_of_anchors_is_kept_and_used(max_tokens: int, exposure: str) -> None:
    clips = torch.stack([random_walk(seed, most=30) for seed in range(4)])
    rule = Budget(max_tokens=max_tokens, reference="anchor", exposure=exposure)  # type: ignore[arg-type]
    counts = [len(tokens) for tokens in rlt.tokenize(clips, rule=rule, spec=SPEC)]
    assert all(4 <= count <= max_tokens for count in counts)
    if exposure == "none":  # else steps that look like noise are taken for noise
        assert max(counts) >= min(max_tokens, 24) - 2


# Exposure


@settings(max_examples=50, deadline=None)
@given(st.floats(0.7, 1.4), st.floats(-0.4, 0.4), st.integers(0, 1000), st.floats(0, 0.6))
def test_a_line_is_found_whatever_moves(gain: float, offset: float, seed: int, moving: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(200, 3, generator=generator)
    last = first * gain + offset + 0.005 * torch.randn(200, 3, generator=generator)
    moved = torch.rand(200, generator=generator) < moving
    last[moved] = torch.randn(int(moved.sum()), 3, generator=generator) * 1.5
    found = fit_exposure(first, last)
    assert not found.is_cut
    if abs(gain - 1) > 0.1 or abs(offset) > 0.1:
        torch.testing.assert_close(found.gain, torch.full((3,), gain), atol=0.04, rtol=0)
        torch.testing.assert_close(found.offset, torch.full((3,), offset), atol=0.04, rtol=0)


def test_no_line_is_taken_where_none_is_better() -> None:
    first = torch.randn(50, 3)
    found = fit_exposure(first, first)
    assert torch.equal(found.gain, torch.ones(3))
    assert torch.equal(found.offset, torch.zeros(3))


@pytest.mark.parametrize("kind", ["flicker", "fade", "exposure"])
@pytest.mark.parametrize("reference", ["previous", "anchor"])
def test_flicker_and_fades_of_a_still_picture_are_no_change(kind: str, reference: str) -> None:
    steps = torch.arange(16)
    gain = {"flicker": 1 + 0.15 * (steps // 2 % 2), "fade": 0.97**steps, "exposure": 1 + 0.02 * steps}[kind]
    clip = (picture(1)[None] * gain.view(-1, 1, 1, 1)).clamp(0, 255).round().to(torch.uint8)
    plain = rlt.tokenize(clip, reference=reference)
    tokens = rlt.tokenize(clip, reference=reference, exposure="gain")
    assert plain.share_kept > 0.3
    assert tokens.share_kept == 1 / 8
    floats = apply_rule(
        Threshold(reference=reference, exposure="gain"), PatchView(normalised(clip[None]), rlt.PatchSpec())
    )
    assert torch.equal(floats[0], tokens.mask())


def test_what_moves_under_a_changing_exposure_is_kept() -> None:
    clip = picture(2)[None].expand(16, -1, -1, -1).clone()
    for step in range(16):
        clip[step, 16:32, 16:32] = 40.0 if step // 2 % 2 else 210.0
    still_exposed = rlt.tokenize(clip.round().to(torch.uint8)).mask()
    clip *= (1 + 0.15 * (torch.arange(16) // 2 % 2)).view(-1, 1, 1, 1)
    tokens = rlt.tokenize(clip.clamp(0, 255).round().to(torch.uint8), exposure="gain")
    assert torch.equal(tokens.mask(), still_exposed)
    assert still_exposed[:, 1, 1].all()


def test_a_step_beyond_the_bound_is_kept_whole() -> None:
    clip = picture(3)[None].repeat(8, 1, 1, 1)
    clip[4:] = clip[4:] / (MAX_GAIN * 1.1)
    mask = rlt.tokenize(clip.round().to(torch.uint8), exposure="gain").mask()
    assert mask.flatten(1).all(1).tolist() == [True, False, True, False]
    budget = rlt.tokenize(clip.round().to(torch.uint8), exposure="gain", max_tokens=32).mask()
    assert torch.equal(budget, mask)


# Noise and codecs


@pytest.mark.parametrize("reference", ["previous", "anchor"])
@pytest.mark.parametrize("deviation", [2, 5, 8, 12])
def test_noise_of_a_sensor_keeps_nothing_that_stands_still(deviation: float, reference: str) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = deviation * torch.randn(16, 96, 96, 3, generator=generator)
    clip = picture(4, 96)[None].expand(16, -1, -1, -1).clone()
    clip[8:, 32:48, 32:48] = 255 - clip[8:, 32:48, 32:48]
    tokens = rlt.tokenize((clip + noise).clamp(0, 255).round().to(torch.uint8), reference=reference, exposure="gain")
    expected = torch.zeros(8, 6, 6, dtype=torch.bool)
    expected[0], expected[4, 2, 2] = True, True
    missed = tokens.mask() ^ expected
    assert not missed[:, 2, 2].any()
    assert missed.float().mean() < 0.02
    if deviation >= 8:
        assert rlt.tokenize((clip + noise).clamp(0, 255).round().to(torch.uint8), reference=reference).share_kept > 0.9


@pytest.mark.parametrize("bit_rate", [40_000, 150_000, 600_000])
def test_a_still_picture_that_was_encoded_again_keeps_nothing(bit_rate: int, tmp_path: Path) -> None:
    still = picture(5, 160)[:96].clamp(0, 255).round().to(torch.uint8).numpy()
    options = {"b": str(bit_rate), "g": "12"}
    write_video(tmp_path / "still.mp4", 64, picture=lambda _number: still, options=options)
    clip = rlt.read_clip(tmp_path / "still.mp4", num_frames=16, frame_stride=4, size=96)
    assert rlt.tokenize(clip, exposure="gain").share_kept == 1 / 8
    assert rlt.tokenize(clip, exposure="gain", reference="anchor").share_kept == 1 / 8


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 20), st.integers(0, 100))
def test_the_floor_is_what_noise_alone_makes(deviation: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    frames = (picture(seed, 64).permute(2, 0, 1) / 255)[None, None].expand(1, 4, -1, -1, -1)
    noisy = frames + deviation / 255 * torch.randn(frames.shape, generator=generator)
    made = (noisy[:, 0] - noisy[:, 1]).abs().mean()
    floor = noise_floor(noisy, 16)
    assert 0.95 * made <= floor <= 1.25 * made + 0.002


def test_the_bundled_street_keeps_what_readme_and_docs_say() -> None:
    clip = rlt.read_clip(assets.path("traffic.mp4"), num_frames=16, frame_stride=4, size=224)
    assert round(100 * rlt.tokenize(clip).share_kept, 1) == 61.4
    assert round(100 * rlt.tokenize(clip, exposure="gain").share_kept, 1) == 31.0


# Names


@pytest.mark.parametrize("option", ["reference", "exposure"])
def test_other_words_are_one_line(option: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"{option} is 'x'; allowed are (previous|none), (anchor|gain)"):
        rlt.tokenize(random_walk(0), spec=SPEC, **{option: "x"})  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match=f"{option} is anchor, but rule 'none' has no such option"):
        rlt.tokenize(random_walk(0), spec=SPEC, rule="none", **{option: "anchor"})  # type: ignore[arg-type]


def test_rules_that_keep_as_many_hand_the_options_on() -> None:
    drift = random_walk(5)
    expected = len(rlt.tokenize(drift, spec=SPEC, reference="anchor"))
    assert len(rlt.tokenize(drift, spec=SPEC, rule="random", reference="anchor")) == expected

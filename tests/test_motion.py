"""A camera that moves: the shift of the whole picture, and tokens that are covered by where they came from."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlt
from rlt import Budget, PatchSpec, Threshold, assets
from rlt.errors import InvalidArgumentError
from rlt.structures import IMAGENET_STD
from rlt.tokens import PatchView
from rlt.tokens.aligned import AlignedFrames, Camera
from rlt.tokens.motion import MAX_SHIFT, global_shifts, shifted
from rlt.tokens.rules import apply_rule

FOLLOW = Camera(motion="global")
PLACES = [(40, 40), (45, 33), (45, 33), (33, 47), (21, 41), (30, 30), (30, 34), (46, 48)]
"""Upper left corners of what a camera that pans shows, frame by frame."""


@pytest.fixture(scope="module")
def scene() -> Tensor:
    """uint8 [192, 192, 3]: a landscape of noise at all scales, as natural pictures have it."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros(1, 3, 192, 192)
    for side in (3, 6, 12, 24, 48, 96, 192):
        octave = torch.randn(1, 3, side, side, generator=generator) * 90 / side**0.5
        total += torch.nn.functional.interpolate(octave, size=(192, 192), mode="bilinear")
    return (total[0].permute(1, 2, 0) + 128).clamp(10, 200).to(torch.uint8)


def panned(scene: Tensor, places: list[tuple[int, int]] = PLACES, side: int = 96) -> Tensor:
    """uint8 [T, side, side, 3]."""
    return torch.stack([scene[y : y + side, x : x + side] for y, x in places])


def shifts_of(places: list[tuple[int, int]] = PLACES) -> list[list[int]]:
    """What stood at p is shown by the next frame at p + shift."""
    return [[before[0] - after[0], before[1] - after[1]] for before, after in pairwise(places)]


def channels_first(clip: Tensor) -> Tensor:
    return clip.permute(0, 3, 1, 2).float() / 255


def test_the_shift_of_a_pan_is_found_exactly(scene: Tensor) -> None:
    frames = channels_first(panned(scene))
    assert global_shifts(frames[:-1], frames[1:]).tolist() == shifts_of()


@pytest.mark.parametrize("side", [88, 144, 160])
def test_the_shift_is_found_through_exposure_noise_and_what_moves_by_itself(scene: Tensor, side: int) -> None:
    places = [(20, 20), (24, 15), (17, 26), (17, 26)]
    frames = channels_first(panned(scene, places, side))
    generator = torch.Generator().manual_seed(0)
    frames = frames * torch.tensor([1.0, 1.2, 0.8, 1.1]).view(-1, 1, 1, 1) + 0.01 * torch.randn(
        frames.shape, generator=generator
    )
    for t in range(4):
        frames[t, :, 10 : 10 + side // 4, 5 * t : 5 * t + side // 4] = torch.rand((), generator=generator)
    assert global_shifts(frames[:-1], frames[1:]).tolist() == shifts_of(places)


def test_no_shift_is_made_up() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, 64, 64, generator=generator)
    assert global_shifts(noise[0], noise[1]).tolist() == [0, 0]
    assert global_shifts(noise[0], noise[0]).tolist() == [0, 0]
    flat = torch.full((3, 64, 64), 0.5)
    assert global_shifts(flat, flat).tolist() == [0, 0]


def test_shifts_are_bounded(scene: Tensor) -> None:
    frames = channels_first(panned(scene, [(0, 0), (60, 60)]))
    assert global_shifts(frames[0], frames[1]).abs().max() <= MAX_SHIFT * 96


@settings(max_examples=25, deadline=None)
@given(st.integers(-5, 5), st.integers(-5, 5), st.integers(1, 3))
def test_shifted_pictures_are_slices(down: int, right: int, step: int) -> None:
    picture = torch.rand(1, 3, 6, 8)
    expected = torch.full((3, 6, 8), torch.inf)
    for y in range(6):
        for x in range(8):
            if 0 <= y - down < 6 and 0 <= x - right < 8:
                expected[:, y, x] = picture[0, :, y - down, x - right]
    found = shifted(picture, torch.tensor([[down, right]]), step=step)[0]
    assert torch.equal(found, expected[:, ::step, ::step])


@pytest.mark.parametrize("reference", ["previous", "anchor"])
def test_of_a_pan_only_the_new_border_is_kept(scene: Tensor, reference: str) -> None:
    clip = panned(scene, [(64, x) for x in range(80, 0, -10)])  # ten pixels come in at the left
    spec = PatchSpec(tubelet_size=1)
    mask = rlt.tokenize(clip, threshold=0.0, reference=reference, motion="global", spec=spec).mask()
    assert mask[0].all()
    assert mask[1:, :, 0].all()
    assert not mask[1:, :, 1:].any()
    assert rlt.tokenize(clip, threshold=0.1, reference=reference, spec=spec).share_kept > 0.9


@pytest.mark.parametrize("reference", ["previous", "anchor"])
@pytest.mark.parametrize("exposure", ["none", "gain"])
def test_a_camera_that_stands_changes_nothing(reference: str, exposure: str) -> None:
    clip = rlt.read_clip(assets.path("traffic.mp4"), num_frames=16, frame_stride=4, size=112)
    plain, followed = (
        rlt.tokenize(clip, reference=reference, exposure=exposure, motion=motion).mask()
        for motion in ("none", "global")
    )
    # At the edge of the threshold sums of floats may fall on the other side than sums of integers.
    assert (plain != followed).float().mean() <= 0.001


def test_a_pan_under_a_changing_exposure_is_followed(scene: Tensor) -> None:
    gain = torch.tensor([1.0, 1.15, 1.0, 0.9, 1.1, 0.95, 1.0, 1.1]).view(-1, 1, 1, 1)
    clip = (panned(scene).float() * gain).clamp(0, 255).round().to(torch.uint8)
    spec = PatchSpec(tubelet_size=1)
    for reference in ("previous", "anchor"):
        shares = [
            rlt.tokenize(clip, reference=reference, exposure=exposure, motion=motion, spec=spec).share_kept
            for exposure, motion in (("none", "none"), ("gain", "none"), ("none", "global"), ("gain", "global"))
        ]
        assert shares[3] < 0.6 < 0.8 < min(shares[:3]), shares


def what_stands(view: PatchView, mask: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """For every step the pictures that stand before it, as it is and moved to it, in plain loops over patches."""
    patch, tubelet = view.spec.patch_size, view.spec.tubelet_size
    frames = view.frames[0].double().numpy() / 255 / np.array(IMAGENET_STD)
    first, last = frames[::tubelet], frames[tubelet - 1 :: tubelet]

    def moved(picture: np.ndarray, shift: list[int]) -> np.ndarray:
        result = np.full_like(picture, np.inf)
        for y in range(len(picture)):
            for x in range(len(picture[0])):
                if 0 <= y - shift[0] < len(picture) and 0 <= x - shift[1] < len(picture[0]):
                    result[y, x] = picture[y - shift[0], x - shift[1]]
        return result

    to_first, to_last = (shifts[0].tolist() for shifts in AlignedFrames(*view._edges(), view.spec, FOLLOW)._shifts)
    stands, found = first[0].copy(), []
    for t in range(1, len(first)):
        pictures = stands.copy(), moved(stands, to_last[t])
        found.append(pictures)
        painted = moved(stands, to_first[t])
        for h in range(mask.shape[1]):
            for w in range(mask.shape[2]):
                cell = np.s_[h * patch : (h + 1) * patch, w * patch : (w + 1) * patch]
                stayed, came = (np.abs(last[t][cell] - picture[cell]).mean() for picture in pictures)
                if mask[t, h, w]:
                    stands[cell] = first[t][cell]
                elif came < stayed:
                    stands[cell] = painted[cell]
    return found


@pytest.mark.parametrize("tubelet_size", [1, 2])
def test_what_is_dropped_differs_by_at_most_the_threshold_from_kept_pixels(scene: Tensor, tubelet_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    places = [(40, 40), (43, 37), (43, 37), (40, 41), (36, 39), (38, 36), (38, 38), (41, 41)]
    clip = panned(scene, places, side=64).float() + 3 * torch.randn(8, 64, 64, 1, generator=generator)
    clip[4:, 10:30, 5:20] = 128  # and something that appears
    spec = PatchSpec(tubelet_size, 16)
    view = PatchView(clip.clamp(0, 255).to(torch.uint8)[None], spec)
    threshold = 0.2
    mask = apply_rule(Threshold(threshold, "anchor", motion="global"), view)[0]
    assert 0.2 < mask.float().mean() < 0.9
    last = view.frames[0].double().numpy()[tubelet_size - 1 :: tubelet_size] / 255 / np.array(IMAGENET_STD)
    for t, pictures in enumerate(what_stands(view, mask), 1):
        for h in range(4):
            for w in range(4):
                cell = np.s_[h * 16 : (h + 1) * 16, w * 16 : (w + 1) * 16]
                smallest = min(np.abs(last[t][cell] - picture[cell]).mean() for picture in pictures)
                assert mask[t, h, w] == (smallest > threshold), (t, h, w, smallest)


def test_clips_do_not_count_for_each_other(scene: Tensor) -> None:
    clips = torch.stack([panned(scene), panned(scene, PLACES[::-1]), panned(scene, [(0, 0)] * 8)])
    for rule in (Threshold(motion="global"), Threshold(0.1, "anchor", "gain", "global")):
        together = apply_rule(rule, PatchView(clips, PatchSpec()))
        alone = torch.cat([apply_rule(rule, PatchView(clip[None], PatchSpec())) for clip in clips])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("reference", ["previous", "anchor"])
def test_a_budget_follows_the_camera(scene: Tensor, reference: str) -> None:
    clip = panned(scene, [(64, x) for x in range(80, 0, -10)])
    rule = Budget(max_tokens=36 + 7 * 6, reference=reference, motion="global")  # type: ignore[arg-type]
    mask = rlt.tokenize(clip, rule=rule, spec=PatchSpec(tubelet_size=1)).mask()
    assert mask[1:, :, 0].all()
    assert int(mask.sum()) == 78


def test_broken_frames_are_kept() -> None:
    frames = torch.zeros(1, 4, 3, 32, 32)
    frames[0, 2, 0, 3, 3] = torch.nan
    for reference in ("previous", "anchor"):
        for camera in (FOLLOW, Camera("gain"), Camera("gain", "global")):
            mask = PatchView(frames, PatchSpec(tubelet_size=1)).differ(0.1, reference=reference, camera=camera)  # type: ignore[arg-type]
            assert bool(mask[0, 2, 0, 0])


def test_one_frame_needs_no_camera(scene: Tensor) -> None:
    clip = panned(scene, PLACES[:2])
    tokens = rlt.tokenize(clip, reference="anchor", exposure="gain", motion="global")
    assert tokens.share_kept == 1


def test_a_misspelt_motion_is_refused(scene: Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match="motion is 'globl'"):
        rlt.tokenize(panned(scene), motion="globl")


def test_figures_of_the_docs(video_data: Path) -> None:
    clip = rlt.read_clip(video_data / "clips" / "bikes.mp4", num_frames=16, frame_stride=4, size=224)
    shares = [rlt.tokenize(clip, motion=motion).share_kept for motion in ("none", "global")]
    assert [round(100 * share, 1) for share in shares] == [96.7, 74.4]
    for share in shares:
        assert f"{100 * share:.1f}" in (Path(__file__).parents[1] / "docs" / "fidelity.md").read_text()

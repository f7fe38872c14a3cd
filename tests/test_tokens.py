"""Tokens against the original code's masks and a plain Python oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import rlt
from rlt.errors import InvalidArgumentError

GOLDEN = np.load(Path(__file__).parent / "data" / "original_masks.npz")
PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def clips(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    """A small clip in which patches repeat, change a little, or change a lot; any sizes."""
    tubelet, patch = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 4, 8]))
    grid = [draw(st.integers(1, 4)) for _ in range(3)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (grid[0] * tubelet, grid[1] * patch, grid[2] * patch, 3)
    clip = rng.integers(0, 256, shape, dtype=np.uint8)
    for t in range(1, shape[0]):
        still = rng.random((grid[1], grid[2])).repeat(patch, 0).repeat(patch, 1)[..., None]
        drift = np.clip(clip[t - 1].astype(int) + rng.integers(-9, 10), 0, 255).astype(np.uint8)
        clip[t] = np.where(still < 0.4, clip[t - 1], np.where(still < 0.8, drift, clip[t]))
    return clip, tubelet, patch


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """bool [B, T', H', W'] with the first time step kept."""
    shape = [draw(st.integers(1, 5)) for _ in range(4)]
    mask = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).random(shape) < draw(st.floats(0, 1))
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("tubelet_size", [1, 2])
def test_keep_mask_equals_the_original_on_every_entry(tubelet_size: int, threshold: float) -> None:
    mask = rlt.keep_mask(torch.from_numpy(GOLDEN["frames"]), threshold=threshold, tubelet_size=tubelet_size)
    expected = GOLDEN[f"mask_tubelet{tubelet_size}_threshold{threshold}"]
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), expected)
    assert 0.1 < expected.mean() < 0.9  # both answers occur, or the test would say nothing


@PROPERTY
@given(clips(), st.sampled_from([0.0, 0.03, 0.1, 0.5]))
def test_keep_mask_equals_the_oracle(case: tuple[np.ndarray, int, int], threshold: float) -> None:
    clip, tubelet, patch = case
    mask = rlt.keep_mask(torch.from_numpy(clip)[None], threshold=threshold, tubelet_size=tubelet, patch_size=patch)
    np.testing.assert_array_equal(mask[0].numpy(), oracles.keep_mask(clip, threshold, tubelet, patch))


@PROPERTY
@given(masks())
def test_run_lengths_equal_the_oracle_in_token_order(mask: np.ndarray) -> None:
    lengths = rlt.run_lengths(torch.from_numpy(mask))
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == [length for clip in mask for length in oracles.run_lengths(clip)]
    batch, time, height, width = mask.shape
    assert int(lengths.sum()) == batch * time * height * width


def test_run_lengths_are_not_in_column_order() -> None:
    mask = torch.ones(1, 3, 1, 2, dtype=torch.bool)
    mask[0, 1:, 0, 0] = False  # the left column stands for 3 steps, the right one changes at every step
    assert rlt.run_lengths(mask).tolist() == [3, 1, 1, 1]  # column order would be the same list for [1, 1, 1, 3]
    mask[0, 2, 0, 0] = True
    assert rlt.run_lengths(mask).tolist() == [2, 1, 1, 1, 1]
    assert rlt.run_lengths(mask.flip(3)).tolist() == [1, 2, 1, 1, 1]


@PROPERTY
@given(clips(), st.sampled_from([0.0, 0.1]))
def test_tokenize_keeps_the_order_contract(case: tuple[np.ndarray, int, int], threshold: float) -> None:
    clip, tubelet, patch = case
    tokens = rlt.tokenize(torch.from_numpy(clip), threshold=threshold, tubelet_size=tubelet, patch_size=patch)
    assert isinstance(tokens, rlt.RunLengthTokens)
    assert tokens.validate() is tokens
    mask = oracles.keep_mask(clip, threshold, tubelet, patch)
    assert tokens.grid == mask.shape
    np.testing.assert_array_equal(tokens.mask().numpy(), mask)
    np.testing.assert_array_equal(tokens.coords.numpy(), np.argwhere(mask))
    assert tokens.lengths.tolist() == oracles.run_lengths(mask)
    for patch_values, coord in zip(tokens.patches.numpy(), tokens.coords.tolist(), strict=True):
        np.testing.assert_array_equal(patch_values, oracles.patch_at(clip, coord, tubelet, patch))


@PROPERTY
@given(clips())
def test_expand_inverts_tokenize_where_only_repeats_are_dropped(case: tuple[np.ndarray, int, int]) -> None:
    clip, tubelet, patch = case
    still = clip.copy()
    still[:] = np.repeat(clip[:1], len(clip), axis=0)
    cut = len(clip) // tubelet // 2 * tubelet
    still[cut:] = clip[-1]  # one change; whole tubelets on both sides of it stand still
    frames = torch.from_numpy(still)
    tokens = rlt.tokenize(frames, threshold=0.0, tubelet_size=tubelet, patch_size=patch)
    assert torch.equal(tokens.expand(), frames)
    everything = rlt.tokenize(torch.from_numpy(clip), rule="none", tubelet_size=tubelet, patch_size=patch)
    assert torch.equal(everything.expand(), torch.from_numpy(clip))


@PROPERTY
@given(masks(), st.integers(1, 3))
def test_expand_fills_each_place_from_its_run(mask: np.ndarray, width: int) -> None:
    frames = torch.zeros(len(mask), mask.shape[1], mask.shape[2], mask.shape[3], 3, dtype=torch.uint8)
    for tokens, clip_mask in zip(
        rlt.select_tokens(frames, torch.from_numpy(mask), tubelet_size=1, patch_size=1), mask, strict=True
    ):
        features = torch.randn(len(tokens), width)
        grid = tokens.expand(features)
        assert grid.shape == (*clip_mask.shape, width)
        row = {tuple(coord): index for index, coord in enumerate(tokens.coords.tolist())}
        for t, h, w in np.ndindex(clip_mask.shape):
            start = max(earlier for earlier in range(t + 1) if clip_mask[earlier, h, w])
            assert torch.equal(grid[t, h, w], features[row[start, h, w]])


def test_a_still_clip_keeps_its_first_step_and_noise_keeps_all() -> None:
    still = torch.full((16, 224, 224, 3), 90, dtype=torch.uint8)
    tokens = rlt.tokenize(still)
    assert len(tokens) == 14 * 14
    assert tokens.lengths.unique().tolist() == [8]
    noise = torch.randint(0, 256, (16, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(rlt.tokenize(noise)) == 8 * 14 * 14


def test_batch_clip_and_views_agree() -> None:
    frames = torch.from_numpy(GOLDEN["frames"])
    batch = rlt.tokenize(frames)
    assert isinstance(batch, list)
    channels_first = frames.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    odd_offset = torch.cat([torch.zeros(1, dtype=torch.uint8), frames.flatten()])[1:].view(frames.shape)
    for same in (channels_first, odd_offset):
        for ours, theirs in zip(batch, rlt.tokenize(same), strict=True):
            assert torch.equal(ours.patches, theirs.patches)
            assert torch.equal(ours.lengths, theirs.lengths)
    single = rlt.tokenize(rlt.Clip(frames[3], torch.arange(16, dtype=torch.float64)))
    assert torch.equal(single.patches, batch[3].patches)
    assert torch.equal(single.coords, batch[3].coords)


def test_non_square_frames() -> None:
    frames = torch.randint(0, 256, (4, 32, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tokens = rlt.tokenize(frames, rule="none")
    assert tokens.grid == (2, 2, 5)
    assert torch.equal(tokens.expand(), frames)


def test_large_patches_do_not_overflow_the_sums() -> None:
    frames = torch.zeros(2, 320, 320, 3, dtype=torch.uint8)
    frames[1] = 255  # 320 rows of 255 are more than 16 bits hold
    assert bool(rlt.keep_mask(frames[None], tubelet_size=1, patch_size=320).all())
    exactly = 255 / 3 * sum(1 / (255 * std) for std in oracles.STD)
    for patch_size in (16, 160, 320):
        kept = rlt.keep_mask(frames[None], threshold=exactly - 1e-9, tubelet_size=1, patch_size=patch_size)
        dropped = rlt.keep_mask(frames[None], threshold=exactly + 1e-9, tubelet_size=1, patch_size=patch_size)
        assert bool(kept.all())
        assert not bool(dropped[:, 1].any())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": -0.1}, "threshold is -0.1; 0 or more"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"patch_size": 15}, "96x96 pixels are not a multiple of patch_size=15; resize or crop to 90x90"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"tubelet_size": 3}, "16 frames are not a multiple of tubelet_size=3; sample 15 frames"),
        ({"rule": "best"}, "rule is 'best'; allowed are rlt, budget, none"),
        ({"policy": "none"}, r"tokenize takes no policy= any more; give rule=rlt.Everything\(\)"),
        ({"treshold": 0.1}, "tokenize has no option 'treshold'; allowed are threshold, .*; did you mean 'threshold'"),
        ({"spec": rlt.PatchSpec(), "patch_size": 8}, "spec is PatchSpec.* and patch_size is 8; give one of them"),
        ({"seeds": [1, 2]}, "2 seeds for 1 clips"),
    ],
)
def test_bad_arguments_name_value_and_remedy(arguments: dict[str, object], message: str) -> None:
    frames = torch.from_numpy(GOLDEN["frames"][0])
    with pytest.raises(InvalidArgumentError, match=message) as error:
        rlt.tokenize(frames, **arguments)  # type: ignore[call-overload]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("threshold", ["0.1", None, 10**400, [0.1], torch.tensor([0.1, 0.2])])
def test_a_threshold_that_is_no_number_is_one_line(threshold):
    frames = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(InvalidArgumentError, match=r"threshold is .*needed"):
        rlt.keep_mask(frames, threshold=threshold)


def test_sizes_of_tokens_are_whole_numbers():
    frames = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)
    for sizes in ({"patch_size": 16.0}, {"tubelet_size": "2"}):
        with pytest.raises(InvalidArgumentError, match="a whole number is needed"):
            rlt.keep_mask(frames, **sizes)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(16, 32, 32, 3),
        torch.zeros(16, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(32, 32, 3, dtype=torch.uint8),
        torch.zeros(0, 32, 32, 3, dtype=torch.uint8),
    ],
)
def test_bad_frames_name_what_was_given(frames: torch.Tensor) -> None:
    with pytest.raises(InvalidArgumentError, match=r"uint8 \[T, H, W, 3\]"):
        rlt.tokenize(frames)


def test_bad_masks() -> None:
    mask = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    mask[0, 0, 1, 1] = False
    with pytest.raises(InvalidArgumentError, match="first time step"):
        rlt.run_lengths(mask)
    with pytest.raises(InvalidArgumentError, match=r"mask is torch.int64 \[2\]"):
        rlt.run_lengths(torch.ones(2, dtype=torch.int64))
    with pytest.raises(InvalidArgumentError, match=r"mask has shape \[1, 2, 2, 2\]; the frames need \[1, 1, 2, 2\]"):
        rlt.select_tokens(torch.zeros(1, 2, 32, 32, 3, dtype=torch.uint8), torch.ones(1, 2, 2, 2, dtype=torch.bool))


def test_validate_sees_a_permutation_that_a_sum_cannot() -> None:
    mask = torch.ones(1, 3, 1, 2, dtype=torch.bool)
    mask[0, 1:, 0, 0] = False
    tokens = rlt.select_tokens(torch.zeros(1, 3, 1, 2, 3, dtype=torch.uint8), mask, tubelet_size=1, patch_size=1)[0]
    tokens.validate()
    fields = (tokens.grid, tokens.spec)
    permuted = rlt.RunLengthTokens(tokens.patches, tokens.coords, tokens.lengths.flip(0), *fields)
    with pytest.raises(InvalidArgumentError, match="run lengths do not"):
        permuted.validate()
    disordered = rlt.RunLengthTokens(tokens.patches, tokens.coords.flip(0), tokens.lengths, *fields)
    with pytest.raises(InvalidArgumentError, match="order"):
        disordered.validate()
    outside = rlt.RunLengthTokens(tokens.patches, tokens.coords + 1, tokens.lengths, *fields)
    with pytest.raises(InvalidArgumentError, match="outside"):
        outside.validate()

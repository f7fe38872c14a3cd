"""Tokens of a video that comes piece by piece are those of the whole, cut where a piece ends."""

from __future__ import annotations

import io
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlt
from rlt.errors import InvalidArgumentError
from rlt.tokens.differences import PatchView

SPEC = rlt.PatchSpec(tubelet_size=2, patch_size=4)
NUM_FRAMES, HEIGHT, WIDTH = 24, 12, 20


def scene(seed: int, num_frames: int = NUM_FRAMES) -> Tensor:
    """uint8 [T, 12, 20, 3]: noise that stands, drifts or changes, place by place, with one cut."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(40, 216, (1, HEIGHT, WIDTH, 3), generator=generator).repeat(num_frames, 1, 1, 1)
    time = torch.arange(num_frames)[:, None, None, None]
    frames[:, :4] += time  # drifts
    changes = torch.randint(0, 256, (num_frames // 4, 4, WIDTH, 3), generator=generator).repeat_interleave(4, 0)
    frames[: len(changes), 4:8] = changes
    frames[num_frames // 2 :] = (frames[num_frames // 2 :] + 90 * (seed % 2)) % 256
    return frames.clamp(0, 255).to(torch.uint8)


def cut(whole: rlt.RunLengthTokens, borders: list[int]) -> list[rlt.RunLengthTokens]:
    """The plain twin: every run of the whole, cut in two at each border (in steps) that it crosses."""
    rows: list[list[tuple[int, int, int, int, int]]] = [[] for _ in borders[1:]]
    for row, ((t, h, w), length) in enumerate(zip(whole.coords.tolist(), whole.lengths.tolist(), strict=True)):
        for window, (begin, end) in enumerate(pairwise(borders)):
            first, last = max(t, begin), min(t + length, end)
            if first < last:
                rows[window].append((first - begin, h, w, last - first, row))
    windows = []
    for (begin, end), found in zip(pairwise(borders), rows, strict=True):
        table = torch.tensor(sorted(found))
        grid = (end - begin, whole.grid.height, whole.grid.width)
        coords, lengths, row = table[:, :3], table[:, 3], table[:, 4]
        windows.append(rlt.RunLengthTokens(whole.patches[row], coords, lengths, rlt.TokenGrid(*grid), whole.spec))
    return windows


def assert_equal(ours: rlt.RunLengthTokens, theirs: rlt.RunLengthTokens) -> None:
    assert ours.grid == theirs.grid
    for name in ("coords", "lengths", "patches"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def pushed(stream: rlt.TokenStream, frames: Tensor, sizes: list[int]) -> list[rlt.RunLengthTokens]:
    windows = [stream.push(chunk) for chunk in frames.split(sizes)]
    return [tokens.validate() for tokens in windows if tokens is not None]


chunks = st.lists(st.integers(1, 7), min_size=1).map(lambda sizes: (sizes * NUM_FRAMES)[:NUM_FRAMES])


def fitting(sizes: list[int]) -> list[int]:
    """The first sizes that fill the video."""
    found: list[int] = []
    for size in sizes:
        found.append(min(size, NUM_FRAMES - sum(found)))
        if sum(found) == NUM_FRAMES:
            break
    return found


def borders_of(sizes: list[int]) -> list[int]:
    ends = {sum(sizes[:count]) // SPEC.tubelet_size for count in range(len(sizes) + 1)}
    return sorted(ends)


@pytest.mark.parametrize("reference", ["previous", "anchor"])
@settings(max_examples=40)
@given(seed=st.integers(0, 9), sizes=chunks, threshold=st.sampled_from([0.0, 0.05, 0.1, 0.4]))
def test_windows_are_the_whole_cut_at_the_same_places(
    reference: str, seed: int, sizes: list[int], threshold: float
) -> None:
    sizes, frames = fitting(sizes), scene(seed)
    whole = rlt.tokenize(frames, threshold=threshold, reference=reference, spec=SPEC)
    stream = rlt.TokenStream(threshold=threshold, reference=reference, spec=SPEC)
    windows = pushed(stream, frames, sizes)
    for ours, theirs in zip(windows, cut(whole, borders_of(sizes)), strict=True):
        assert_equal(ours, theirs)
    last_runs = whole.expand(whole.coords[:, :1])[-1, :, :, 0]
    assert torch.equal(stream.ages, whole.grid.time - last_runs)
    assert stream.num_steps == whole.grid.time


@pytest.mark.parametrize("reference", ["previous", "anchor"])
@settings(max_examples=10)
@given(seed=st.integers(0, 3), sizes=chunks)
def test_with_exposure_undone_any_pieces_give_the_same(reference: str, seed: int, sizes: list[int]) -> None:
    frames = scene(seed)
    brighter = (frames.float() * torch.linspace(1, 1.2, NUM_FRAMES)[:, None, None, None]).clamp(0, 255).to(torch.uint8)
    stream = rlt.TokenStream(reference=reference, exposure="gain", spec=SPEC)
    whole = stream.push(brighter)
    assert whole is not None
    again = rlt.TokenStream(reference=reference, exposure="gain", spec=SPEC)
    for ours, theirs in zip(
        pushed(again, brighter, fitting(sizes)), cut(whole, borders_of(fitting(sizes))), strict=True
    ):
        assert_equal(ours, theirs)
    if reference == "previous":  # but for where noise is measured, it is the rule of clips
        noise = PatchView(brighter[None, :2], SPEC).noise
        view = PatchView(brighter[None], SPEC, noise=noise)
        assert torch.equal(whole.mask(), rlt.Threshold(exposure="gain")(view, seeds=[0])[0])


def test_what_goes_on_is_told_from_what_is_new() -> None:
    frames = torch.full((8, 8, 8, 3), 50, dtype=torch.uint8)
    frames[4:, :4] = 200  # the upper half changes in the third step
    stream = rlt.TokenStream(spec=SPEC)
    stream.push(frames[:4])
    assert not stream.carried.any()
    tokens = stream.push(frames[4:])
    assert tokens is not None
    assert stream.carried.tolist() == [[False, False], [True, True]]
    assert stream.ages.tolist() == [[2, 2], [4, 4]]
    assert len(tokens) == 4
    assert tokens.lengths.tolist() == [2] * 4


def test_a_token_that_stands_keeps_the_pixels_that_it_had_when_it_was_new() -> None:
    frames = torch.full((6, 4, 4, 3), 100, dtype=torch.uint8)
    frames += torch.arange(6, dtype=torch.uint8)[:, None, None, None]  # one grey level a frame, far below the threshold
    stream = rlt.TokenStream(spec=SPEC)
    windows = [stream.push(step) for step in frames.split(2)]
    assert [tokens.patches[0, 0].item() for tokens in windows if tokens] == [100, 100, 100]
    fresh = stream.push(frames[4:], anew=True)
    assert fresh is not None
    assert fresh.patches[0, 0] == 104
    assert not stream.carried.any()
    assert stream.ages.tolist() == [[1]]


@pytest.mark.parametrize("reference", ["previous", "anchor"])
@pytest.mark.parametrize("exposure", ["none", "gain"])
def test_windows_taken_anew_are_those_of_tokenize(reference: str, exposure: str) -> None:
    stream = rlt.TokenStream(reference=reference, exposure=exposure, spec=SPEC)
    for window in scene(1).split(8):
        tokens = stream.push(window, anew=True)
        assert tokens is not None
        alone = rlt.tokenize(window, reference=reference, exposure=exposure, spec=SPEC)
        assert isinstance(alone, rlt.RunLengthTokens)
        assert_equal(tokens, alone)


@pytest.mark.parametrize("anew", [False, True])
def test_scene_changes_are_told_also_on_a_border(anew: bool) -> None:
    frames = torch.full((16, 8, 8, 3), 30, dtype=torch.uint8)
    frames[4:] = 220
    frames[10:] = 90
    frames[12:] = 250  # what changes from step to step is one change
    frames[6:8, :4, :4] = 0  # a quarter of the picture is no other scene
    stream = rlt.TokenStream(spec=SPEC)
    found = []
    for chunk in frames.split(4):
        stream.push(chunk, anew=anew)
        found.append(stream.scene_changes)
    assert found == [(), (0,), (1,), ()]


def test_state_goes_through_a_file_and_on() -> None:
    frames, options = scene(5), {"reference": "anchor", "exposure": "gain", "spec": SPEC}
    one = rlt.TokenStream(**options)
    one.push(frames[:7])
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = rlt.TokenStream(**options)
    other.load_state_dict(torch.load(file, weights_only=True))
    ours, theirs = other.push(frames[7:]), one.push(frames[7:])
    assert ours is not None
    assert theirs is not None
    assert_equal(ours, theirs)
    assert torch.equal(one.ages, other.ages)


def test_state_is_as_large_after_an_hour_as_after_a_second() -> None:
    def size(stream: rlt.TokenStream) -> int:
        return sum(value.nbytes for value in stream.state_dict().values() if isinstance(value, Tensor))

    stream = rlt.TokenStream(spec=SPEC)
    stream.push(scene(0)[:9])
    after_a_second = size(stream)
    for _ in range(200):
        stream.push(scene(0))
    assert size(stream) == after_a_second


def test_frames_that_fill_no_step_wait() -> None:
    stream = rlt.TokenStream(spec=SPEC)
    frames = scene(2)
    assert stream.push(frames[:1]) is None
    tokens = stream.push(frames[1:2])
    assert tokens is not None
    assert tokens.grid.time == 1
    assert len(tokens) == 15


@pytest.mark.parametrize("options", [{"keep_ratio": 0.5}, {"max_tokens": 9}, {"rule": "random"}, {"rule": "none"}])
def test_rules_that_need_the_whole_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match="needs the whole video; a stream takes rule 'rlt'"):
        rlt.TokenStream(**options)  # type: ignore[arg-type]


def test_other_bad_input_is_refused() -> None:
    stream = rlt.TokenStream(spec=SPEC)
    with pytest.raises(InvalidArgumentError, match="above 0 and up to 1"):
        rlt.TokenStream(scene_share=0)
    with pytest.raises(InvalidArgumentError, match="uint8"):
        stream.push(scene(0).float())
    with pytest.raises(InvalidArgumentError, match="multiple of patch_size=4"):
        stream.push(scene(0)[:, :9])
    stream.push(scene(0))
    with pytest.raises(InvalidArgumentError, match="12x16 pixels, those before are 12x20"):
        stream.push(scene(0)[:, :, :16])
    with pytest.raises(InvalidArgumentError, match="state has no 'carried'"):
        stream.load_state_dict({})
    with pytest.raises(InvalidArgumentError, match="state is of a stream with"):
        rlt.TokenStream(threshold=0.2, spec=SPEC).load_state_dict(stream.state_dict())
    stream.reset()
    assert stream.push(scene(0)[:, :, :16]) is not None


def test_a_camera_that_pans_is_followed_over_borders() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 16, 16, generator=generator) * 160 + 40
    picture = torch.nn.functional.interpolate(coarse, size=(128, 128), mode="bilinear")[0].permute(1, 2, 0)
    frames = torch.stack([picture[32:96, 60 - 4 * t : 124 - 4 * t] for t in range(12)]).to(torch.uint8)
    spec = rlt.PatchSpec(tubelet_size=1, patch_size=16)
    whole = rlt.tokenize(frames, motion="global", spec=spec)
    assert isinstance(whole, rlt.RunLengthTokens)
    assert whole.share_kept < 0.5
    windows = pushed(rlt.TokenStream(motion="global", spec=spec), frames, [5, 1, 6])
    for ours, theirs in zip(windows, cut(whole, [0, 5, 6, 12]), strict=True):
        assert_equal(ours, theirs)
    with pytest.raises(InvalidArgumentError, match="which a stream cannot do together"):
        rlt.TokenStream(motion="global", reference="anchor")

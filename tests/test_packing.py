"""Packing keeps clips apart, in order, and gives them back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlt
from rlt.errors import InvalidArgumentError
from rlt.structures import RunLengthTokens, TokenGrid, pack


def random_tokens(seed: int, grid: tuple[int, int, int] = (4, 2, 3), patch_size: int = 2) -> rlt.RunLengthTokens:
    generator = torch.Generator().manual_seed(seed)
    time, height, width = grid
    frames = torch.randint(
        0, 256, (1, time, height * patch_size, width * patch_size, 3), dtype=torch.uint8, generator=generator
    )
    mask = torch.rand(1, *grid, generator=generator) < 0.5
    mask[:, 0] = True
    return rlt.select_tokens(frames, mask, tubelet_size=1, patch_size=patch_size)[0]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 99), st.tuples(*[st.integers(1, 4)] * 3)), min_size=1, max_size=5))
def test_pack_and_unpack_are_inverses(specs: list[tuple[int, tuple[int, int, int]]]) -> None:
    clips = [random_tokens(seed, grid) for seed, grid in specs]
    packed = rlt.pack(clips)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [sum(len(clip) for clip in clips[:i]) for i in range(len(clips) + 1)]
    assert packed.num_tokens == sum(len(clip) for clip in clips)
    for ours, theirs in zip(clips, packed, strict=True):
        assert torch.equal(ours.patches, theirs.patches)
        assert torch.equal(ours.coords, theirs.coords)
        assert torch.equal(ours.lengths, theirs.lengths)
        assert ours.grid == theirs.grid
        theirs.validate()
    expected_place = [
        (t * clip.grid.height + h) * clip.grid.width + w for clip in clips for t, h, w in clip.coords.tolist()
    ]
    assert packed.place.tolist() == expected_place


def test_one_clip_needs_no_list() -> None:
    tokens = random_tokens(0)
    assert torch.equal(rlt.pack(tokens).patches, rlt.pack([tokens]).patches)
    assert len(rlt.pack(tokens)) == 1


def test_unlike_clips_are_refused_by_name() -> None:
    with pytest.raises(InvalidArgumentError, match="no clips"):
        rlt.pack([])
    with pytest.raises(InvalidArgumentError, match="clip 1 has patch_size 4, clip 0 has 2"):
        rlt.pack([random_tokens(0), random_tokens(1, patch_size=4)])
    tokens = random_tokens(2)
    as_float = rlt.RunLengthTokens(tokens.patches.float(), tokens.coords, tokens.lengths, tokens.grid, tokens.spec)
    with pytest.raises(InvalidArgumentError, match=r"clip 1 has patch dtype torch.float32"):
        rlt.pack([tokens, as_float])


def test_structures_refuse_fields_that_disagree() -> None:
    tokens = random_tokens(3)
    with pytest.raises(InvalidArgumentError, match=r"lengths is torch.int64 \(1,\)"):
        rlt.RunLengthTokens(tokens.patches, tokens.coords, tokens.lengths[:1], tokens.grid)
    packed = rlt.pack(tokens)
    with pytest.raises(InvalidArgumentError, match="2 grids for 1 clips"):
        rlt.PackedTokens(packed.patches, packed.coords, packed.lengths, packed.segments, packed.grids * 2)
    with pytest.raises(InvalidArgumentError, match="clip 1 has 0 tokens"):
        rlt.Segments.from_lengths([3, 0])
    with pytest.raises(InvalidArgumentError, match="one time per frame"):
        rlt.Clip(torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(3))


def test_what_is_no_tokens_is_one_line():
    frames = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
    clip = rlt.Clip(frames=frames, times=torch.arange(4.0, dtype=torch.float64), source="x", num_repeated=0)
    model = rlt.create_model("vit_micro", num_classes=2)
    for wrong in (clip, frames, rlt.tokenize(frames)):
        with pytest.raises(InvalidArgumentError, match=r"the network takes packed tokens: model\(rlt\.pack"):
            model(wrong)
    for wrong in ([clip], [frames], "x"):
        with pytest.raises(InvalidArgumentError, match=r"pack takes what rlt\.tokenize gives"):
            rlt.pack(wrong)
    with pytest.raises(InvalidArgumentError, match="2147483652 tokens; a pack holds up to 2147483647"):
        rlt.Segments.from_lengths([2**31 - 1, 5])


def test_shapes_are_printed() -> None:
    tokens = random_tokens(4)
    assert repr(tokens).startswith(f"RunLengthTokens({len(tokens)} of 24 tokens (")
    assert f"uint8[{len(tokens)}, 12]" in repr(tokens)
    assert "1 clips" in repr(rlt.pack(tokens))
    clip = rlt.Clip(torch.zeros(2, 4, 6, 3, dtype=torch.uint8), torch.tensor([0.0, 0.5]), "a.mp4")
    assert repr(clip) == "Clip('a.mp4', 2 frames of 4x6, 0.000..0.500 s, repeated=0)"


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    max_tokens=st.integers(1, 20),
)
def test_chunks_hold_the_same_clips_and_no_more_tokens_than_allowed(lengths: list[int], max_tokens: int) -> None:
    grid = TokenGrid(1, 3, 3)
    places = torch.arange(9)
    coords = torch.stack([torch.zeros_like(places), places // 3, places % 3], dim=1)
    clips = [
        RunLengthTokens(torch.full((count, 4), number, dtype=torch.uint8), coords[:count], places[:count] + 1, grid)
        for number, count in enumerate(lengths)
    ]
    chunks = pack(clips).chunks(max_tokens)
    assert all(chunk.num_tokens <= max_tokens or len(chunk) == 1 for chunk in chunks)
    again = [clip for chunk in chunks for clip in chunk]
    assert [len(clip) for clip in again] == lengths
    for ours, theirs in zip(again, clips, strict=True):
        assert torch.equal(ours.patches, theirs.patches)
        assert torch.equal(ours.coords, theirs.coords)
    neighbours = itertools.pairwise(chunks)
    assert all(a.num_tokens + b.segments.lengths[0] > max_tokens for a, b in neighbours)

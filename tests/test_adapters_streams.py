"""Calls that go on where the last one ended, and frames that are computed anew, on image models with random weights.

A stream is held to one call over all of its frames, and a refresh to clips that begin where it is.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlt
from adapted_models import spread
from rlt import Budget, Everything, Threshold
from rlt.adapters import tiny
from rlt.adapters.encoders import encoder_inputs
from rlt.errors import InvalidArgumentError

pytest.importorskip("transformers", minversion="5.24")

PATCH, SIDE = 8, 4
SIZE = tiny.Size(width=32, depth=2, heads=4, mlp_width=64, image_size=PATCH * SIDE, patch_size=PATCH)


def build(kind: str = "siglip", **options: Any) -> Any:
    return rlt.patch(spread(tiny.build(kind, SIZE)), **options)


def video(num_frames: int = 7, *, still: float = 0.7, seed: int = 0, drift: float = 0.0) -> Tensor:
    """Frames [F, 3, h, w] in which this share of the patches repeats the frame before, up to a drift."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_frames, 3, PATCH * SIDE, PATCH * SIDE, generator=generator)
    for number in range(1, num_frames):
        repeats = torch.rand(SIDE, SIDE, generator=generator) < still
        place = repeats.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        frames[number] = torch.where(place, frames[number - 1] + drift, frames[number])
    return frames


def features(model: Any, frames: Tensor) -> Tensor:
    found: Tensor = model(**encoder_inputs(model, frames)).last_hidden_state
    return found


@pytest.mark.parametrize("kind", tiny.ENCODERS)
@torch.no_grad()
def test_a_stream_is_one_call_over_all_frames(kind: str) -> None:
    model, frames = build(kind), video()
    expected = features(model, frames)
    mask = model.rlt.last.mask[0]
    for cuts in ((1,) * 7, (3, 1, 3), (7,)):
        with model.rlt.stream():
            found, masks = [], []
            for part in frames.split(cuts):
                found.append(features(model, part))
                masks.append(model.rlt.last.mask[0])
        torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(torch.cat(masks), mask)
    assert 0 < mask.float().mean() < 0.8


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.sampled_from([Threshold(0.1), Threshold(0.1, reference="anchor"), Threshold(0), Everything()]),
    st.sampled_from([{}, {"refresh_every": 2}, {"refresh_share": 0.3}, {"refresh_around": 1}]),
    st.integers(0, 1000),
    st.floats(0, 1),
)
@torch.no_grad()
def test_wherever_it_is_cut(cuts: list[int], rule: Any, refresh: dict[str, Any], seed: int, still: float) -> None:
    model = BUILT.setdefault("clip", build("clip"))
    frames = video(sum(cuts), still=still, seed=seed, drift=0.04)
    options = {name: refresh.get(name) for name in ("refresh_every", "refresh_share", "refresh_around")}
    with model.rlt.override(rule=rule, **options):
        expected, mask = features(model, frames), model.rlt.last.mask[0]
        with model.rlt.stream():
            found = [(features(model, part), model.rlt.last.mask[0]) for part in frames.split(cuts)]
    assert torch.equal(torch.cat([part for _, part in found]), mask)
    torch.testing.assert_close(torch.cat([part for part, _ in found]), expected, atol=1e-5, rtol=1e-4)


BUILT: dict[str, Any] = {}


@torch.no_grad()
def test_a_frame_in_which_nothing_changes_costs_no_patch_and_gives_what_the_last_one_gave() -> None:
    for kind in ("siglip", "dinov3"):  # without and with a prefix
        model, frame = build(kind), video(1)
        with model.rlt.stream() as stream:
            first = features(model, frame)
            again = features(model, frame.expand(2, -1, -1, -1))
        assert torch.equal(again, first.expand(2, -1, -1))  # no layer has run
        assert model.rlt.last.num_kept == (0,)
        assert repr(stream).startswith("Stream(frames={0: 3}, num_bytes=")


@torch.no_grad()
def test_memory_does_not_grow() -> None:
    model, frames = build("dinov2"), video(12)
    with model.rlt.stream() as stream:
        features(model, frames[:1])
        size = stream.num_bytes
        places, layers, floats = SIDE * SIDE, SIZE.depth, 4
        assert size == floats * (3 * (PATCH * SIDE) ** 2 + (1 + places) * SIZE.width * (2 * layers + 1))
        for frame in frames[1:]:
            features(model, frame[None])
            assert stream.num_bytes == size
        kept = [x for camera in stream._cameras.values() for x in (camera.picture, *camera.kept.values())]
        assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in kept)


@torch.no_grad()
def test_cameras_do_not_touch_each_other() -> None:
    model, door, yard = build("clip"), video(6, seed=1), video(6, seed=2)
    expected = {"door": features(model, door), "yard": features(model, yard)}
    found: dict[str, list[Tensor]] = {"door": [], "yard": []}
    stream = model.rlt.stream()
    for number in range(2):  # one after the other, and the block is left in between
        for name, frames in (("door", door), ("yard", yard)):
            with stream, stream.cameras(name):
                found[name].append(features(model, frames[number][None]))
    with stream, stream.cameras("yard", "door"):  # two frames of each in one call
        both = features(model, torch.cat([yard[2:4], door[2:4]]))
        assert len(model.rlt.last.num_kept) == 2
    found["yard"].append(both[:2])
    found["door"].append(both[2:])
    with stream, stream.cameras("door"):
        found["door"].append(features(model, door[4:]))
    torch.testing.assert_close(torch.cat(found["door"]), expected["door"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(found["yard"]), expected["yard"][:4], atol=1e-5, rtol=1e-4)
    with stream, stream.cameras("new", "yard"):  # one that was never seen beside one that was
        both = features(model, torch.cat([door[:1], yard[4:5]]))
    torch.testing.assert_close(both, torch.stack([expected["door"][0], expected["yard"][4]]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_cameras_are_numbered_where_none_is_named() -> None:
    model, one, other = build("siglip", frames_per_clip=1), video(3, seed=1), video(3, seed=2)
    with model.rlt.stream():
        found = [features(model, torch.stack(pair)) for pair in zip(one, other, strict=True)]
    with model.rlt.override(frames_per_clip=3):
        expected = features(model, torch.cat([one, other])).unflatten(0, (2, 3))
    torch.testing.assert_close(torch.stack(found, 1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_reset_begins_anew() -> None:
    model, frames = build(), video(2)
    with model.rlt.stream() as stream:
        first = features(model, frames)
        features(model, frames[1:])
        assert model.rlt.last.num_kept == (0,)
        stream.reset()
        assert stream.num_bytes == 0
        torch.testing.assert_close(features(model, frames), first)
        stream.reset(0)
        torch.testing.assert_close(features(model, frames), first)
        with pytest.raises(InvalidArgumentError, match=r"nothing was seen of camera 'door'; known are \['0'\]"):
            stream.reset("door")
    features(model, frames[1:])
    assert model.rlt.last.share_kept == 1  # out of the block every call stands alone


@torch.no_grad()
def test_a_call_that_fails_is_as_if_it_had_not_been() -> None:
    model, frames = build(), video(3)
    expected = features(model, frames)

    def fail(*_: object) -> None:
        raise RuntimeError("of a user's hook")

    with model.rlt.stream():
        features(model, frames[:1])
        hook = model.encoder.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="of a user's hook"):
            features(model, frames[2:])
        hook.remove()
        model.rlt.check()  # leaves no trace either
        torch.testing.assert_close(features(model, frames[1:]), expected[1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_copies_go_on_by_themselves() -> None:
    model, frames = build(), video(4)
    expected = features(model, frames)
    with model.rlt.stream():
        features(model, frames[:2])
        other = copy.deepcopy(model)
        features(model, torch.zeros_like(frames[:1]))
        torch.testing.assert_close(features(other, frames[2:]), expected[2:], atol=1e-5, rtol=1e-4)


def test_gradients_do_not_flow_into_earlier_calls() -> None:
    model, frames = build(), video(2)
    with model.rlt.stream():
        features(model, frames[:1]).sum().backward()
        features(model, frames[1:]).square().sum().backward()  # the graph of the first call is gone
    assert model.encoder.layers[0].mlp.fc1.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_bad_streams_are_told() -> None:
    model, frames = build(), video(2)
    with model.rlt.stream() as stream:
        with pytest.raises(InvalidArgumentError, match="entered already"):
            model.rlt.stream().__enter__()
        features(model, frames)
        with pytest.raises(InvalidArgumentError, match=r"uint8 \[3, 32, 32\] on cpu, but the stream began with torch"):
            features(model, torch.zeros_like(frames, dtype=torch.uint8))
        with pytest.raises(InvalidArgumentError, match="state 0 was not asked for in earlier calls"):
            model(frames, output_hidden_states=True)
        words = "multiple of 3 frames, as many as the stream has cameras"
        with stream.cameras("a", "b", "c"), pytest.raises(InvalidArgumentError, match=words):
            features(model, frames)
        with pytest.raises(InvalidArgumentError, match="each once"):
            stream.cameras("a", "a").__enter__()
        for rule in (Budget(keep_ratio=0.5), Threshold(exposure="gain"), Threshold(motion="global")):
            with model.rlt.override(rule=rule), pytest.raises(InvalidArgumentError, match=r"a stream takes rlt\.Ev"):
                features(model, frames)
        model.train()
        with pytest.raises(InvalidArgumentError, match=r"call model\.eval\(\)"):
            features(model, frames)
        model.eval().double()
        with pytest.raises(InvalidArgumentError, match=r"go on as it began, or reset"):
            features(model, frames)


@torch.no_grad()
def test_a_refresh_is_a_new_beginning() -> None:
    model, frames = build("dinov2"), video(7)
    expected = torch.cat([features(model, part) for part in frames.split(3)])
    with model.rlt.override(refresh_every=3):
        torch.testing.assert_close(features(model, frames), expected, atol=1e-5, rtol=1e-4)
        assert model.rlt.last.mask[0].flatten(1).all(1).nonzero()[:, 0].tolist() == [0, 3, 6]


@torch.no_grad()
def test_frames_of_which_much_has_changed_are_kept_whole() -> None:
    model = build("dinov2")
    frames = video(1).repeat(5, 1, 1, 1)
    frames[2:, :, :, : 3 * PATCH] += 1  # three of four columns
    frames[4, :, :PATCH, :PATCH] += 1
    with model.rlt.override(refresh_share=0.7):
        found = features(model, frames)
        assert model.rlt.last.mask[0].flatten(1).sum(1).tolist() == [16, 0, 16, 0, 1]
    with model.rlt.override(refresh_share=0.8):
        features(model, frames)
        assert model.rlt.last.mask[0].flatten(1).sum(1).tolist() == [16, 0, 12, 0, 1]
    torch.testing.assert_close(found[2:], features(model, frames[2:]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_lies_beside_a_change_is_kept_too() -> None:
    model = build()
    frames = video(1).repeat(3, 1, 1, 1)
    frames[1:, :, :PATCH, :PATCH] += 1
    for around, kept in ((None, 1), (1, 4), (2, 9), (9, 16)):
        with model.rlt.override(refresh_around=around):
            features(model, frames)
        assert model.rlt.last.mask[0].flatten(1).sum(1).tolist() == [16, kept, 0]


@torch.no_grad()
def test_what_a_refresh_keeps_is_the_anchor_of_what_follows() -> None:
    """Of grey that rises by 0.06 a frame an anchor at 0.1 lets go every second one."""
    model = build("clip", reference="anchor")
    scale = torch.tensor(model.rlt.spec.std).view(3, 1, 1)
    rising = 0.06 * torch.arange(7).view(-1, 1, 1, 1) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) / scale
    frames = rising.expand(-1, -1, PATCH * SIDE, PATCH * SIDE)
    features(model, frames)
    assert model.rlt.last.mask[0, :, 0, 0].nonzero()[:, 0].tolist() == [0, 2, 4, 6]
    with model.rlt.override(refresh_every=3):
        features(model, frames)
    assert model.rlt.last.mask[0, :, 0, 0].nonzero()[:, 0].tolist() == [0, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"refresh_share": 1.5}, "refresh_share is 1.5"),
        ({"refresh_around": 0}, "refresh_around is 0"),
    ],
)
def test_bad_refreshes_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        build(**options)
    with pytest.raises(InvalidArgumentError, match=r"VideoMAEForVideoClassification takes clips, leave it out"):
        rlt.patch(tiny.build("videomae"), **dict.fromkeys(options, 1))

"""`rlt.patch` on vision transformers of timm with random weights, against unpatched models and a frame-by-frame twin.

The twin runs frames one after the other. It keeps, for every layer, the keys and values of each place as they were when
the place last changed, and computes only what changed. Which patches changed is decided here, patch by patch.

Shape legend: F frames, L places of a frame, P tokens of the prefix, D width.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlt
from optional_packages import import_or_skip
from rlt import Budget, Everything, Random, UniformFrames
from rlt.errors import InvalidArgumentError

timm = import_or_skip("timm")

PATCH, SIDE = 8, 4
THRESHOLD = 0.1
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "mean, norm behind it": {"class_token": False, "global_pool": "avg"},
    "norm before, queries normalised": {"pre_norm": True, "qk_norm": True, "embed_norm_layer": torch.nn.LayerNorm},
    "attention pooling": {"global_pool": "map", "class_token": False},
    "no positions": {"pos_embed": "none"},
    "norms behind attention, two branches": {"block_fn": "ParallelThingsBlock", "scale_attn_norm": True},
}
KNOWS_ALL_KINDS = (1, 0, 31)
"""Of timm; older versions lack some arguments, down to 1.0.3."""
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind: str = "class token", **more: Any) -> Any:
    torch.manual_seed(0)
    shape = {"img_size": PATCH * SIDE, "patch_size": PATCH, "embed_dim": 24, "depth": 3, "num_heads": 2}
    chosen = {"num_classes": 5, **shape, **KINDS[kind], **more}
    if "block_fn" in chosen:
        chosen["block_fn"] = getattr(timm.models.vision_transformer, chosen["block_fn"])
    try:
        model = timm.models.vision_transformer.VisionTransformer(**chosen)
    except (TypeError, AssertionError) as error:
        if tuple(int(part) for part in timm.__version__.split(".")[:3]) >= KNOWS_ALL_KINDS:
            raise
        pytest.skip(f"timm {timm.__version__} is too old for {kind}: {error}")
    for name, parameter in model.named_parameters():  # zeros and tiny tokens would hide mistakes
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model.eval()


def stack(num_frames: int = 6, *, still: float = 0.6, seed: int = 0) -> Tensor:
    """Frames [F, 3, H, W] in which this share of the patches repeats the frame before."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_frames, 3, PATCH * SIDE, PATCH * SIDE, generator=generator)
    for number in range(1, num_frames):
        repeats = torch.rand(SIDE, SIDE, generator=generator) < still
        place = repeats.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        frames[number] = torch.where(place, frames[number - 1], frames[number])
    return frames


def changed_places(frames: Tensor) -> list[set[int]]:
    """By the definition of the rule, for tubelets of one frame."""
    found = [set(range(SIDE * SIDE))]
    for before, now in pairwise(frames):
        differences = (now - before).abs()
        found.append(
            {
                row * SIDE + column
                for row in range(SIDE)
                for column in range(SIDE)
                if differences[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].mean()
                > THRESHOLD
            }
        )
    return found


@torch.no_grad()
def twin_features(model: Any, frames: Tensor) -> Tensor:
    """Features [F, P + L, D], a frame at a time."""
    prefix, outputs = model.num_prefix_tokens, []
    memory: list[Tensor] = []  # inputs of each block, and the output, of all tokens as they stand
    for frame, places in zip(frames, changed_places(frames), strict=True):
        x = model.norm_pre(model._pos_embed(model.patch_embed(frame[None])))[0]
        rows = torch.tensor([*range(prefix), *(prefix + place for place in sorted(places))], dtype=torch.long)
        states = [x]
        if not memory:
            for block in model.blocks:
                states.append(block(states[-1][None])[0])
            memory = states
        else:
            memory[0] = memory[0].clone()
            memory[0][rows] = x[rows]
            for number, block in enumerate(model.blocks):
                # The rows that changed see all tokens as they stand; the rest of the output is not looked at.
                memory[number + 1] = memory[number + 1].clone()
                memory[number + 1][rows] = block(memory[number][None])[0][rows]
        outputs.append(model.norm(memory[-1]))
    return torch.stack(outputs)


@every_kind
@torch.no_grad()
def test_nothing_dropped_gives_the_unpatched_model(kind: str) -> None:
    model, frames = build(kind), stack()
    expected, features = model(frames), model.forward_features(frames)
    rlt.patch(model, rule=Everything())
    torch.testing.assert_close(model(frames), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(model.forward_features(frames), features, atol=1e-5, rtol=1e-5)
    assert model.rlt.last.share_kept == 1


@pytest.mark.parametrize(
    "more",
    [
        {"block_fn": "ResPostBlock", "init_values": 1.0},
        {"img_size": (PATCH * SIDE, 2 * PATCH * SIDE), "global_pool": "avgmax"},
        {"reg_tokens": 3, "global_pool": "max", "fc_norm": True},
        {"num_classes": 0, "final_norm": False, "qkv_bias": False},
    ],
    ids=["norm behind each layer", "wide pictures", "registers with positions", "no head"],
)
@torch.no_grad()
def test_rarer_kinds_in_double_precision(more: dict[str, Any]) -> None:
    """Where rounding cannot hide a mistake, for models whose norms enlarge it."""
    model, frames = build(**more).double(), stack().double()
    frames = frames if "img_size" not in more else torch.cat([frames, frames.flip(0)], dim=3)
    still = frames[:1].expand(3, -1, -1, -1)
    expected, standing = model(frames), model(still)
    rlt.patch(model, rule=Everything())
    torch.testing.assert_close(model(frames), expected, atol=1e-11, rtol=1e-11)
    rlt.patch(model)
    torch.testing.assert_close(model(still), standing, atol=1e-11, rtol=1e-11)
    assert model.rlt.last.share_kept == pytest.approx(1 / 3)


@every_kind
@torch.no_grad()
def test_equals_the_twin_frame_by_frame(kind: str) -> None:
    model, frames = build(kind), stack()
    features = twin_features(model, frames)
    expected = model.forward_head(features)
    rlt.patch(model, threshold=THRESHOLD)
    torch.testing.assert_close(model(frames), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.forward_features(frames), features, atol=1e-5, rtol=1e-4)
    places = changed_places(frames)
    assert model.rlt.last.num_kept == (sum(map(len, places)),)
    assert 0 < model.rlt.last.share_kept < 0.8
    found = [set(mask.flatten().nonzero()[:, 0].tolist()) for mask in model.rlt.last.mask[0]]
    assert found == places


@every_kind
@torch.no_grad()
def test_a_clip_that_stands_still_gives_the_outputs_of_the_unpatched_model(kind: str) -> None:
    model, frames = build(kind), stack(1).expand(4, -1, -1, -1)
    expected = model(frames)
    rlt.patch(model)
    torch.testing.assert_close(model(frames), expected, atol=1e-5, rtol=1e-5)
    assert model.rlt.last.num_kept == (SIDE * SIDE,)


@torch.no_grad()
def test_clips_of_a_batch_do_not_touch_each_other() -> None:
    model = rlt.patch(build(), threshold=THRESHOLD, frames_per_clip=3)
    one, other = stack(3, seed=1), stack(3, seed=2)
    together = model(torch.cat([one, other]))
    torch.testing.assert_close(together, torch.cat([model(one), model(other)]), atol=1e-6, rtol=1e-5)
    with model.rlt.override(frames_per_clip=None):
        model(torch.cat([one, one]))
        assert len(model.rlt.last.num_kept) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(["class token", "registers", "mean, norm behind it"]),
    st.integers(0, 1000),
    st.floats(0, 1),
)
@torch.no_grad()
def test_every_place_is_shown_by_its_newest_token(clips: int, time: int, kind: str, seed: int, still: float) -> None:
    model = BUILT.setdefault(kind, rlt.patch(build(kind)))
    frames = torch.cat([stack(time, still=still, seed=seed + number) for number in range(clips)])
    with model.rlt.override(frames_per_clip=time):
        model(frames)
    last, prefix = model.rlt.last, model.num_prefix_tokens
    order = []  # of the packed sequence: (clip, frame, place), places below 0 being those of the prefix
    for clip in range(clips):
        for frame in range(time):
            order += [(clip, frame, token - prefix) for token in range(prefix)]
            order += [(clip, frame, int(place)) for place in last.mask[clip, frame].flatten().nonzero()[:, 0]]
    expected = []
    for clip in range(clips):
        for frame in range(time):
            expected += [order.index((clip, frame, token - prefix)) for token in range(prefix)]
            for place in range(SIDE * SIDE):
                newest = max(t for t in range(frame + 1) if last.mask[clip, t].flatten()[place])
                expected.append(order.index((clip, newest, place)))
    assert model.rlt.call.rows.flatten().tolist() == expected


BUILT: dict[str, Any] = {}


def test_gradients_are_those_of_the_unpatched_model_where_nothing_is_dropped() -> None:
    model, frames = build(), stack()
    F.cross_entropy(model(frames), torch.arange(6) % 5).backward()
    theirs = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    rlt.patch(model, rule=Everything()).train()
    F.cross_entropy(model(frames), torch.arange(6) % 5).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_training_drops_the_same_as_the_unpatched_model_for_the_same_seed() -> None:
    for kind, more in (("class token", {"drop_path_rate": 0.6}), ("no positions", {"pos_drop_rate": 0.5})):
        model, frames = build(kind, **more).train(), stack()
        torch.manual_seed(7)
        expected = model(frames)
        rlt.patch(model, rule=Everything())
        torch.manual_seed(7)
        torch.testing.assert_close(model(frames), expected, atol=1e-5, rtol=1e-5)
        torch.manual_seed(8)
        assert more == {"pos_drop_rate": 0.5} or not torch.allclose(model(frames), expected, atol=1e-3)


def test_a_dropped_path_is_that_of_one_frame() -> None:
    model, frames = rlt.patch(build("registers", drop_path_rate=0.5), threshold=THRESHOLD), stack()
    model(frames)
    layer = model.blocks[-1].drop_path1
    ones = torch.ones(1, model.rlt.call.segments.num_tokens, 4)
    assert torch.equal(layer(ones), ones)
    layer.train()
    drawn = {float(value) for _ in range(8) for value in layer(ones).unique()}
    assert drawn == {0.0, 2.0}
    assert all(len(frame.unique()) == 1 for frame in layer(ones)[0].split(model.rlt.call.segments.lengths))
    layer.scale_by_keep = False
    assert {float(value) for _ in range(8) for value in layer(ones).unique()} == {0.0, 1.0}


def test_checkpointed_layers_find_their_own_call_again() -> None:
    model, first, second = rlt.patch(build(), threshold=THRESHOLD).train(), stack(4, seed=3), stack(5, seed=4)
    (model(first).square().sum() + model(second).square().sum()).backward()
    theirs = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.set_grad_checkpointing()
    (model(first).square().sum() + model(second).square().sum()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


@every_kind
@torch.no_grad()
def test_a_stream_is_one_call_over_all_frames(kind: str) -> None:
    model, frames = rlt.patch(build(kind), threshold=THRESHOLD), stack()
    frames = torch.cat([frames, frames[-1:], frames[-1:]])
    expected = model(frames)
    for cuts in ((1,) * 8, (3, 1, 4), (8,)):
        with model.rlt.stream():
            found = torch.cat([model(part) for part in frames.split(cuts)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_unpatched_copied_and_pickled() -> None:
    model, frames = build(), stack()
    before, state = model(frames), {name: value.clone() for name, value in model.state_dict().items()}
    rlt.patch(model, threshold=THRESHOLD)
    patched = model(frames)
    assert not torch.equal(patched, before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(frames), patched)
        assert other.rlt.model is other
        other.blocks[0].attn.qkv.weight.zero_()
        assert torch.equal(model(frames), patched)
    rlt.unpatch(model)
    assert torch.equal(model(frames), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_options_hold() -> None:
    model, frames = build(), stack(still=0.9)
    rlt.patch(model, keep_ratio=0.5)
    model(frames)
    assert model.rlt.last.num_kept == (6 * SIDE * SIDE // 2,)
    with model.rlt.override(keep_ratio=None, max_tokens=20):
        model(frames)
        assert model.rlt.last.num_kept == (20,)
    with model.rlt.override(rule=UniformFrames(like=Budget(keep_ratio=0.5))):
        model(frames)
        assert model.rlt.last.mask[0].flatten(1).all(1).sum() == 3
    model.rlt.check()


@torch.no_grad()
def test_uint8_frames_are_normalised_as_the_model_was_trained() -> None:
    model = build()
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.5, 0.5)}
    frames = torch.randint(0, 256, (3, 3, PATCH * SIDE, PATCH * SIDE), dtype=torch.uint8)
    frames[2] = frames[1]
    std = torch.tensor([0.25, 0.5, 0.5]).view(3, 1, 1)
    expected = model((frames / 255 - 0.5) / std)
    rlt.patch(model)
    torch.testing.assert_close(model(frames), expected, atol=1e-5, rtol=1e-5)
    assert model.rlt.last.num_kept == (2 * SIDE * SIDE,)


@pytest.mark.parametrize("kind", ["class token", "norm before, queries normalised"])
@torch.no_grad()
def test_autocast_rounds_what_it_rounds_in_the_unpatched_model(kind: str) -> None:
    """Hidden states stay float32 there, and attention runs in half precision."""
    model, frames, found = build(kind), stack(), []
    model.blocks[1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dtype))
    exact = model(frames)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(frames)
        rlt.patch(model, rule=Everything())
        logits = model(frames)
    assert found == [torch.float32] * 3
    assert not torch.equal(expected.float(), exact)
    torch.testing.assert_close(logits.float(), expected.float(), atol=5e-3, rtol=1e-2)


@torch.no_grad()
def test_autocast_and_half_precision() -> None:
    model, frames = build("registers"), stack()
    rlt.patch(model, threshold=THRESHOLD)
    expected = model(frames)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(frames).float(), expected, atol=0.2, rtol=0.1)
    half = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(half(frames.bfloat16()).float(), expected, atol=0.3, rtol=0.1)


def test_models_of_the_registry_run() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5).eval()
    rlt.patch(model).rlt.check()
    assert isinstance(model.rlt, rlt.adapters.Adapter)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"patch_drop_rate": 0.5}, "patch_drop_rate"),
        ({"block_fn": "ParallelScalingBlock"}, "plain Attention"),
        ({"patch_size": (8, 4)}, "patches of"),
    ],
)
def test_models_that_compute_otherwise_are_refused(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        rlt.patch(build(**more))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "resnet18"])
def test_other_models_are_refused_in_one_line(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        rlt.patch(timm.create_model(name))
    assert "\n" not in str(caught.value)


def test_bad_calls_are_told() -> None:
    model, frames = rlt.patch(build()), stack()
    with pytest.raises(InvalidArgumentError, match=r"shape \[1, 6, 3, 32, 32\]"):
        model(frames[None])
    with pytest.raises(InvalidArgumentError, match=r"\[B, 6, 3, 32, 32\]"):
        model(frames[..., :16])
    with model.rlt.override(frames_per_clip=4), pytest.raises(InvalidArgumentError, match="frames_per_clip=4"):
        model(frames)
    if "is_causal" in inspect.signature(type(model).forward).parameters:  # timm 1.0.3 has no such argument
        with pytest.raises(InvalidArgumentError, match="attn_mask"):
            model(frames, is_causal=True)
    with pytest.raises(InvalidArgumentError, match="forward_features"):
        model.forward_intermediates(frames)
    with pytest.raises(InvalidArgumentError, match=r"tokens of Random.* stand for no others"):
        model.rlt.override(rule=Random()).__enter__()
    with pytest.raises(InvalidArgumentError, match=r"tokens of Random.* stand for no others"):
        rlt.patch(build(), rule=Random())
    dropping = rlt.patch(build(attn_drop_rate=0.1)).train()
    with pytest.raises(InvalidArgumentError, match="attn_drop_rate=0"):
        dropping(frames)


def test_layers_that_evade_packed_attention_are_an_error() -> None:
    model, frames = rlt.patch(build()), stack()
    model.blocks[1] = copy.deepcopy(build().blocks[1])  # as made by timm: frames would see each other
    for call in (model, model.forward_features):
        with pytest.raises(InvalidArgumentError, match="2 of 3 layers used packed attention; timm"):
            call(frames)

"""Patched Qwen-VL models: options, copies and files, the bookkeeping of columns and places, mistakes."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlt
from qwen_inputs import (
    BATCHES,
    CACHE,
    MERGE,
    PATCH,
    THRESHOLD,
    every_family,
    inputs_of,
    patched,
    qwen3,
    qwen25,
    row_a,
    row_c,
    transformers,
)
from rlt import Everything, Random, UniformFrames
from rlt.adapters.qwen.positions import (
    Columns,
    GroupView,
    full_features,
    kept_features,
    shorter_segments,
    tower_arguments,
)
from rlt.errors import InvalidArgumentError
from rlt.structures import IMAGENET_STD
from rlt.tokens import PatchView
from rlt.tokens.aligned import Camera

# Options, copies, files


@every_family
@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"max_tokens": 20}, (20, 18)),
        ({"keep_ratio": 0.5}, (24, 9)),
        ({"rule": Random()}, (39, 12)),
        ({"rule": UniformFrames()}, (36, 12)),
        ({"threshold": 100.0}, (12, 6)),
    ],
)
def test_options_count_groups(make: Callable[..., Any], options: dict[str, Any], counts: tuple[int, ...]) -> None:
    model = patched(make(), **options)
    given = inputs_of(model, BATCHES["two"]())
    logits = model(**given).logits
    assert model.rlt.last.num_kept == counts
    assert model.rlt.last.dense_per_video == (48, 18)
    assert torch.isfinite(logits).all()
    with model.rlt.override(rule=Everything(), max_tokens=None, keep_ratio=None):
        assert model(**given).logits.shape[:2] == given["input_ids"].shape


@pytest.mark.parametrize("camera", [Camera("gain"), Camera(motion="global"), Camera("gain", "global")], ids=str)
def test_a_group_differs_as_its_patch_that_differs_most(camera: Camera) -> None:
    view = group_view(0)
    plain = PatchView(view.frames, view.spec).differences_under(camera)[0]
    groups = [[step[2 * h : 2 * h + 2, 2 * w : 2 * w + 2].max() for w in range(3)] for step in plain for h in range(2)]
    expected = torch.tensor(groups).view(3, 2, 3)
    assert torch.allclose(view.differences_under(camera)[0], expected, atol=1e-6)


def test_groups_are_compared_with_the_group_that_stands() -> None:
    view, threshold = group_view(1), 0.8
    frames = view.frames[0].movedim(1, -1) * torch.tensor(view.spec.std) / torch.tensor(IMAGENET_STD)
    first, last = frames[::2], frames[1::2]
    stands, side = first[0].clone(), 2 * view.spec.patch_size
    mask = view.differ(threshold, reference="anchor")[0]
    for t in range(1, len(first)):
        for h in range(2):
            for w in range(3):
                cell = np.s_[h * side : (h + 1) * side, w * side : (w + 1) * side]
                off = (last[t][cell] - stands[cell]).abs().unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3, 4))
                assert mask[t, h, w] == (off.max() > threshold)
                if mask[t, h, w]:
                    stands[cell] = first[t][cell]
    assert 0.2 < mask.float().mean() < 1


def group_view(seed: int) -> GroupView:
    """Four steps of 2 x 3 groups of 2 x 2 patches, some of which change."""
    generator = torch.Generator().manual_seed(seed)
    spec = rlt.PatchSpec(2, PATCH, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3))
    picture = torch.randn(1, 24, 3, 1, PATCH, PATCH, generator=generator)
    noise = torch.randn(4, 24, 3, 1, PATCH, PATCH, generator=generator)
    steps = picture + 0.8 * torch.rand(4, 24, 1, 1, 1, 1, generator=generator) * noise
    return GroupView(steps.expand(-1, -1, -1, 2, -1, -1).reshape(96, -1), rlt.TokenGrid(4, 2, 3), 2, spec)


@every_family
@pytest.mark.parametrize(
    "options",
    [{"reference": "anchor"}, {"exposure": "gain"}, {"motion": "global", "reference": "anchor"}, {"max_tokens": 2}],
)
def test_what_is_compared_may_be_chosen(make: Callable[..., Any], options: dict[str, Any]) -> None:
    model = patched(make(), **options)
    given = inputs_of(model, BATCHES["two"]())
    assert torch.isfinite(model(**given).logits).all()
    assert all(0 < kept < dense for kept, dense in zip(model.rlt.last.num_kept, (48, 18), strict=True))


@every_family
def test_unpatching_restores_the_model_bit_for_bit(make: Callable[..., Any]) -> None:
    model = make()
    given = inputs_of(model, BATCHES["mixed"]())
    before, names = model(**given).logits, set(model.__dict__)
    generated = model.generate(**given, max_new_tokens=4, do_sample=False)
    patched(model)
    assert not torch.equal(model(**given).logits[:, -1], before[:, -1])
    rlt.unpatch(model)
    assert torch.equal(model(**given).logits, before)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), generated)
    assert set(model.__dict__) == names
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks_with_kwargs


@torch.no_grad()
def test_copies_stay_patched_and_are_independent() -> None:
    model = patched(qwen3(), threshold=THRESHOLD)
    given = inputs_of(model, BATCHES["two"]())
    twin = copy.deepcopy(model)
    assert twin.rlt is not model.rlt
    assert twin.rlt.model is twin
    expected = model(**given).logits
    answer = model.generate(**given, max_new_tokens=3, do_sample=False)
    rlt.unpatch(model)
    assert torch.equal(twin(**given).logits, expected)
    assert torch.equal(twin.generate(**given, max_new_tokens=3, do_sample=False), answer)
    assert twin.rlt.last is not None


def test_pickles_stay_patched() -> None:
    model = patched(qwen25(), threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert again.rlt.last.num_kept == model.rlt.last.num_kept == (39,)


def test_whole_and_part_are_not_patched_at_once() -> None:
    model = qwen25()
    patched(model.model)
    with pytest.raises(InvalidArgumentError, match="the bare model within is patched already"):
        patched(model)
    assert "rlt" not in model.__dict__
    rlt.unpatch(model.model)
    patched(model)
    assert "rlt" in patched(model).__dict__  # anew


def test_saving_is_unaffected(tmp_path: Path) -> None:
    model = qwen25()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patched(model)
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path)
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert not hasattr(again, "rlt")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert model.config.to_dict()["model_type"] == again.config.to_dict()["model_type"]


@every_family
def test_the_check_engages(make: Callable[..., Any]) -> None:
    model = patched(make())
    deltas = model.model.rope_deltas = torch.tensor([[7]])  # of a text that is being generated
    model.rlt.check()
    assert model.model.rope_deltas is deltas
    assert model.rlt.last is None
    with model.rlt.override(rule=Everything()), pytest.raises(InvalidArgumentError, match="does not engage"):
        model.rlt.check()


def test_a_forward_that_others_have_wrapped_stays_wrapped() -> None:
    """As libraries do that spread a model over devices."""
    model, calls = qwen25(), []
    given = inputs_of(model, [row_a()])
    own = model.forward

    @wraps(own)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].shape[1])
        return own(*args, **kwargs)

    model.forward = wrapped
    patched(model, threshold=THRESHOLD)
    model(**given)
    patched(model, rule=Everything())
    model(**given)
    rlt.unpatch(model)
    assert calls == [48, 57]
    assert model.forward is wrapped


def test_learning_with_recomputed_activations() -> None:
    model = patched(qwen25(), threshold=THRESHOLD).train()
    given = inputs_of(model, [row_a()])
    grads = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        grads.append(model.model.visual.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*grads)
    assert bool(grads[0].any())


def test_half_precision() -> None:
    model = patched(qwen3().to(torch.bfloat16), threshold=THRESHOLD)
    given = inputs_of(model, [row_c()])
    given = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    assert model(**given).logits.dtype == torch.bfloat16
    assert model.rlt.last.share_kept < 1
    model.generate(**given, max_new_tokens=2)


# Bookkeeping


@settings(max_examples=60, deadline=None)
@given(data=st.data(), right=st.booleans())
def test_columns_keep_their_order_and_padding_stands_on_one_side(data: st.DataObject, right: bool) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    kept = torch.tensor(bits).view(rows, length)
    kept[0, data.draw(st.integers(0, length - 1))] = True
    columns = Columns.of(kept, right=right)
    values = torch.arange(rows * length).view(rows, length)
    taken = columns.take(values, -1)
    assert torch.equal(columns.take(values.expand(3, -1, -1), -1)[2], taken)
    vectors = columns.take_vectors(values[..., None].expand(-1, -1, 2) + 1)[..., 1]
    assert torch.equal(vectors, taken + 1)
    for row in range(rows):
        expected = values[row][kept[row]].tolist()
        padding = [-1] * (int(kept.sum(1).max()) - len(expected))
        assert taken[row].tolist() == (expected + padding if right else padding + expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_places_segments_and_windows_follow_any_choice_of_groups(data: st.DataObject) -> None:
    """Each group that stays has its own place, frame and window; nothing else shares a segment with it than before."""
    sizes = data.draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3))
    grid = torch.tensor([(time, 2 * height, 2 * width) for time, height, width in sizes])
    total = sum(time * height * width for time, height, width in sizes)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    kept[data.draw(st.integers(0, total - 1))] = True
    visual = types.SimpleNamespace(spatial_merge_size=MERGE, window_size=16, patch_size=PATCH)
    ours = tower_arguments(visual, grid, kept)
    places = [
        (number, t, row, column, row // 2, column // 2)
        for number, (time, height, width) in enumerate(sizes)
        for t in range(time)
        for row in range(height)
        for column in range(width)
    ]
    stay = [place for place, keep in zip(places, kept.tolist(), strict=True) if keep]
    rows, columns = ours["position_ids"][::4].T // 2
    assert [(row, column) for _, _, row, column, _, _ in stay] == list(
        zip(rows.tolist(), columns.tolist(), strict=True)
    )
    assert sorted(ours["window_index"].tolist()) == list(range(len(stay)))
    in_windows = [stay[index] for index in ours["window_index"].tolist()]
    for name, order, key in (
        ("cu_seqlens", stay, lambda place: place[:2]),
        ("cu_window_seqlens", in_windows, lambda place: (*place[:2], *place[4:])),
    ):
        offsets = ours[name].tolist()
        segments = [order[a // 4 : b // 4] for a, b in pairwise(offsets)]
        keys = [{key(place) for place in segment} for segment in segments]
        assert all(len(found) == 1 for found in keys)  # no segment is empty, none has two frames or windows
        assert len(keys) == len({key(place) for place in stay})
        assert offsets[-1] == 4 * len(stay)


def test_segments_that_lose_everything_are_gone() -> None:
    kept = torch.tensor([1, 1, 0, 0, 0, 1], dtype=torch.bool)
    assert shorter_segments(torch.tensor([0, 2, 4, 6]), kept).tolist() == [0, 2, 3]


def test_marked_features_come_back() -> None:
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(
        pooler_output=(torch.randn(2, 4), torch.randn(3, 4))
    )
    masks = [torch.tensor([[True, False, True]]), torch.ones(3, dtype=torch.bool)]
    marked = full_features(output, masks)
    assert [len(feature) for feature in marked.pooler_output] == [3, 3]
    found = kept_features(marked)
    assert found is not None
    assert all(torch.equal(a, b.flatten()) for a, b in zip(found[1], masks, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0].pooler_output, output.pooler_output, strict=True))
    assert kept_features(output) is None


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_grid_thw": None}, "video_grid_thw is None beside pixel_values_videos; pass the processor's"),
        ({"video_grid_thw": torch.tensor([4, 6, 8])}, r"video_grid_thw is of shape \[3\]"),
        ({"video_grid_thw": torch.tensor([[4, 6, 6]])}, r"has 192 rows; video_grid_thw \[\[4, 6, 6\]\] needs 144"),
        ({"video_grid_thw": torch.tensor([[4, 3, 16]])}, r"has \[4, 3, 16\]; rows and columns must be multiples of 2"),
        ({"pixel_values_videos": torch.zeros(192, 95)}, r"shape \[192, 95\]; the model needs \[patches, 96\]"),
        ({"input_ids": torch.full((1, 57), 5)}, "the text has 0 video placeholders; video_grid_thw needs 48"),
        ({"attention_mask": torch.ones(1, 9)}, r"attention_mask is \[1, 9\]; .* \[rows, 57\]"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask is dict"),
        ({"logits_to_keep": torch.tensor([1])}, "logits_to_keep is a tensor"),
    ],
)
def test_mistakes_are_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    model = patched(qwen25())
    given = {**inputs_of(model, [row_a()]), **changes}
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        model(**given)
    assert "\n" not in str(caught.value)


def test_what_is_not_offered_is_told() -> None:
    with pytest.raises(InvalidArgumentError, match="expand is 'fill'"):
        patched(qwen25(), expand="fill")
    model = patched(qwen25())
    given = inputs_of(model, [row_a()])
    with pytest.raises(InvalidArgumentError, match="no static cache"):
        model.generate(**given, max_new_tokens=2, cache_implementation="static")
    packed = torch.arange(57).repeat(4, 1, 1)
    packed[0, 0, 30:] -= 30
    packs = {**given, "attention_mask": None, "position_ids": packed}
    with pytest.raises(InvalidArgumentError, match="starts anew within a row"):
        model(**packs, use_cache=False)
    cache = model(**given, use_cache=True)[CACHE]
    cache.crop(-20)
    with pytest.raises(InvalidArgumentError, match=r"the cache was cut to \d+ columns"):
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache})


@pytest.mark.parametrize("cut", [1, 4])
def test_text_behind_a_video_can_be_cut_off_a_cache(cut: int) -> None:
    model = patched(qwen25(), threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    whole = model(**given, use_cache=True)
    whole[CACHE].crop(-cut)
    again = {"input_ids": given["input_ids"][:, -cut:], "attention_mask": given["attention_mask"]}
    found = model(**again, **{CACHE: whole[CACHE]}).logits
    torch.testing.assert_close(found, whole.logits[:, -cut:], atol=2e-5, rtol=1e-4)


def test_a_cache_that_was_emptied_can_be_filled_again() -> None:
    model = patched(qwen25(), threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    first = model(**given, use_cache=True)
    first[CACHE].crop(-first[CACHE].get_seq_length())
    again = model(**given, **{CACHE: first[CACHE]})
    torch.testing.assert_close(again.logits, first.logits)
    cache = again[CACHE]
    cache.crop(-cache.get_seq_length())
    text, last = torch.arange(3, 60)[None], torch.full((3, 1, 1), 56)
    model(input_ids=text[:, :-1], **{CACHE: cache})
    found = model(input_ids=text[:, -1:], attention_mask=torch.ones_like(text), **{CACHE: cache}, position_ids=last)
    model.model.rope_deltas = None
    torch.testing.assert_close(found.logits[:, -1], model(input_ids=text).logits[:, -1])

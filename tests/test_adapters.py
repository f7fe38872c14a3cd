"""`rlt.patch` on transformers' own models with random weights: identity, a plain twin clip by clip, and undoing."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rlt
from adapted_models import CLASSIFIERS, ENCODERS, GRID, IDS, PATCH, SIZE, clips, output_of, videomae, vivit, vjepa2
from rlt import Everything, PatchSpec, Random, Threshold, assets
from rlt.adapters import Call, supported_models
from rlt.errors import InvalidArgumentError
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD
from rlt.tokens import PatchView, choose_rule
from rlt.tokens.naming import PLAIN

transformers = pytest.importorskip("transformers")


def twin_logits(model: nn.Module, frames: Tensor, mask: Tensor) -> Tensor:
    """The unpatched model's own parts, one clip at a time, on the kept tokens alone."""
    rows = []
    for clip, kept in zip(frames, mask.flatten(1), strict=True):
        if hasattr(model, "videomae"):
            x = model.videomae.embeddings(clip[None], None)[:, kept]
            x = model.videomae.encoder(x).last_hidden_state
            x = model.videomae.layernorm(x)[:, 0] if model.fc_norm is None else model.fc_norm(x.mean(1))
        elif hasattr(model, "vjepa2"):
            x = model.vjepa2.encoder.embeddings(clip[None])[:, kept]
            for layer in model.vjepa2.encoder.layer:
                x = layer(x, kept.nonzero().T)[0]  # the model's own argument for the places of a subset
            x = model.pooler(model.vjepa2.encoder.layernorm(x))
        else:
            x = model.vivit.embeddings(clip[None])
            x = torch.cat([x[:, :1], x[:, 1:][:, kept]], dim=1)
            for layer in model.vivit.encoder.layer if hasattr(model.vivit, "encoder") else model.vivit.layers:
                x = layer(x)
                x = x[0] if isinstance(x, tuple) else x
            x = model.vivit.layernorm(x)[:, 0]
        rows.append(model.classifier(x))
    return torch.cat(rows)


@pytest.mark.parametrize("make", [*CLASSIFIERS, *ENCODERS], ids=[*IDS, *(f"{name} encoder" for name in IDS)])
def test_nothing_dropped_is_the_unpatched_model(make: Callable[[], nn.Module]) -> None:
    model, frames = make(), clips()
    before = output_of(model, frames)
    rlt.patch(model, rule=Everything())
    torch.testing.assert_close(output_of(model, frames), before, atol=2e-5, rtol=1e-5)
    assert model.rlt.last.num_kept == (64, 64, 64)


@pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
def test_dropped_tokens_leave_what_the_parts_compute_clip_by_clip(make: Callable[[], nn.Module]) -> None:
    model, frames = make(), clips()
    rlt.patch(model, threshold=0.1)
    logits = output_of(model, frames)
    mask = model.rlt.last.mask
    assert model.rlt.last.num_kept == (52, 40, 28)
    logits.square().sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    rlt.unpatch(model)
    model.zero_grad()
    twin = twin_logits(model, frames, mask)
    torch.testing.assert_close(logits, twin, atol=2e-5, rtol=1e-4)
    twin.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            torch.testing.assert_close(ours[name], parameter.grad, atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("make", [*CLASSIFIERS, *ENCODERS], ids=[*IDS, *(f"{name} encoder" for name in IDS)])
def test_unpatching_restores_everything_bit_for_bit(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, frames = make(), clips()
    before, names = output_of(model, frames), list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    rlt.patch(model)
    assert list(model.state_dict()) == names
    output_of(model, frames)
    rlt.unpatch(model)
    assert not hasattr(model, "rlt")
    assert torch.equal(output_of(model, frames), before)
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_stay_patched_and_independent(make: Callable[[], nn.Module], copied: Callable[[Any], Any]) -> None:
    model, frames = rlt.patch(make()), clips()
    logits = output_of(model, frames)
    twin = copied(model)
    assert twin.rlt is not model.rlt
    assert twin.rlt.model is twin
    rlt.unpatch(model)
    torch.testing.assert_close(output_of(twin, frames), logits)
    assert twin.rlt.last.num_kept == (52, 40, 28)


@pytest.mark.parametrize("make", ENCODERS, ids=IDS)
def test_bare_encoders_fill_the_grid(make: Callable[[], nn.Module]) -> None:
    model, frames = rlt.patch(make()), clips(2)
    filled = output_of(model, frames)
    extra = filled.shape[1] - 64  # the CLS token
    assert filled.shape[:2] == (2, 64 + extra)
    grid = filled[:, extra:].view(2, *GRID, -1)
    assert torch.equal(grid[:, 1:, :, 0], grid[:, :1, :, 0].expand(-1, 3, -1, -1))  # the first column stands still
    assert not torch.equal(grid[0, 1, :, 3], grid[0, 0, :, 3])
    states = model(frames, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert {state.shape for state in states} == {(2, 64 + extra, states[0].shape[-1])}


def test_filling_before_a_classifier_weighs_tokens_by_their_run() -> None:
    model, frames = rlt.patch(videomae(), expand="fill"), clips()
    logits = output_of(model, frames)
    with model.rlt.override(expand=None):
        assert not torch.allclose(output_of(model, frames), logits)
    rows = model.rlt.last.row_at_place()
    counts = torch.bincount(rows.flatten())
    assert counts.sum() == 3 * 64
    assert counts.min() >= 1


@pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
@torch.no_grad()
def test_autocast_rounds_what_it_rounds_in_the_unpatched_model(make: Callable[[], nn.Module]) -> None:
    model, frames = make(), clips()
    exact = output_of(model, frames)
    with torch.autocast("cpu", torch.bfloat16):
        expected = output_of(model, frames).float()
        rlt.patch(model, rule=Everything())
        logits = output_of(model, frames).float()
    assert not torch.equal(expected, exact)
    assert (logits - exact).abs().max() < 1.1 * (expected - exact).abs().max()


@pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
def test_autocast_labels_and_checkpointing(make: Callable[[], nn.Module]) -> None:
    model, frames = rlt.patch(make()), clips()
    logits = output_of(model, frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(output_of(model, frames)).all()
    model.train()
    model.gradient_checkpointing_enable()
    out = model(frames, labels=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-4)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_hidden_states_are_filled_on_request() -> None:
    model, frames = videomae(), clips()
    before = model(frames, output_hidden_states=True).hidden_states
    rlt.patch(model, rule=Everything(), expand="fill")
    filled = model(frames, output_hidden_states=True).hidden_states
    assert len(filled) == len(before)
    for ours, theirs in zip(filled, before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    with model.rlt.override(rule=Threshold()):
        assert {state.shape for state in model(frames, output_hidden_states=True).hidden_states} == {(3, 64, 32)}
    with model.rlt.override(rule=Threshold(), expand=None):
        packed = model(frames, output_hidden_states=True).hidden_states
    assert packed[1].shape == (1, sum(model.rlt.last.num_kept), 32)


def test_vjepa2_predicts_from_the_filled_grid_and_takes_clips_of_any_length() -> None:
    model, frames = vjepa2("VJEPA2Model"), clips()
    before = model(frames)
    rlt.patch(model, rule=Everything())
    after = model(frames)
    torch.testing.assert_close(
        after.predictor_output.last_hidden_state, before.predictor_output.last_hidden_state, atol=2e-4, rtol=1e-3
    )
    with model.rlt.override(rule=Threshold()):
        assert model(frames).predictor_output.last_hidden_state.shape == before.last_hidden_state.shape
        assert model(frames[:, :4], skip_predictor=True).last_hidden_state.shape == (3, 32, 48)


def test_clips_do_not_see_each_other() -> None:
    model, frames = rlt.patch(videomae()), clips()
    together = output_of(model, frames)
    alone = torch.cat([output_of(model, clip[None]) for clip in frames])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_uint8_frames_follow_the_integer_rule() -> None:
    clip = rlt.read_clip(assets.path("traffic.mp4"), num_frames=8, size=32)
    frames = clip.frames.permute(0, 3, 1, 2)[None]
    mask = rlt.keep_mask(clip.frames[None], patch_size=PATCH)
    model = rlt.patch(videomae())
    from_bytes = output_of(model, frames)
    assert torch.equal(model.rlt.last.mask, mask)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(output_of(model, (frames.float() / 255 - mean) / std), from_bytes)
    assert float((model.rlt.last.mask == mask).float().mean()) > 0.98  # rounding at the threshold itself


def test_float_differences_are_those_of_the_integers() -> None:
    clip = rlt.read_clip(assets.path("animation.mp4"), size=64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    floats = (clip.frames.permute(0, 3, 1, 2)[None].float() / 255 - mean) / std
    ours = PatchView(floats, PatchSpec()).differences
    theirs = rlt.tokens.token_differences(clip.frames[None])
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "count"), [({"keep_ratio": 0.5}, 32), ({"max_tokens": 20}, 20), ({"keep_ratio": 1.0}, 64)]
)
def test_budgets_keep_what_differs_most(options: dict[str, Any], count: int) -> None:
    frames = clips()
    view = PatchView(frames, PatchSpec(patch_size=PATCH))
    mask = choose_rule(**options)(view, seeds=range(3))
    assert mask.flatten(1).sum(1).tolist() == [count] * 3
    assert mask[:, 0].all()
    for clip, kept in zip(view.differences, mask[:, 1:], strict=True):
        if kept.any() and not kept.all():
            assert clip[kept].min() >= clip[~kept].max()


@pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
def test_random_keeps_as_many_as_rlt(make: Callable[[], nn.Module]) -> None:
    model, frames = make(), clips()
    found = []
    for rule in (Threshold(), Random(), Random(seed=1)):
        rlt.patch(model, rule=rule)
        logits = output_of(model, frames)
        found.append(model.rlt.last)
        twin = twin_logits(rlt.unpatch(model), frames, found[-1].mask)
        torch.testing.assert_close(logits, twin, atol=2e-5, rtol=1e-4)
    assert found[0].num_kept == found[1].num_kept == found[2].num_kept == (52, 40, 28)
    assert not any(torch.equal(one.mask, other.mask) for one, other in pairwise(found))


@pytest.mark.parametrize("make", ENCODERS, ids=IDS)
def test_rules_that_a_full_grid_cannot_follow_are_refused_at_once(make: Callable[[], nn.Module]) -> None:
    """Where a first token is missing, nothing stands for its place."""
    model, frames = make(), clips()
    with pytest.raises(InvalidArgumentError, match=r"go back on the full grid, but tokens of Random\(.*another rule"):
        rlt.patch(model, rule="random")
    assert not hasattr(model, "rlt")
    rlt.patch(model)
    with pytest.raises(InvalidArgumentError, match="go back on the full grid"), model.rlt.override(rule=Random()):
        pass
    with (
        model.rlt.override(max_tokens=15),  # of a time step of 16, which shows in the call alone
        pytest.raises(InvalidArgumentError, match="a budget of at least one whole time step"),
    ):
        output_of(model, frames)
    with model.rlt.override(rule=Random(keep_first=True)):
        assert output_of(model, frames).shape == output_of(rlt.unpatch(model), frames).shape


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_clips=st.integers(1, 3))
def test_places_and_filling_agree_with_any_mask(data: st.DataObject, num_clips: int) -> None:
    time, height, width = 3, 2, 2
    bits = data.draw(st.lists(st.booleans(), min_size=num_clips * 12, max_size=num_clips * 12))
    mask = torch.tensor(bits).view(num_clips, time, height, width)
    mask[:, 0] = True
    call = Call.of(mask)
    rows = call.rows.view(mask.shape)
    expected = [(b, t, h, w) for b, t, h, w in mask.nonzero().tolist()]
    assert call.place.tolist() == [t * 4 + h * 2 + w for _, t, h, w in expected]
    for b, t, h, w in torch.ones_like(mask).nonzero().tolist():
        newest = max(step for step in range(t + 1) if mask[b, step, h, w])
        assert expected[int(rows[b, t, h, w])] == (b, newest, h, w)
    with_extra = Call.of(mask, extra=2)
    assert with_extra.segments.num_tokens == len(expected) + 2 * num_clips
    packed = [
        row for clip in range(num_clips) for row in [(clip, -2), (clip, -1)] + [x for x in expected if x[0] == clip]
    ]
    filled = [[packed[row] for row in clip] for clip in with_extra.rows.tolist()]
    assert filled == [
        [(b, -2), (b, -1)] + [expected[row] for row in rows[b].flatten().tolist()] for b in range(num_clips)
    ]


def test_the_check_engages_on_a_static_clip_and_fails_without_dropping() -> None:
    model = rlt.patch(vivit())
    model.rlt.check()
    assert model.rlt.last is None
    with (
        model.rlt.override(rule=Everything()),
        pytest.raises(InvalidArgumentError, match="no token of a static clip was dropped"),
    ):
        model.rlt.check()
    assert repr(model.rlt).startswith("ViViTAdapter(PatchOptions(rule=Threshold(threshold=0.1, reference=")


def test_a_layer_that_evades_packed_attention_is_an_error_not_a_wrong_answer() -> None:
    model = rlt.patch(vivit())
    del model.rlt.attention_modules()[0].__dict__["rlt_adapter"]
    with pytest.raises(InvalidArgumentError, match="1 of 2 layers used packed attention; transformers"):
        output_of(model, clips())


def test_options_of_override_are_held_against_the_model_too() -> None:
    model = rlt.patch(videomae(), threshold=0.3)
    with pytest.raises(InvalidArgumentError, match=r"frames_per_clip is 4; VideoMAEForVideoClassification takes clips"):
        model.rlt.override(frames_per_clip=4).__enter__()
    with pytest.raises(InvalidArgumentError, match="frames_per_clip is 4"):
        rlt.patch(model, frames_per_clip=4)
    assert model.rlt.options.rule == Threshold(0.3)  # what is refused leaves the patch that is on


def test_every_field_that_spells_out_a_rule_is_a_keyword() -> None:
    assert set(PLAIN) <= set(inspect.signature(rlt.patch).parameters)
    model = rlt.patch(videomae(), reference="anchor", exposure="gain")
    assert model.rlt.options.rule == Threshold(0.1, reference="anchor", exposure="gain")
    output_of(model, clips())
    expected = Threshold(0.1, "anchor", "gain")(PatchView(clips(), PatchSpec(patch_size=PATCH)), seeds=range(3))
    assert torch.equal(model.rlt.last.mask, expected)


def test_patching_again_replaces_the_options() -> None:
    model = rlt.patch(rlt.patch(videomae()), threshold=0.5)
    assert model.rlt.options.rule == Threshold(0.5)
    rlt.unpatch(rlt.unpatch(model))
    assert "forward" not in model.videomae.embeddings.__dict__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"rule": "tome"}, "tome is no rule"),
        ({"rule": "rtl"}, "rule is 'rtl'; allowed are .*did you mean 'rlt'"),
        ({"policy": "none"}, r"patch takes no policy= any more; give rule=rlt.Everything\(\)"),
        ({"treshold": 0.2}, "patch has no option 'treshold'; allowed are threshold, .*; did you mean 'threshold'"),
        ({"threshold": 0.2, "keep_ratio": 0.5}, "give one of them"),
        ({"keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": 9, "keep_ratio": 0.5}, "give one of them"),
        ({"expand": "zero"}, "expand is 'zero'; allowed are None and 'fill'"),
        ({"expand": "fill", "rule": Random()}, "tokens of Random.* stand for no others"),
    ],
)
def test_bad_options_leave_the_model_alone(options: dict[str, Any], message: str) -> None:
    model = videomae()
    with pytest.raises(InvalidArgumentError, match=message):
        rlt.patch(model, **options)
    assert not hasattr(model, "rlt")


def test_bad_calls_are_told_in_one_line() -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"model is a Linear of torch; rlt.patch knows VideoMAEForVideoClassification"
    ):
        rlt.patch(nn.Linear(2, 2))
    assert {"VideoMAEModel", "VivitForVideoClassification"} <= set(supported_models())
    model = rlt.patch(videomae(), max_tokens=7)
    assert output_of(model, clips()).isfinite().all()
    assert model.rlt.last.num_kept == (7, 7, 7)
    with pytest.raises(
        InvalidArgumentError, match=r"pixel_values has shape \[3, 6, 3, 32, 32\]; .* \[B, 8, 3, 32, 32\]"
    ):
        output_of(model, clips()[:, :6])
    encoder = rlt.patch(videomae("VideoMAEModel"))
    with pytest.raises(InvalidArgumentError, match="bool_masked_pos is given"):
        encoder(clips(), bool_masked_pos=torch.zeros(3, 64, dtype=torch.bool))
    dropout = rlt.patch(videomae(attention_probs_dropout_prob=0.1)).train()
    with pytest.raises(InvalidArgumentError, match=r"dropout=0\.1"):
        output_of(dropout, clips())


SHALLOW: list[Callable[[], nn.Module]] = [
    lambda: videomae(size=replace(SIZE, depth=1)),
    lambda: videomae(size=replace(SIZE, depth=1), use_mean_pooling=False),
    lambda: vivit(size=replace(SIZE, depth=1)),
    lambda: vjepa2(size=replace(SIZE, depth=1), num_pooler_layers=1),
]
"""`CLASSIFIERS` of one layer: each further one is traced again, by the same lines."""


@pytest.mark.parametrize("make", SHALLOW, ids=IDS)
def test_a_compiled_patched_model_gives_the_same(make: Callable[[], nn.Module]) -> None:
    model, frames = rlt.patch(make()), clips()
    with torch.no_grad():
        logits = output_of(model, frames)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(frames).logits, logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(compiled(frames[:1]).logits, logits[:1], atol=1e-5, rtol=1e-4)


def test_a_patched_model_trains_under_ddp(tmp_path: Path) -> None:
    model, frames = rlt.patch(videomae()), clips()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        parallel(frames, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    finally:
        torch.distributed.destroy_process_group()
    model.zero_grad()
    model(frames, labels=torch.tensor([0, 1, 2])).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, msg=name)


def test_the_trainer_of_transformers_runs_two_steps(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = rlt.patch(videomae())
    before = model.classifier.weight.detach().clone()
    data = [{"pixel_values": clip, "labels": number % 5} for number, clip in enumerate(clips(4))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=data).train()
    assert not torch.equal(model.classifier.weight, before)
    assert model.rlt.last.share_kept < 1

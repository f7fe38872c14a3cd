"""`rlt.patch` on TimeSformer with random weights, against the unpatched model and a twin that goes token by token."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import rlt
from adapted_models import SIZE, clips, output_of, spread
from rlt import Everything, Random
from rlt.adapters import tiny
from rlt.errors import InvalidArgumentError

pytest.importorskip("transformers")

FRAMES, PLACES = 8, 16


def build(kind: str = "TimesformerForVideoClassification", **more: Any) -> Any:
    return spread(tiny.build("timesformer", SIZE, kind=kind, num_labels=5, **more))


@pytest.mark.parametrize("kind", ["TimesformerForVideoClassification", "TimesformerModel"])
@torch.no_grad()
def test_nothing_dropped_gives_the_unpatched_model(kind: str) -> None:
    model, frames = build(kind), clips()
    for options in ({}, {"output_hidden_states": True}, {"return_dict": False}):
        expected = model(frames, **options)
        for expand in (None, "fill"):
            rlt.patch(model, rule=Everything(), expand=expand)
            output = model(frames, **options)
            assert model.rlt.last.share_kept == 1
            torch.testing.assert_close(output[0], expected[0], atol=1e-4, rtol=1e-4)
            if options == {"output_hidden_states": True} and (expand or kind == "TimesformerModel"):
                for found, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
                    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
            rlt.unpatch(model)


@torch.no_grad()
def twin(model: Any, frames: Tensor, mask: Tensor, lengths: dict[tuple[int, int], int]) -> Tensor:
    """The class token of one clip [T, C, h, w]; `mask` is bool [T, L], `lengths` say how often a token counts."""
    embedded = model.timesformer.embeddings(frames[None])[0]
    cls, tokens = embedded[0], embedded[1:].unflatten(0, (PLACES, FRAMES))
    state = {(t, p): tokens[p, t] for t in range(FRAMES) for p in range(PLACES) if mask[t, p]}
    newest = {(t, p): max(s for s in range(t + 1) if mask[s, p]) for t in range(FRAMES) for p in range(PLACES)}

    def attend(module: Any, query: Tensor, others: list[Tensor], counts: list[int]) -> Tensor:
        inner, heads = module.attention, module.attention.num_heads
        q = inner.qkv(query).view(3, heads, -1)[0]
        _, k, v = inner.qkv(torch.stack(others)).unflatten(1, (3, heads, -1)).unbind(1)
        weights = torch.einsum("hk,nhk->hn", q, k) * inner.scale
        weights = (weights + torch.tensor(counts).log()).softmax(-1)
        return module.output(torch.einsum("hn,nhk->hk", weights, v).flatten())

    for layer in model.timesformer.encoder.layer:
        normed = {key: layer.temporal_layernorm(x) for key, x in state.items()}
        after = {}
        for (t, p), x in state.items():
            column = [key for key in state if key[1] == p]
            counts = [lengths[key] for key in column]
            seen = attend(layer.temporal_attention, normed[t, p], [normed[key] for key in column], counts)
            after[t, p] = x + layer.temporal_dense(seen)
        normed = {key: layer.layernorm_before(x) for key, x in after.items()}
        normed_cls, classes, moved = layer.layernorm_before(cls), [], {}
        for t in range(FRAMES):
            picture = [normed_cls, *(normed[newest[t, p], p] for p in range(PLACES))]
            ones = [1] * len(picture)
            classes.append(attend(layer.attention, normed_cls, picture, ones))
            for p in range(PLACES):
                if mask[t, p]:
                    moved[t, p] = after[t, p] + attend(layer.attention, normed[t, p], picture, ones)
        cls = cls + torch.stack(classes).mean(0)
        cls = cls + layer.output(layer.intermediate(layer.layernorm_after(cls)))
        state = {k: x + layer.output(layer.intermediate(layer.layernorm_after(x))) for k, x in moved.items()}
    return model.timesformer.layernorm(cls)


@pytest.mark.parametrize("run_lengths", ["ignored", "attention"])
@torch.no_grad()
def test_equals_the_twin_token_by_token(run_lengths: str) -> None:
    model, frames = build(), clips()
    unpatched = copy.deepcopy(model)
    rlt.patch(model, run_lengths=run_lengths)
    logits = output_of(model, frames)
    assert model.rlt.last.num_kept == (100, 72, 44)
    for clip, mask, found in zip(frames, model.rlt.last.mask.flatten(2), logits, strict=True):
        lengths = {}
        for place in range(PLACES):
            kept = [t for t in range(FRAMES) if mask[t, place]]
            for t, following in zip(kept, [*kept[1:], FRAMES], strict=True):
                lengths[t, place] = following - t if run_lengths == "attention" else 1
        expected = unpatched.classifier(twin(unpatched, clip, mask, lengths))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_clip_of_repeats_where_time_has_no_position_is_exact_if_run_lengths_count() -> None:
    model, frames = build(), clips()[:, :1].expand(-1, FRAMES, -1, -1, -1)
    model.timesformer.embeddings.time_embeddings.zero_()
    expected = model(frames, output_hidden_states=True)
    rlt.patch(model, run_lengths="aware", expand="fill")
    output = model(frames, output_hidden_states=True)
    assert model.rlt.last.share_kept == 1 / FRAMES
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    for found, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_clips_do_not_touch_each_other() -> None:
    model, frames = rlt.patch(build(), run_lengths="aware"), clips()
    together = output_of(model, frames)
    alone = torch.cat([output_of(model, clip[None]) for clip in frames])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_gradients_are_those_of_the_unpatched_model_where_nothing_is_dropped() -> None:
    model, frames = build().train(), clips()
    output_of(model, frames).square().sum().backward()
    theirs = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for checkpointing in (False, True):
        model.zero_grad()
        rlt.patch(model, rule=Everything())
        if checkpointing:
            model.gradient_checkpointing_enable()
        output_of(model, frames).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-2, rtol=1e-3, msg=name)


@torch.no_grad()
def test_copied_pickled_and_unpatched() -> None:
    model, frames = build(), clips()
    before = output_of(model, frames)
    rlt.patch(model).rlt.check()
    patched = output_of(model, frames)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(other, frames), patched)
    assert torch.equal(output_of(rlt.unpatch(model), frames), before)


def test_what_cannot_be_done_is_told() -> None:
    model = rlt.patch(build())
    with pytest.raises(InvalidArgumentError, match="streams are for image models"):
        model.rlt.stream()
    with pytest.raises(InvalidArgumentError, match="output_attentions is set"):
        model(clips(), output_attentions=True)
    with pytest.raises(InvalidArgumentError, match=r"\[B, 8, 3, 32, 32\]"):
        model(clips()[:, :4])
    with pytest.raises(InvalidArgumentError, match="refresh_every is 2"):
        rlt.patch(build(), refresh_every=2)
    with pytest.raises(InvalidArgumentError, match="stand for no others"):
        rlt.patch(build(), rule=Random())
    with pytest.raises(InvalidArgumentError, match="run_lengths is 'position'"):
        rlt.patch(build(), run_lengths="position")
    with pytest.raises(InvalidArgumentError, match="attention_type of the model is 'space_only'"):
        rlt.patch(build(attention_type="space_only"))
    with pytest.raises(InvalidArgumentError, match="which a patched TimeSformer cannot do in training"):
        rlt.patch(build(attention_probs_dropout_prob=0.1)).train()(clips())

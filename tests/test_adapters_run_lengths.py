"""`rlt.patch(run_lengths=)`: closed forms against unpatched models, nothing changed where all runs are 1, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

import rlt
from adapted_models import CLASSIFIERS, ENCODERS, GRID, IDS, PATCH, TUBELET, output_of, videomae, vivit, vjepa2
from rlt import Everything, Random, Rule, Threshold, UniformFrames
from rlt.adapters import Call, PatchOptions, TimmViTAdapter, patching, tiny
from rlt.benchmark.peers.padded import naive_attention
from rlt.errors import InvalidArgumentError, MissingDependencyError
from rlt.network.run_lengths import RunLengthParts
from rlt.tokens import PatchView

transformers = pytest.importorskip("transformers")

ALL_IDS = [*IDS, *(f"{name} encoder" for name in IDS)]
every_model = pytest.mark.parametrize("make", [*CLASSIFIERS, *ENCODERS], ids=ALL_IDS)
every_classifier = pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
Make = Callable[[], nn.Module]
CLOSE = {"atol": 5e-5, "rtol": 5e-5}


@dataclass(frozen=True)
class SomeRepeats(Rule):
    """Drop exact repeats, and keep some of them all the same, drawn at random."""

    seed: int = 0
    share_kept: float = 0.3

    @override
    def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
        drawn = torch.rand(frames.shape, generator=torch.Generator().manual_seed(self.seed)) < self.share_kept
        return Threshold(0)(frames, seeds=seeds) | drawn


def repeats(seed: int = 0, num_clips: int = 3) -> Tensor:
    """Normalised floats [B, T, C, H, W] in which every patch stands still, and changes now and then."""
    time, height, width = GRID
    generator = torch.Generator().manual_seed(seed)
    changes = torch.rand(num_clips, time, height, width, generator=generator) < 0.4
    changes[:, 0] = True
    shown = torch.where(changes, torch.arange(time).view(1, time, 1, 1), 0).cummax(1).values
    pictures = torch.randn(num_clips, time, 3, height * PATCH, width * PATCH, generator=generator)
    newest = shown.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)[:, :, None].expand_as(pictures)
    return pictures.gather(1, newest).repeat_interleave(TUBELET, 1)


def timeless(model: Any) -> Any:
    """The model with the positions of the first time step at every step."""
    time, height, width = GRID
    with torch.no_grad():
        for module in model.modules():
            table = getattr(module, "position_embeddings", None)
            if isinstance(table, Tensor):  # of VideoMAE, or of ViViT behind that of the CLS token
                extra = table.shape[1] - time * height * width
                first = table[:, extra : extra + height * width].repeat(1, time, 1)
                table[:, extra:].copy_(first)
            if hasattr(module, "d_dim"):  # channels that V-JEPA 2 turns by the time step
                module.d_dim = 0
    return model


def run_lengths_of(mask: Tensor) -> Tensor:
    """int64 [kept tokens], counted step by step."""
    found = []
    for b, t, h, w in mask.nonzero().tolist():
        later = mask[b, t + 1 :, h, w].nonzero()
        found.append(int(later[0]) + 1 if len(later) else mask.shape[1] - t)
    return torch.tensor(found)


# Closed forms


@every_model
@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_without_positions_in_time_exact_repeats_give_the_dense_outputs(make: Make, seed: int) -> None:
    model, frames = timeless(make()), repeats(seed)
    dense = output_of(model, frames)
    rlt.patch(model, rule=SomeRepeats(seed), run_lengths="aware")
    torch.testing.assert_close(output_of(model, frames), dense, **CLOSE)
    assert model.rlt.last.share_kept < 0.8
    with model.rlt.override(run_lengths="ignored"):
        assert (output_of(model, frames) - dense).abs().max() > 1e-3
    with model.rlt.override(expand="fill"):
        torch.testing.assert_close(output_of(model, frames), dense, **CLOSE)


@torch.no_grad()
def test_the_predictor_of_vjepa2_has_the_dense_outputs_too() -> None:
    model, frames = timeless(vjepa2("VJEPA2Model")), repeats()
    dense = model(frames).predictor_output.last_hidden_state
    rlt.patch(model, rule=SomeRepeats(), run_lengths="aware")
    torch.testing.assert_close(model(frames).predictor_output.last_hidden_state, dense, atol=1e-3, rtol=1e-3)


@every_classifier
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_dense_model_in_the_closed_form(make: Make, checkpointing: bool) -> None:
    model, batches = timeless(make()), [repeats(0), repeats(1, num_clips=2)]

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        # Both before going back, so that layers which run anew must find the call that was theirs.
        torch.stack([output_of(model, frames).square().sum() for frames in batches]).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    expected = gradients()
    rlt.patch(model, rule=SomeRepeats(), run_lengths="aware").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    found = gradients()
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=1e-4 * largest + 1e-5, rtol=1e-3, msg=name)


# Each part


@every_model
@torch.no_grad()
def test_each_part_has_an_effect_and_all_of_them_are_aware(make: Make) -> None:
    model, frames = rlt.patch(make().double(), rule=SomeRepeats()), repeats().double()
    parts, found = model.rlt.counted.names, {}
    assert model.rlt.options.run_lengths == "ignored"
    assert len(parts) >= 2
    for text in ("ignored", *parts, "+".join(parts), "aware"):
        with model.rlt.override(run_lengths=text):
            found[text] = output_of(model, frames)
    assert torch.equal(found.pop("+".join(parts)), found["aware"])
    rows = torch.stack([outputs.flatten() for outputs in found.values()])
    assert (torch.cdist(rows, rows) + torch.eye(len(rows)) > 1e-5).all()


@every_model
@torch.no_grad()
def test_attention_written_out_by_its_formula(make: Make) -> None:
    model, frames = rlt.patch(make(), rule=SomeRepeats(), run_lengths="aware"), repeats()
    fast = output_of(model, frames)
    model.rlt.attention = naive_attention
    torch.testing.assert_close(fast, output_of(model, frames), **CLOSE)


@pytest.mark.parametrize("extra", [0, 2])
def test_a_call_knows_how_often_its_tokens_count(extra: int) -> None:
    mask = torch.rand(3, *GRID, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:, 0] = True
    runs = run_lengths_of(mask)
    call = Call.of(mask, extra, parts=RunLengthParts.of("aware"))
    rows = [torch.cat([torch.ones(extra), part]) for part in runs.split(call.num_kept)]
    assert torch.equal(call.lengths, torch.cat(rows).long())
    assert torch.equal(call.key_bias, torch.cat(rows).log())
    torch.testing.assert_close(call.pooling_weights, torch.cat([row / row.mean() for row in rows]))
    assert torch.equal(call.time, mask.nonzero()[:, 1] + (runs - 1) / 2)
    x, table = torch.randn(len(call.lengths), 5), torch.randn(64, 5)
    parts = x.split([len(row) for row in rows])
    expected = torch.stack([(row[:, None] * part).sum(0) / row.sum() for row, part in zip(rows, parts, strict=True)])
    torch.testing.assert_close(call.mean(x), expected)
    for row, place, length in zip(call.positions(table), call.place.tolist(), runs.tolist(), strict=True):
        torch.testing.assert_close(row, table[place : place + 16 * length : 16].mean(0))
    plain = Call.of(mask, extra)
    assert (plain.key_bias, plain.pooling_weights) == (None, None)
    assert torch.equal(plain.time, mask.nonzero()[:, 1])
    assert torch.equal(plain.positions(table), table[call.place])


# Nothing to count


@every_model
@pytest.mark.parametrize("rule", [Everything(), Random(), Threshold(0), UniformFrames(like=Everything())], ids=repr)
@torch.no_grad()
def test_runs_of_one_change_nothing_bit_for_bit(make: Make, rule: Rule) -> None:
    frames = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    model = make()
    if isinstance(rule, Random) and type(model).__name__.endswith("Model"):  # which fill, and refuse it
        return
    rlt.patch(model, rule=rule)
    before = output_of(model, frames)
    with model.rlt.override(run_lengths="aware"):
        assert torch.equal(output_of(model, frames), before)
    assert not any(model.rlt.call.parts)


def test_tokens_that_stand_for_themselves_alone_count_nowhere() -> None:
    mask = torch.ones(2, *GRID, dtype=torch.bool)
    mask[0, 0, 1] = False  # as a budget below the first time step leaves it: nothing stands for these
    assert not any(Call.of(mask, parts=RunLengthParts.of("aware")).parts)
    mask[1, 3, 2, 2] = False
    assert all(Call.of(mask, parts=RunLengthParts.of("aware")).parts)


# In other precisions and forms


@every_classifier
@torch.no_grad()
def test_autocast_and_half_precision(make: Make) -> None:
    model, frames = rlt.patch(make(), rule=SomeRepeats(), run_lengths="aware"), repeats()
    with model.rlt.override(run_lengths="ignored"):
        scale = float(output_of(model, frames).std())
    exact = output_of(model, frames)
    with torch.autocast("cpu", torch.bfloat16):
        assert (output_of(model, frames).float() - exact).abs().max() < 0.2 * scale
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output_of(twin, frames), exact)
        half = twin.bfloat16()
        assert (output_of(half, frames.bfloat16()).float() - exact).abs().max() < 0.4 * scale


@every_classifier
@torch.no_grad()
def test_clips_together_are_clips_one_by_one(make: Make) -> None:
    model, frames = rlt.patch(make(), threshold=0, run_lengths="aware"), repeats()
    alone = torch.cat([output_of(model, clip[None]) for clip in frames])
    torch.testing.assert_close(output_of(model, frames), alone, atol=1e-5, rtol=1e-4)


# What is refused, and the default


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (videomae, "awere", r"run_lengths is 'awere'; allowed are aware, ignored, .*did you mean 'aware'"),
        (videomae, "pooling+atention", r"did you mean 'attention'"),
        (lambda: videomae(use_mean_pooling=False), "pooling", r"counts them in attention and position; allowed are"),
        (lambda: videomae("VideoMAEModel"), "pooling+attention", r"is 'pooling\+attention', but VideoMAEModel counts"),
        (
            vivit,
            "pooling",
            r"VivitForVideoClassification counts them in attention and position; .* attention, position",
        ),
    ],
)
def test_parts_that_a_model_does_not_have_are_one_line(make: Any, text: str, message: str) -> None:
    model = make()
    with pytest.raises(InvalidArgumentError, match=message):
        rlt.patch(model, run_lengths=text)
    assert not hasattr(model, "rlt")
    rlt.patch(model, threshold=0.3)
    for change in (lambda: rlt.patch(model, run_lengths=text), model.rlt.override(run_lengths=text).__enter__):
        with pytest.raises(InvalidArgumentError, match=message):
            change()
    assert model.rlt.options.rule == Threshold(0.3)


@pytest.mark.parametrize("family", ["timm", "qwen2", "qwen2.5", "qwen3"])
def test_models_whose_tokens_count_once_say_so(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = tiny.Size(num_frames=4, image_size=32, patch_size=8)
    try:
        model = tiny.build(family, size)
        rlt.patch(model, run_lengths="ignored")
    except (MissingDependencyError, AttributeError) as error:
        pytest.skip(str(error))
    for text in ("aware", "attention"):
        with pytest.raises(InvalidArgumentError, match=r"counts them in no part \(.* once\); allowed are ignored$"):
            rlt.patch(model, run_lengths=text)
    monkeypatch.setattr(patching, "DEFAULT_RUN_LENGTHS", "aware")
    assert rlt.patch(model).rlt.options.run_lengths == "ignored"


def test_image_models_refuse_without_their_library() -> None:
    adapter = object.__new__(TimmViTAdapter)
    adapter.model = nn.Identity()
    assert adapter.settle(PatchOptions()).run_lengths == "ignored"
    with pytest.raises(
        InvalidArgumentError, match=r"in no part \(a frame sees a whole picture, .* once\); allowed are"
    ):
        adapter.settle(PatchOptions(run_lengths="aware"))
    with pytest.raises(InvalidArgumentError, match=r"frames see a whole picture, but tokens of Random"):
        adapter.settle(PatchOptions(rule=Random()))


def test_one_constant_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rlt.patch(videomae()).rlt.options.run_lengths == "ignored"
    monkeypatch.setattr(patching, "DEFAULT_RUN_LENGTHS", "aware")
    model = rlt.patch(videomae())
    assert model.rlt.options.run_lengths == "aware"
    with model.rlt.override(threshold=0.2, run_lengths="pooling"):
        assert model.rlt.options.parts == RunLengthParts(True, False, False)

"""Run lengths in pooling, attention and positions: closed forms, naive twins, and nothing changed where all are 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
import rlt
from models import tiny_model, video
from rlt.errors import InvalidArgumentError
from rlt.export import export_network, network_inputs
from rlt.network import backends
from rlt.network.attention import packed_attention, packed_cross_attention
from rlt.network.backends import Backend, available_backends, with_bias_channels
from rlt.network.positions import mean_over_runs
from rlt.network.run_lengths import RunLengthParts, key_bias, pooling_weights
from rlt.structures import PackedTokens, Segments
from rlt.tokens.tokenize import select_tokens

SPEC = rlt.PatchSpec(patch_size=8)
SINGLE_PARTS = ("pooling", "attention", "position")


def timeless(model: rlt.VisionTransformer) -> rlt.VisionTransformer:
    """The model with the positions of the first time step at every step."""
    table = model.positions.table
    steps = model.config.num_frames // model.config.tubelet_size
    model.positions.table = table[: len(table) // steps].repeat(steps, 1)
    return model


def still(seed: int, frames: int = 4) -> Tensor:
    """uint8 [T, H, W, 3] of one frame over and over."""
    return video(seed, 1).expand(frames, -1, -1, -1).contiguous()


def dropped(frames: Tensor, seed: int) -> PackedTokens:
    """Tokens of which some that repeat, drawn at random, were dropped."""
    everything = rlt.tokenize(frames, rule="none", spec=SPEC)
    repeats = ~rlt.keep_mask(frames[None], threshold=0, spec=SPEC)[0]
    drawn = torch.rand(everything.grid, generator=torch.Generator().manual_seed(seed)) < 0.7
    return rlt.pack(select_tokens(frames[None], ~(repeats & drawn)[None], spec=SPEC))


def dense(frames: Tensor) -> PackedTokens:
    return rlt.pack(rlt.tokenize(frames, rule="none", spec=SPEC))


# Closed forms


@pytest.mark.parametrize("make", [still, video])
@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_without_positions_in_time_exact_repeats_give_the_dense_logits(make: object, seed: int) -> None:
    model = timeless(tiny_model(run_lengths="aware"))
    frames = make(seed)  # type: ignore[operator]
    packed = dropped(frames, seed)
    assert packed.share_kept < 0.9
    expected = model(dense(frames))
    torch.testing.assert_close(model(packed), expected, atol=2e-5, rtol=2e-5)
    model.run_lengths = "ignored"
    if make is video:  # where all repeats look alike a plain mean over them is right as well
        assert not torch.allclose(model(packed), expected, atol=1e-3)


@torch.no_grad()
def test_clips_of_several_sizes_and_lengths_together() -> None:
    model = timeless(tiny_model(run_lengths="aware"))
    clips = [video(1), video(2, height=16), video(3)]
    together = rlt.pack([clip for frames in clips for clip in dropped(frames, 5)])
    alone = torch.cat([model(dropped(frames, 5)) for frames in clips])
    torch.testing.assert_close(model(together), alone, atol=1e-5, rtol=1e-5)
    assert together.step.tolist() == [8 if n == 1 else 16 for n in range(3) for _ in together.unpack()[n].lengths]


@pytest.mark.parametrize("text", ["aware", *SINGLE_PARTS, "pooling+position"])
@pytest.mark.parametrize("rule", [rlt.Everything(), rlt.Random()])
@torch.no_grad()
def test_lengths_of_one_change_nothing_bit_for_bit(text: str, rule: rlt.Rule) -> None:
    model, frames = tiny_model(run_lengths="ignored"), torch.stack([video(1), video(2)])
    packed = rlt.pack(rlt.tokenize(frames, rule=rule, spec=SPEC))
    before = model(packed)
    model.run_lengths = text
    assert torch.equal(model(packed), before)


@torch.no_grad()
def test_each_part_changes_something_and_all_of_them_are_aware() -> None:
    model, packed = tiny_model(), dropped(video(3), 0)
    logits = {}
    for text in ("ignored", *SINGLE_PARTS, "pooling+attention", "pooling+attention+position", "aware"):
        model.run_lengths = text
        logits[text] = model(packed)
    assert torch.equal(logits.pop("pooling+attention+position"), logits["aware"])
    rows = torch.cat(list(logits.values()))
    assert (torch.cdist(rows, rows) + torch.eye(len(rows)) > 1e-3).all()


# Each part against a plain twin


def plain_embedding(packed: PackedTokens) -> Tensor:
    model = tiny_model(run_lengths="ignored")
    return model.embed(packed) - model.positions(packed.place)


@torch.no_grad()
def test_a_token_has_the_mean_of_the_positions_over_its_run() -> None:
    model, packed = tiny_model(run_lengths="position"), dropped(video(4), 1)
    plain = plain_embedding(packed)
    found = model.embed(packed) - plain
    for row, (t, h, w), length in zip(found, packed.coords.tolist(), packed.lengths.tolist(), strict=True):
        places = [(later * 4 + h) * 4 + w for later in range(t, t + length)]
        torch.testing.assert_close(row, model.positions.table[places].mean(0), atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=4))
def test_pooling_weights_are_shares_of_each_clip(lengths: list[list[int]]) -> None:
    segments = Segments.from_lengths([len(clip) for clip in lengths])
    weights = pooling_weights(torch.tensor([n for clip in lengths for n in clip]), segments)
    expected = torch.tensor([n * len(clip) / sum(clip) for clip in lengths for n in clip])
    torch.testing.assert_close(weights, expected)
    assert all(torch.equal(w, torch.ones_like(w)) for w, c in zip(weights.split(segments.lengths), lengths, strict=True)
               if len(set(c)) == 1)  # fmt: skip


def test_positions_of_runs_of_one_are_rows_of_the_table() -> None:
    table, place = torch.randn(24, 5), torch.tensor([3, 9, 23])
    assert torch.equal(mean_over_runs(table, place, torch.ones_like(place), 8, longest=3), table[place])


def biased_twin(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], counts: Tensor) -> Tensor:
    """Keys that stand for n tokens, written n times; runs are counted in whole numbers."""
    outputs = []
    for parts in zip(*(x.split(lengths) for x in (q, k, v, counts)), strict=True):
        q_n, k_n, v_n, counts_n = parts
        repeated = k_n.repeat_interleave(counts_n, dim=0), v_n.repeat_interleave(counts_n, dim=0)
        scores = torch.einsum("qhd,khd->hqk", q_n, repeated[0]) / q.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), repeated[1]))
    return torch.cat(outputs)


MIXED = [(5,), (1, 7, 3), (130, 1, 64)]
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def check_bias(backend: Backend, lengths: tuple[int, ...], dtype: torch.dtype, device: str, width: int = 16) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    values = [torch.randn(sum(lengths), 3, width, generator=generator) for _ in range(3)]
    counts = torch.randint(1, 9, (sum(lengths),), generator=generator)
    ours = [x.to(device, dtype).requires_grad_() for x in values]
    theirs = [x.detach().cpu().double().requires_grad_() for x in ours]
    segments = Segments.from_lengths(lengths, device=device)
    found = packed_attention(*ours, segments, backend=backend, key_bias_T=key_bias(counts.to(device)))
    expected = biased_twin(*theirs, lengths, counts)
    tolerance = TOLERANCES[dtype]
    assert (found.dtype, found.shape) == (dtype, expected.shape)
    torch.testing.assert_close(found.double().cpu(), expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn(expected.shape, generator=generator)
    (found.float() * weight.to(device)).sum().backward()
    (expected * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double().cpu(), y.grad, atol=3 * tolerance, rtol=3 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", MIXED)
@pytest.mark.parametrize("backend", available_backends("cpu", torch.float32))
def test_a_bias_of_keys_is_a_key_that_stands_several_times(
    backend: Backend, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    check_bias(backend, lengths, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", MIXED)
@pytest.mark.parametrize("backend", get_args(Backend))
def test_a_bias_of_keys_on_a_gpu(backend: Backend, lengths: tuple[int, ...], dtype: torch.dtype, width: int) -> None:
    if backend not in available_backends("cuda", dtype):
        pytest.skip(f"{backend} is not there for {dtype}")
    check_bias(backend, lengths, dtype, "cuda", width)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("width", [4, 6, 16, 64, 80])
def test_two_channels_carry_the_bias_in_any_precision(width: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(9, 2, width, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3))
    bias = key_bias(torch.arange(1, 10))
    wide_q, wide_k, wide_v, scale = with_bias_channels(q, k, v, bias)
    assert wide_q.shape == wide_k.shape == wide_v.shape
    assert wide_q.shape[-1] % 8 == 0
    assert wide_q.dtype == wide_k.dtype == wide_v.dtype == dtype
    plain = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * width**-0.5
    biased = torch.einsum("qhd,khd->hqk", wide_q.double(), wide_k.double()) * scale
    limit = {torch.float16: 2e-6, torch.bfloat16: 1e-4}.get(dtype, 1e-6)  # one channel alone: 8e-3 in bfloat16
    torch.testing.assert_close(biased - plain, bias.double().expand_as(plain), atol=limit, rtol=0)
    assert not wide_v[..., width:].any()


@pytest.mark.parametrize("backend", ["flash_attn", "xformers", "nested"])
def test_back_ends_without_a_bias_get_the_channels(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, segments: Segments, *, scale: float) -> Tensor:
        assert q.shape[-1] == 24
        return oracles.padded_attention(q * scale * q.shape[-1] ** 0.5, k, v, segments.lengths)

    way = backends._WAYS[backend]._replace(run=run, hindrance=lambda *_: None)
    monkeypatch.setitem(backends._WAYS, backend, way)
    check_bias(backend, (4, 1, 6), torch.float32, "cpu")


def test_flex_adds_the_bias_to_the_score() -> None:
    q, k, v = (torch.randn(11, 3, 16) for _ in range(3))
    counts = torch.randint(1, 9, (11,))
    found = backends._flex(q, k, v, Segments.from_lengths((4, 1, 6)), key_bias_T=key_bias(counts))
    torch.testing.assert_close(found, biased_twin(q, k, v, (4, 1, 6), counts), atol=1e-5, rtol=1e-5)


def test_cross_attention_takes_a_bias_of_its_keys() -> None:
    q, k, v = torch.randn(2, 3, 16), torch.randn(11, 3, 16), torch.randn(11, 3, 16)
    counts = torch.randint(1, 9, (11,))
    segments = Segments.from_lengths((1, 1)), Segments.from_lengths((4, 7))
    found = packed_cross_attention(q, k, v, *segments, key_bias_S=key_bias(counts))
    expected = [
        biased_twin(q[n].expand(len(rows), -1, -1), k[rows], v[rows], (len(rows),), counts[rows])[:1]
        for n, rows in enumerate(torch.arange(11).split((4, 7)))
    ]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)


# The network in other forms


@torch.no_grad()
def test_merging_begins_with_the_run_lengths() -> None:
    model, packed = tiny_model(run_lengths="aware"), dropped(video(6), 2)
    plain = model(packed)
    model.merge_per_block = 1
    merged = model.forward_merged(packed)
    assert merged.sizes is not None
    assert merged.sizes.sum() == packed.num_dense > packed.num_tokens
    still_frames = dense(still(7))  # tokens that merge are alike: nothing is lost
    timeless_model = timeless(model)
    merging = timeless_model(dropped(still(7), 3))
    timeless_model.merge_per_block = 0
    torch.testing.assert_close(merging, timeless_model(still_frames), atol=0.3, rtol=0.3)
    assert not torch.equal(model(packed), plain)


@pytest.mark.parametrize("text", ["aware", "attention"])
def test_gradients_autocast_and_compiled_graphs(text: str) -> None:
    packed = rlt.pack([clip for seed in range(3) for clip in dropped(video(seed), seed)])
    torch.compiler.reset()
    gradients = []
    for compiled in (False, True):
        model = tiny_model(run_lengths=text).train()
        if compiled:
            model.compile_network(backend="aot_eager")
        model(packed).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3)
    model = tiny_model(run_lengths=text)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(packed).float(), tiny_model(run_lengths=text)(packed).float())
    with torch.no_grad():
        half = model(packed)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(packed).float(), half, atol=0.15, rtol=0.15)


@pytest.mark.parametrize("text", ["aware", "ignored"])
def test_an_exported_program_counts_run_lengths(text: str) -> None:
    torch.compiler.reset()
    model = tiny_model(run_lengths=text)
    packs = [dropped(video(0), 0), rlt.pack([clip for seed in range(3) for clip in dropped(video(seed), seed + 1)])]
    network = export_network(model, packs[0]).module()
    with torch.no_grad():
        for packed in [*packs, dense(video(3))]:
            torch.testing.assert_close(network(*network_inputs(packed)), model(packed), atol=2e-5, rtol=1e-4)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    packed, gradients = dropped(video(5), 1), []
    for checkpointing in (False, True):
        model = tiny_model(run_lengths="aware").train()
        model.activation_checkpointing = checkpointing
        model(packed).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


# The word, and where it is kept


@pytest.mark.parametrize("text", ["aware", "ignored", *SINGLE_PARTS, "pooling+attention", "attention+position"])
def test_text_and_parts_are_inverses(text: str) -> None:
    assert str(RunLengthParts.of(text)) == text
    assert str(RunLengthParts.of("position+pooling")) == "pooling+position"


@pytest.mark.parametrize(
    ("text", "hint"),
    [("awere", "; did you mean 'aware'"), ("pooling+atention", "; did you mean 'attention'"), ("", "")],
)
def test_other_words_are_one_line(text: str, hint: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"run_lengths is '.*'; allowed are aware, ignored, .*{hint}"):
        tiny_model().run_lengths = text
    with pytest.raises(InvalidArgumentError, match="run_lengths is"):
        rlt.ViTConfig(run_lengths=text)


def test_it_is_saved_with_the_weights(tmp_path: Path) -> None:
    model = tiny_model()
    assert model.run_lengths == "aware"
    model.run_lengths = "pooling"
    model.save_pretrained(tmp_path)
    assert rlt.VisionTransformer.from_pretrained(tmp_path).run_lengths == "pooling"
    config = json.loads((tmp_path / "config.json").read_text())
    del config["run_lengths"]  # written before there was a choice
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert rlt.VisionTransformer.from_pretrained(tmp_path).run_lengths == "ignored"


def test_named_models_take_it() -> None:
    assert rlt.create_model("vit_tiny", run_lengths="ignored").run_lengths == "ignored"
    assert rlt.create_model("vit_tiny").run_lengths == "aware"
    with pytest.raises(InvalidArgumentError, match="run_lengths is 'x'"):
        rlt.create_model("vit_tiny", run_lengths="x")

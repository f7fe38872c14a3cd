"""Token merging against a slow twin written token by token, and what merging must never change."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlt
from models import TINY, tiny_model, video
from rlt.checkpoints.models import MODELS
from rlt.errors import InvalidArgumentError
from rlt.network.blocks import mean_per_clip
from rlt.network.flops import count_forward_flops, forward_flops, merge_for_flops
from rlt.network.tome import MergedTokens, match_tokens, merge_tokens
from rlt.structures import PackedTokens, Segments


def paper_model(**changes: object) -> rlt.VisionTransformer:
    """Run lengths count nowhere: only what was merged has a size."""
    return tiny_model(run_lengths="ignored", **changes)


def merging_model(merge_per_block: int, **changes: object) -> rlt.VisionTransformer:
    model = paper_model(**changes)
    model.merge_per_block = merge_per_block
    return model


def packed_clips() -> PackedTokens:
    """Clips of 32, 24, 20, and 1 token."""
    clips = [
        rlt.tokenize(video(1), patch_size=8, rule="none"),
        rlt.tokenize(video(2), patch_size=8),
        rlt.tokenize(video(3, frames=8, height=16, width=40), patch_size=8),
        rlt.tokenize(video(4, frames=2, height=8, width=8), patch_size=8),
    ]
    return rlt.pack(clips)


def slow_merge(
    features: np.ndarray, metric: np.ndarray, groups: list[list[int]], count: int
) -> tuple[np.ndarray, list[list[int]]]:
    """One clip, token by token. `groups` lists the input tokens that each token stands for."""
    partners = []
    for a in range(0, len(features), 2):
        similarity = [
            (float(metric[a] @ metric[b]) / (np.linalg.norm(metric[a]) * np.linalg.norm(metric[b])), b)
            for b in range(1, len(features), 2)
        ]
        if similarity:
            partners.append((*max(similarity), a))
    partners.sort(reverse=True)
    members: dict[int, list[int]] = {row: [row] for row in range(len(features))}
    for _, b, a in partners[:count]:
        members[b] += members.pop(a)
    merged, new_groups = [], []
    for row in sorted(members):
        sizes = [len(groups[old]) for old in members[row]]
        merged.append(sum(size * features[old] for size, old in zip(sizes, members[row], strict=True)) / sum(sizes))
        new_groups.append(sorted(token for old in members[row] for token in groups[old]))
    return np.stack(merged), new_groups


def slow_features(model: rlt.VisionTransformer, clip: rlt.RunLengthTokens, merges: int) -> tuple[np.ndarray, list[int]]:
    """Features of one clip in float64 by the formulas, and the size of each token that is left."""
    seen: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.forward_tokens(rlt.pack(clip))
    handle.remove()
    x = seen[0].detach().double().numpy()
    groups = [[token] for token in range(len(x))]

    def linear(values: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
        return values @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()

    def norm(values: np.ndarray, layer: torch.nn.LayerNorm) -> np.ndarray:
        centred = values - values.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps)
        return scaled * layer.weight.detach().double().numpy() + layer.bias.detach().double().numpy()

    for block in model.blocks:
        attention, heads = block.attn, model.config.num_heads
        weight = attention.qkv.weight.detach().double().numpy()
        biases = (attention.q_bias.detach().double().numpy(), 0.0, attention.v_bias.detach().double().numpy())
        normed = norm(x, block.norm1)
        q, k, v = (
            (normed @ part.T + bias).reshape(len(x), heads, -1)
            for part, bias in zip(np.split(weight, 3), biases, strict=True)
        )
        mixed = np.zeros_like(q)
        for head in range(heads):
            for token in range(len(x)):
                logits = [
                    float(q[token, head] @ k[other, head]) / math.sqrt(q.shape[-1]) + math.log(len(groups[other]))
                    for other in range(len(x))
                ]
                weights = np.exp(np.array(logits) - max(logits))
                mixed[token, head] = (weights / weights.sum()) @ v[:, head]
        x = x + linear(mixed.reshape(len(x), -1), attention.proj)
        x, groups = slow_merge(x, k.mean(1), groups, min(merges, len(x) // 2))
        hidden = linear(norm(x, block.norm2), block.mlp.fc1)
        gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        x = x + linear(gelu, block.mlp.fc2)
    sizes = [len(group) for group in groups]
    return norm(np.average(x, axis=0, weights=sizes), model.fc_norm), sizes


@pytest.mark.parametrize("merges", [1, 5, 100])
def test_the_network_equals_its_slow_twin(merges: int) -> None:
    model, packed = paper_model(), packed_clips()
    merging = merging_model(merges)
    features, merged = merging.forward_features(packed), merging.forward_merged(packed)
    for clip, ours, sizes in zip(packed, features, merged.sizes.split(merged.segments.lengths), strict=True):
        expected, expected_sizes = slow_features(model, clip, merges)
        assert sizes.tolist() == expected_sizes
        torch.testing.assert_close(ours.double(), torch.from_numpy(expected), atol=2e-4, rtol=2e-4)


def test_clips_of_one_length_are_worked_on_together_with_the_same_result() -> None:
    merging = merging_model(6)
    clips = [rlt.tokenize(video(seed), patch_size=8, rule="none") for seed in range(3)]
    alone = torch.cat([merging(rlt.pack(clip)) for clip in clips])
    torch.testing.assert_close(merging(rlt.pack(clips)), alone, atol=1e-5, rtol=1e-5)
    mixed = [*clips, rlt.tokenize(video(7), patch_size=8)]
    torch.testing.assert_close(merging(rlt.pack(mixed))[:3], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merging(rlt.pack(mixed[::-1])).flip(0)[:3], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length_encoding", ["none", "learned"])
def test_merging_nothing_is_the_plain_model_bit_for_bit(length_encoding: str) -> None:
    model, packed = paper_model(length_encoding=length_encoding), packed_clips()
    one = rlt.pack(packed.unpack()[-1])  # a single token has no partner
    expected, tokens, expected_one = model(packed), model.forward_tokens(packed), model(one)
    model.merge_per_block = 8
    assert not torch.allclose(model(packed)[0], expected[0], atol=1e-3)
    assert torch.equal(model(one), expected_one)
    assert torch.equal(merging_model(8, length_encoding=length_encoding)(packed), model(packed))
    model.merge_per_block = 0
    assert torch.equal(model(packed), expected)
    assert torch.equal(model.forward_tokens(packed), tokens)
    assert model.forward_merged(packed).sizes is None


def test_a_copy_merges_by_itself() -> None:
    model, packed = paper_model(), packed_clips()
    merging = copy.copy(model)
    merging.merge_per_block = 4
    assert model.merge_per_block == 0
    assert torch.equal(merging(packed), merging_model(4)(packed))
    assert all(ours is theirs for ours, theirs in zip(merging.parameters(), model.parameters(), strict=True))
    assert merging.state_dict().keys() == model.state_dict().keys()


def test_a_merged_pair_by_hand() -> None:
    metric = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.3], [2.0, 0.1], [0.0, -1.0]])
    matching = match_tokens(metric[None], 2)
    assert [rows.tolist() for rows in matching] == [[[2, 0]], [[3, 3]], [[1, 3, 4]]]
    values = torch.tensor([[6.0], [1.0], [0.0], [3.0], [2.0]])
    sizes = torch.tensor([1.0, 1.0, 4.0, 1.0, 2.0])
    tokens = MergedTokens(values, Segments.from_lengths([5]), sizes, torch.arange(5))
    merged = merge_tokens(tokens, metric, 2)
    assert merged.features.flatten().tolist() == [1.0, pytest.approx((6 + 0 + 3) / 6), 2.0]
    assert merged.sizes.tolist() == [1.0, 6.0, 2.0]
    assert merged.owner.tolist() == [1, 0, 1, 1, 2]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    merges=st.integers(0, 8),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_sizes_owners_and_means_conserve_every_token(lengths: list[int], merges: int, rounds: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(sum(lengths), 3, generator=generator)
    tokens = MergedTokens(features, Segments.from_lengths(lengths), None, torch.arange(sum(lengths)))
    expected = list(lengths)
    for _ in range(rounds):
        tokens = merge_tokens(tokens, torch.randn(len(tokens.features), 5, generator=generator), merges)
        expected = [length - min(merges, length // 2) for length in expected]
    assert list(tokens.segments.lengths) == expected
    sizes = torch.ones(sum(expected)) if tokens.sizes is None else tokens.sizes
    assert torch.equal(torch.bincount(tokens.owner, minlength=sum(expected)).float(), sizes)
    owners_per_clip = zip(tokens.owner.split(lengths), tokens.segments.cu_seqlens.unfold(0, 2, 1), strict=True)
    assert all(bool(((begin <= owner) & (owner < end)).all()) for owner, (begin, end) in owners_per_clip)
    means = torch.zeros(sum(expected), 3).index_add(0, tokens.owner, features) / sizes[:, None]
    torch.testing.assert_close(tokens.features, means, atol=1e-5, rtol=1e-5)


def test_features_are_the_mean_of_the_tokens_put_back() -> None:
    model, packed = paper_model(), packed_clips()
    merging = merging_model(7)
    tokens = merging.forward_tokens(packed)
    assert tokens.shape == model.forward_tokens(packed).shape
    mean = model.fc_norm(mean_per_clip(tokens, packed.segments))
    torch.testing.assert_close(merging.forward_features(packed), mean, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merging(packed)[0], model(packed)[0], atol=1e-3)  # it engaged


def test_equal_tokens_merge_without_changing_anything() -> None:
    """Proportional attention makes one token of size s act as s equal tokens."""
    model = paper_model()
    packed = rlt.pack(rlt.tokenize(torch.full((4, 32, 32, 3), 90, dtype=torch.uint8), patch_size=8, rule="none"))
    packed.coords[:] = 0  # one place for all, so that all tokens are equal
    torch.testing.assert_close(merging_model(9)(packed), model(packed), atol=1e-5, rtol=1e-5)


def test_order_within_the_sets_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    features, metric = torch.randn(10, 4, generator=generator), torch.randn(10, 5, generator=generator)
    # Tokens of A change places among themselves, and so do those of B.
    order = torch.stack([torch.randperm(5, generator=generator) * 2, torch.randperm(5, generator=generator) * 2 + 1], 1)
    plain = MergedTokens(features, Segments.from_lengths([10]), None, torch.arange(10))
    moved = MergedTokens(features[order.flatten()], Segments.from_lengths([10]), None, torch.arange(10))
    expected = merge_tokens(plain, metric, 3).features
    found = merge_tokens(moved, metric[order.flatten()], 3).features
    for rows in (expected, found):
        assert len(rows) == 7
    torch.testing.assert_close(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_weight(checkpointing: bool) -> None:
    model, packed = merging_model(4).train(), packed_clips()
    model.activation_checkpointing = checkpointing
    model(packed).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients.values())
    # Central difference along the gradient of the first MLP, where the choice of pairs does not change.
    weight = model.blocks[0].mlp.fc1.weight
    step = 1e-3 * weight.grad / weight.grad.norm()
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step
            values.append(float(model(packed).double().square().sum()))
        weight += step
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(float(weight.grad.norm()), rel=0.02)


def test_drop_path_drops_branches_while_training_only() -> None:
    model, packed = merging_model(4), packed_clips()
    expected = model(packed)
    model.set_drop_path(0.5)
    assert torch.equal(model(packed), expected)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(packed), expected)


@pytest.mark.parametrize("merges", [0, 3, 1000])
def test_counted_flops_equal_the_closed_form(merges: int) -> None:
    packed = packed_clips()
    closed = sum(forward_flops(TINY, length, merges) for length in packed.segments.lengths)
    assert count_forward_flops(TINY, packed, merges) == closed
    if merges == 0:
        assert count_forward_flops(TINY, packed) == closed


def test_merging_matches_a_budget() -> None:
    config = MODELS["vit_base"]
    dense = forward_flops(config, 1568)
    merges = merge_for_flops(config, [1568] * 3, 0.65 * 3 * dense)
    assert forward_flops(config, 1568, merges) / dense == pytest.approx(0.65, abs=0.004)
    assert merge_for_flops(config, [1568], dense) == merge_for_flops(config, [1568], 2.0 * dense) == 0
    with pytest.raises(InvalidArgumentError, match=r"target of 1 FLOPs is below .* give a larger target"):
        merge_for_flops(config, [1568], 1)
    with pytest.raises(InvalidArgumentError, match="no clips"):
        merge_for_flops(config, [], 1e9)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="merge_per_block is -1; at least 0 is needed"):
        merging_model(-1)
    with pytest.raises(InvalidArgumentError, match="patch_size=16; the model needs"):
        merging_model(1)(rlt.pack(rlt.tokenize(video(8))))


def test_half_precision_stays_near() -> None:
    packed = packed_clips()
    expected = merging_model(2)(packed)
    with torch.autocast("cpu", torch.bfloat16):
        found = merging_model(2)(packed)
    assert torch.nn.functional.cosine_similarity(found.float(), expected).min() > 0.97


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    model, packed = merging_model(4), packed_clips()
    expected = model(packed)
    found = model.cuda()(packed.to("cuda"))
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        assert model(packed.to("cuda")).isfinite().all()

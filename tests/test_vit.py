"""The packed network against a plain dense batch, and what packing must never change."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rlt
from models import TINY, tiny_model, video
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.network import vit
from rlt.network.embedding import PatchEmbedding
from rlt.network.positions import SinusoidPositions, sinusoid_table
from rlt.network.vit import VisionTransformer
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD


def dense_twin(model: VisionTransformer, frames_BTHWC: Tensor) -> Tensor:
    """The same network on a plain dense batch: normalise, Conv3d, batch attention from the formula, mean."""
    config = model.config
    x = frames_BTHWC.double() / 255
    x = ((x - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).permute(0, 4, 1, 2, 3)
    tubelet, patch = config.tubelet_size, config.patch_size
    kernel = model.patch_embed.weight.unflatten(1, (tubelet, patch, patch, 3)).permute(0, 4, 1, 2, 3)
    x = F.conv3d(x, kernel.double(), model.patch_embed.bias.double(), stride=(tubelet, patch, patch))
    x = x.flatten(2).transpose(1, 2)
    x = x + sinusoid_table(x.shape[1], config.width).double()
    for block in copy.deepcopy(model.blocks).double():
        h = block.norm1(x)
        bias = torch.cat([block.attn.q_bias, torch.zeros_like(block.attn.q_bias), block.attn.v_bias])
        q, k, v = F.linear(h, block.attn.qkv.weight, bias).unflatten(2, (3, config.num_heads, -1)).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / (config.width // config.num_heads) ** 0.5
        x = x + block.attn.proj(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2))
        x = x + block.mlp(block.norm2(x))
    return F.linear(
        copy.deepcopy(model.fc_norm).double()(x.mean(1)), model.head.weight.double(), model.head.bias.double()
    )


def test_nothing_dropped_equals_the_dense_batch_with_gradients() -> None:
    model, twin = tiny_model(), tiny_model()
    frames = torch.stack([video(1), video(2)])
    logits = model(rlt.pack(rlt.tokenize(frames, rule="none", patch_size=8)))
    expected = dense_twin(twin, frames)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits.double(), expected, atol=1e-4, rtol=1e-4)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, ours), theirs in zip(model.patch_embed.named_parameters(), twin.patch_embed.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("tokens_at_once", [1, 40, 70])
def test_large_packs_run_in_pieces_and_give_the_same_logits(
    monkeypatch: pytest.MonkeyPatch, tokens_at_once: int
) -> None:
    model = tiny_model().double()
    clips = [rlt.tokenize(video(seed), patch_size=8) for seed in range(4)]
    whole = model(rlt.pack(clips))
    monkeypatch.setattr(vit, "_TOKENS_AT_ONCE_ON_CPU", tokens_at_once)
    assert len(rlt.pack(clips).chunks(tokens_at_once)) > 1
    torch.testing.assert_close(model(rlt.pack(clips)), whole)


def test_logits_do_not_depend_on_what_a_clip_is_packed_with() -> None:
    model = tiny_model()
    clips = [rlt.tokenize(video(seed), patch_size=8) for seed in range(3)]
    clips.append(rlt.tokenize(video(3, frames=8, height=24, width=40), patch_size=8))  # another grid
    clips.append(rlt.tokenize(video(4, frames=2, height=8, width=8), patch_size=8))  # one token
    assert len(clips[-1]) == 1
    alone = torch.cat([model(rlt.pack(clip)) for clip in clips])
    together = model(rlt.pack(clips))
    backwards = model(rlt.pack(clips[::-1])).flip(0)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backwards, alone, atol=1e-5, rtol=1e-5)


def test_dropping_tokens_engages_and_moves_no_other_token() -> None:
    model = tiny_model()
    dropped, everything = (rlt.tokenize(video(5), rule=policy, patch_size=8) for policy in ("rlt", "none"))
    assert len(dropped) == 24
    assert len(everything) == 32
    assert not torch.allclose(model(rlt.pack(dropped)), model(rlt.pack(everything)))
    place = rlt.pack(everything).place.view(dropped.grid)[dropped.mask()]
    assert torch.equal(rlt.pack(dropped).place, place)
    assert dropped.expand(model.forward_tokens(rlt.pack(dropped))).shape == (2, 4, 4, 32)


def test_folded_normalisation_equals_normalising() -> None:
    torch.manual_seed(0)
    embedding = PatchEmbedding(16, rlt.PatchSpec(patch_size=8))
    patches = torch.randint(0, 256, (50, 2 * 8 * 8 * 3), dtype=torch.uint8)
    normal = (
        (patches.view(50, -1, 3).double() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    ).float()
    expected = F.linear(normal.flatten(1).double(), embedding.weight.double(), embedding.bias.double())
    torch.testing.assert_close(embedding(patches).double(), expected, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(embedding(normal.flatten(1)).double(), expected, atol=3e-6, rtol=1e-5)
    half = copy.deepcopy(embedding).bfloat16()
    folded_error = (half(patches).double() - expected).abs().mean()
    plain_error = (half(normal.flatten(1)).double() - expected).abs().mean()
    assert folded_error < 1.5 * plain_error  # folding costs no precision in bfloat16


def test_positions_follow_the_formula_and_grow() -> None:
    positions = SinusoidPositions(6, num_positions=4)
    place = torch.tensor([0, 3, 9])
    expected = [
        [f(p / 10000 ** (2 * (j // 2) / 6)) for j, f in enumerate([torch.sin, torch.cos] * 3)] for p in place.double()
    ]
    positions.grow(10)
    torch.testing.assert_close(positions(place), torch.tensor(expected, dtype=torch.float32))
    assert "table" not in positions.state_dict()


def test_length_encoding_speaks_of_the_right_token_and_starts_neutral() -> None:
    plain, encoded = tiny_model(), tiny_model(length_encoding="learned")
    encoded.load_state_dict({**plain.state_dict(), "length_embed": torch.zeros(2, 32)})
    tokens = rlt.tokenize(video(6), patch_size=8)
    assert torch.equal(plain(rlt.pack(tokens)), encoded(rlt.pack(tokens)))
    with torch.no_grad():
        encoded.length_embed[1] = 1.0  # runs of two steps
    seen: list[Tensor] = []
    encoded.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    plain.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoded(rlt.pack(tokens))
    plain(rlt.pack(tokens))
    difference = (seen[0] - seen[1]).mean(1)
    torch.testing.assert_close(difference, (tokens.lengths == 2).float(), atol=1e-5, rtol=0)
    long = rlt.tokenize(torch.zeros(16, 32, 32, 3, dtype=torch.uint8), patch_size=8)  # runs of 8, only 2 were seen
    assert encoded(rlt.pack(long)).isfinite().all()


def test_training_works_after_inference_mode() -> None:
    model = tiny_model()
    packed = rlt.pack(rlt.tokenize(video(9, frames=16), patch_size=8))
    with torch.inference_mode():
        model(packed)
    model(packed).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_model_without_a_head_gives_features() -> None:
    model = tiny_model(num_classes=0)
    packed = rlt.pack(rlt.tokenize(video(7), patch_size=8))
    assert isinstance(model.head, nn.Identity)
    assert torch.equal(model(packed), model.forward_features(packed))


def test_tokens_of_another_size_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="patch_size=16; the model needs tubelet_size=2, patch_size=8"):
        tiny_model()(rlt.pack(rlt.tokenize(video(8))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "width 32 is not a multiple of num_heads 5"),
        ({"depth": 0}, "depth is 0"),
        ({"num_classes": -1}, "num_classes is -1"),
        ({"labels": ("a", "b")}, "2 labels for 7 classes"),
    ],
)
def test_bad_configurations(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        TINY.replace(**changes)


@pytest.mark.gpu
def test_cuda_half_precision_agrees_with_float32() -> None:
    model = tiny_model()
    packed = rlt.pack([rlt.tokenize(video(seed), patch_size=8) for seed in range(3)])
    expected = model(packed)
    on_gpu = model.cuda()
    torch.testing.assert_close(on_gpu(packed.to("cuda")).cpu(), expected, atol=1e-3, rtol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(on_gpu(packed.to("cuda")).float().cpu(), expected, atol=0.15, rtol=0.1)


def test_a_file_cannot_ask_for_a_table_beyond_bounds() -> None:
    content = {"model_type": "rlt_vit", **rlt.ViTConfig(num_frames=60_000).to_dict()}
    with pytest.raises(CheckpointError, match=r"num_frames=60000 .* a table of 5,880,000 positions; at most 349,525"):
        rlt.ViTConfig.from_dict(content, "weights")

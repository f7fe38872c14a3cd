"""Checkpoints of every layout: the same logits as the code they come from, and one clear line where they do not fit."""

from __future__ import annotations

import argparse
import functools
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

import rlt
from rlt import weights
from rlt.checkpoints import LoadReport, convert, create_model, exporting, load_checkpoint, read_checkpoint
from rlt.checkpoints.state_maps import LAYOUTS, detect_layout
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.network.positions import sinusoid_table
from rlt.network.vit import VisionTransformer, ViTConfig

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
HEADS, CLASSES, DEPTH = 4, 5, 2


def video(frames: int = 4, size: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, frames, size, size, 3), dtype=torch.uint8, generator=generator)


def logits_of(model: VisionTransformer, frames: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(rlt.pack(rlt.tokenize(frames, rule=rlt.Everything(), patch_size=model.config.patch_size)))


def normalised(frames: Tensor) -> Tensor:
    return (frames.float() / 255 - MEAN) / STD


def shaken(tensor: Tensor, name: str, scale: float, generator: torch.Generator) -> Tensor:
    """Random values for a weight; LayerNorm weights stay around one."""
    noise = torch.randn(tensor.shape, generator=generator)
    return 1 + 0.2 * noise if "norm" in name and name.endswith("weight") else scale * noise


# The original VideoMAE: a state dict with its names, and its forward pass written from the paper.


def videomae_state(
    width: int = 32, depth: int = DEPTH, mlp: int = 64, classes: int = CLASSES, patch: int = 16
) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, 2, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        block = {
            "norm1.weight": (width,),
            "norm1.bias": (width,),
            "attn.q_bias": (width,),
            "attn.v_bias": (width,),
            "attn.qkv.weight": (3 * width, width),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            "norm2.bias": (width,),
            "mlp.fc1.weight": (mlp, width),
            "mlp.fc1.bias": (mlp,),
            "mlp.fc2.weight": (width, mlp),
            "mlp.fc2.bias": (width,),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"fc_norm.weight": (width,), "fc_norm.bias": (width,)}
    shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    generator = torch.Generator().manual_seed(0)
    return {name: shaken(torch.empty(shape), name, 0.2, generator) for name, shape in shapes.items()}


def videomae_forward(state: dict[str, Tensor], frames: Tensor, eps: float = 1e-6) -> Tensor:
    """Logits of uint8 [B, T, H, W, 3], dense, in double precision."""
    s = {name: tensor.double() for name, tensor in state.items()}
    width = len(s["patch_embed.proj.bias"])
    kernel = s["patch_embed.proj.weight"]
    x = normalised(frames).double().permute(0, 4, 1, 2, 3)
    x = F.conv3d(x, kernel, s["patch_embed.proj.bias"], stride=kernel.shape[2:]).flatten(2).transpose(1, 2)
    x = x + sinusoid_table(x.shape[1], width)
    depth = len({name.split(".")[1] for name in s if name.startswith("blocks.")})
    for i in range(depth):
        b = {name.removeprefix(f"blocks.{i}."): tensor for name, tensor in s.items()}
        y = F.layer_norm(x, (width,), b["norm1.weight"], b["norm1.bias"], eps)
        bias = torch.cat([b["attn.q_bias"], torch.zeros(width), b["attn.v_bias"]])
        qkv = F.linear(y, b["attn.qkv.weight"], bias).unflatten(2, (3, HEADS, width // HEADS)).permute(2, 0, 3, 1, 4)
        weight = ((width // HEADS) ** -0.5 * qkv[0] @ qkv[1].mT).softmax(-1)
        y = (weight @ qkv[2]).transpose(1, 2).flatten(2)
        x = x + F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (width,), b["norm2.weight"], b["norm2.bias"], eps)
        y = F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + F.linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    x = F.layer_norm(x.mean(1), (width,), s["fc_norm.weight"], s["fc_norm.bias"], eps)
    return F.linear(x, s["head.weight"], s["head.bias"])


def pretraining_state() -> dict[str, Tensor]:
    state = {f"encoder.{k}": v for k, v in videomae_state().items() if not k.startswith(("fc_norm", "head"))}
    state |= {"encoder.norm.weight": torch.rand(32), "encoder.norm.bias": torch.rand(32)}
    state |= {"decoder.blocks.0.norm1.weight": torch.rand(16), "decoder.head.weight": torch.rand(9, 16)}
    return state | {"mask_token": torch.rand(1, 1, 16), "encoder_to_decoder.weight": torch.rand(16, 32)}


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def with_prefix(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in videomae_state().items()}


def lightning(**beside: object) -> dict[str, object]:
    state = with_prefix("model.") | {"train_acc.tp": torch.zeros(5), "val_loss.value": torch.zeros(())}
    return {"state_dict": state, "pytorch-lightning_version": "2.4.0", "epoch": 3, "optimizer_states": [{}], **beside}


WRAPPED: dict[str, Callable[[], object]] = {
    "bare": videomae_state,
    "model": lambda: {"model": videomae_state(), "epoch": 7, "args": argparse.Namespace(lr=0.1)},
    "module": lambda: {"module": videomae_state(), "optimizer": None, "dp_world_size": 8},
    "state_dict": lambda: {"state_dict": videomae_state()},
    "data_parallel": lambda: {"model": with_prefix("module.")},
    "backbone": lambda: {"state_dict": with_prefix("backbone.")},
    "compiled": lambda: {"model": with_prefix("module._orig_mod.")},
    "lightning": lightning,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_original_videomae_gives_the_logits_of_a_plain_forward_pass(wrapper: str, tmp_path: Path) -> None:
    path = saved(WRAPPED[wrapper](), tmp_path / "checkpoint.pth")
    model = load_checkpoint(path, num_heads=HEADS)
    assert not model.training
    frames = video()
    assert (logits_of(model, frames) - videomae_forward(videomae_state(), frames)).abs().max() <= 1e-5
    config = model.config
    assert (config.width, config.depth, config.mlp_width, config.num_classes) == (32, DEPTH, 64, CLASSES)
    assert (config.tubelet_size, config.patch_size, config.layer_norm_eps, config.head_norm_eps) == (2, 16, 1e-6, 1e-6)


def test_every_bias_and_norm_of_the_original_layout_reaches_the_logits(tmp_path: Path) -> None:
    """A weight that the loader dropped would not move the logits."""
    frames = video()[:1]
    state = videomae_state(depth=1)
    base = logits_of(load_checkpoint(saved(state, tmp_path / "a.pth"), num_heads=HEADS), frames)
    for name in state:
        changed = state | {name: state[name] + 0.5 * torch.randn_like(state[name])}
        model = load_checkpoint(saved(changed, tmp_path / "b.pth"), num_heads=HEADS)
        assert (logits_of(model, frames) - base).abs().max() > 1e-4, name


def test_other_token_sizes_are_read_off_the_kernel(tmp_path: Path) -> None:
    state = videomae_state(patch=8)
    state["patch_embed.proj.weight"] = torch.randn(32, 3, 4, 8, 8) * 0.05
    model = load_checkpoint(saved(state, tmp_path / "a.pth"), num_heads=HEADS)
    assert (model.config.tubelet_size, model.config.patch_size) == (4, 8)
    frames = video(8)
    tokens = rlt.tokenize(frames, rule=rlt.Everything(), tubelet_size=4, patch_size=8)
    with torch.inference_mode():
        assert (model(rlt.pack(tokens)) - videomae_forward(state, frames)).abs().max() <= 1e-5


def test_original_rlt_with_linear_embedding_and_length_embed(tmp_path: Path) -> None:
    state = with_prefix("model.")
    kernel = state["model.patch_embed.proj.weight"]
    state["model.patch_embed.proj.weight"] = kernel.flatten(1)  # channels_last variant: Linear over (c, p0, p1, p2)
    state["model.length_embed"] = torch.randn(1, 4, 32)
    path = saved(lightning(state_dict=state | {"criterion.weight": torch.ones(3)}), tmp_path / "last.ckpt")
    config, tensors, report = read_checkpoint(path, num_heads=HEADS)
    assert config.length_encoding == "learned"
    assert config.num_frames == 8
    assert torch.equal(tensors["length_embed"], state["model.length_embed"][0])
    assert report.ignored == (("criterion.weight", "state of the training module beside the network"),)
    assert "(h, w, t) order" in str(report)
    model = load_checkpoint(path, num_heads=HEADS)
    frames = video()
    plain = videomae_state()
    plain["patch_embed.proj.bias"] = plain["patch_embed.proj.bias"] + state["model.length_embed"][0, 0]
    assert (logits_of(model, frames) - videomae_forward(plain, frames)).abs().max() <= 1e-5  # all runs have length 1


def test_pretraining_checkpoint_needs_a_new_head(tmp_path: Path) -> None:
    path = saved({"model": pretraining_state()}, tmp_path / "pretrain.pth")
    with pytest.raises(CheckpointError, match=r"no head and no norm before the head.*new_head=True"):
        load_checkpoint(path, num_heads=HEADS)
    with pytest.raises(CheckpointError, match="new_head=True"):
        load_checkpoint(path, num_heads=HEADS, num_classes=0)  # the norm before the features is missing all the same
    config, state, report = read_checkpoint(path, num_heads=HEADS, new_head=True, num_classes=7)
    assert report.layout == "videomae_pretrain"
    assert report.missing == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert {key for key, _ in report.ignored} == {
        key for key in pretraining_state() if not key.startswith("encoder.") or key.startswith("encoder.norm")
    }
    assert config.num_classes == 7
    assert report.matched == len(state) == len(pretraining_state()) - 6
    model = load_checkpoint(path, num_heads=HEADS, new_head=True)
    assert model.config.num_classes == 400
    assert torch.equal(model.fc_norm.weight, torch.ones(32))
    frames = video()
    full = {key.removeprefix("encoder."): value for key, value in pretraining_state().items()} | {
        "fc_norm.weight": torch.ones(32),
        "fc_norm.bias": torch.zeros(32),
        "head.weight": model.head.weight.detach(),
        "head.bias": model.head.bias.detach(),
    }
    assert (logits_of(model, frames) - videomae_forward(full, frames)).abs().max() <= 1e-5


def test_head_of_another_size_only_by_request(tmp_path: Path) -> None:
    path = saved(videomae_state(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"has 5 classes, num_classes is 9; .*new_head=True"):
        load_checkpoint(path, num_heads=HEADS, num_classes=9)
    assert load_checkpoint(path, num_heads=HEADS, num_classes=CLASSES).config.num_classes == CLASSES
    model = load_checkpoint(path, num_heads=HEADS, num_classes=9, new_head=True)
    assert model.head.weight.shape == (9, 32)
    assert torch.equal(model.fc_norm.weight, videomae_state()["fc_norm.weight"])
    same_size = load_checkpoint(path, num_heads=HEADS, new_head=True)
    assert same_size.config.num_classes == CLASSES
    assert not torch.equal(same_size.head.weight, videomae_state()["head.weight"])
    features = load_checkpoint(path, num_heads=HEADS, num_classes=0)
    expected = videomae_forward(
        videomae_state() | {"head.weight": torch.eye(32), "head.bias": torch.zeros(32)}, video()
    )
    assert (logits_of(features, video()) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in videomae_state().items()}
    path = saved(state, tmp_path / "half.pth")
    assert "loaded as float32" in str(read_checkpoint(path, num_heads=HEADS)[2])
    model = load_checkpoint(path, num_heads=HEADS)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (logits_of(model, video()) - videomae_forward(state, video())).abs().max() <= 1e-5


def test_fixed_positions_are_dropped_learned_ones_refused(tmp_path: Path) -> None:
    table = sinusoid_table(8 * 196, 32)[None]
    path = saved(videomae_state() | {"pos_embed": table}, tmp_path / "a.pth")
    config, _, report = read_checkpoint(path, num_heads=HEADS)
    assert ("pos_embed", "the fixed position table") in report.ignored
    assert config.num_frames == 16
    saved(videomae_state() | {"pos_embed": table + 0.01}, path)
    with pytest.raises(CheckpointError, match="learned positions"):
        read_checkpoint(path, num_heads=HEADS)


def test_number_of_heads_comes_from_the_published_sizes_or_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"width 32 .*num_heads"):
        load_checkpoint(saved(videomae_state(), tmp_path / "a.pth"))
    path = saved(videomae_state(width=192, mlp=768, depth=12), tmp_path / "tiny.pth")
    model = create_model("vit_tiny", checkpoint=path)
    assert model.config.num_heads == 3
    with pytest.raises(CheckpointError, match=r"width=192, vit_small has 384; ask for vit_tiny"):
        create_model("vit_small", checkpoint=path)


# Hugging Face


def hf_config(**changes: object):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    shapes = {"image_size": 32, "num_frames": 4, "num_labels": CLASSES}
    return transformers.VideoMAEConfig(**(sizes | decoder | shapes | changes))


def hf_model(kind: str = "VideoMAEForVideoClassification", scale: float = 0.2, **changes: object):
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, kind)(hf_config(**changes)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shaken(parameter, name, scale, generator))
    return model


def hf_logits(model, frames: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(normalised(frames).permute(0, 1, 4, 2, 3)).logits


@pytest.mark.parametrize(
    ("changes", "frames", "size"),
    [
        ({}, 4, 32),
        ({"image_size": 224, "num_frames": 16}, 16, 224),
        ({"patch_size": 8, "layer_norm_eps": 1e-2, "num_attention_heads": 2}, 4, 32),
        ({"image_size": [32, 32], "patch_size": [16, 16]}, 4, 32),
        ({"qv_bias": False}, 4, 32),
    ],
    ids=["tiny", "full_grid", "other_sizes", "lists", "no_biases"],
)
def test_hugging_face_parity(changes: dict[str, object], frames: int, size: int, tmp_path: Path) -> None:
    theirs = hf_model(**changes)
    theirs.save_pretrained(tmp_path)
    ours = load_checkpoint(tmp_path)
    assert (ours.config.num_frames, ours.config.image_size) == (frames, size)
    clip = video(frames, size)
    assert (logits_of(ours, clip) - hf_logits(theirs, clip)).abs().max() <= 1e-4


def test_hugging_face_parity_at_the_size_of_vit_base(tmp_path: Path) -> None:
    base = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    theirs = hf_model(scale=0.03, **base, num_labels=400, image_size=64)
    assert all(parameter.abs().max() > 0 for parameter in theirs.parameters())
    theirs.save_pretrained(tmp_path)
    ours = create_model("vit_base", checkpoint=tmp_path)
    clip = video(4, 64)
    expected = hf_logits(theirs, clip)
    assert expected.std() > 0.1
    assert (logits_of(ours, clip) - expected).abs().max() <= 1e-4
    with torch.inference_mode():
        last = theirs.videomae(normalised(clip).permute(0, 1, 4, 2, 3)).last_hidden_state
        packed = rlt.pack(rlt.tokenize(clip, rule=rlt.Everything()))
        assert (ours.forward_tokens(packed) - last.flatten(0, 1)).abs().max() <= 1e-4
        assert (ours.forward_features(packed) - theirs.fc_norm(last.mean(1))).abs().max() <= 1e-4


def test_hugging_face_on_disk_in_all_its_forms(tmp_path: Path) -> None:
    theirs = hf_model()
    theirs.save_pretrained(tmp_path / "plain")
    expected = hf_logits(theirs, video())
    in_memory = theirs.state_dict()
    assert any(name.endswith("query.bias") for name in in_memory)  # what transformers 5 calls them
    on_disk = safetensors.torch.load_file(tmp_path / "plain" / "model.safetensors")
    assert any(name.endswith("q_bias") for name in on_disk)  # and what it writes
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    config = (tmp_path / "plain" / "config.json").read_text()
    for name, state in (("bin", on_disk), ("new_names", in_memory)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        torch.save(state, tmp_path / name / "pytorch_model.bin")
    half = hf_model().half()
    half.save_pretrained(tmp_path / "half")
    for name in ("plain", "plain/model.safetensors", "sharded", "bin", "new_names", "half"):
        tolerance = 0.05 if name == "half" else 1e-4
        assert (logits_of(load_checkpoint(tmp_path / name), video()) - expected).abs().max() <= tolerance, name
    (tmp_path / "sharded" / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
    shard = next((tmp_path / "sharded").glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"names {shard.name}, which is not in the folder"):
        load_checkpoint(tmp_path / "sharded")


def test_hugging_face_weights_without_configuration(tmp_path: Path) -> None:
    theirs = hf_model()
    saved({"model": theirs.state_dict()}, tmp_path / "a.pth")
    ours = load_checkpoint(tmp_path / "a.pth", num_heads=4)
    assert (ours.config.layer_norm_eps, ours.config.head_norm_eps) == (1e-12, 1e-5)
    assert (logits_of(ours, video()) - hf_logits(theirs, video())).abs().max() <= 1e-4


def test_hugging_face_labels_and_pixel_statistics(tmp_path: Path) -> None:
    names = {i: f"class {i}" for i in range(CLASSES)}
    hf_model(id2label=names, label2id={name: i for i, name in names.items()}).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]}')
    config = load_checkpoint(tmp_path / "a").config
    assert config.labels == tuple(names.values())
    assert (config.pixel_mean, config.pixel_std) == ((0.5, 0.4, 0.3), (1.0, 1.0, 1.0))
    assert load_checkpoint(tmp_path / "a", new_head=True).config.labels == ()
    hf_model().save_pretrained(tmp_path / "b")
    assert load_checkpoint(tmp_path / "b").config.labels == ()  # LABEL_0 is no name


@pytest.mark.parametrize("kind", ["VideoMAEModel", "VideoMAEForPreTraining"])
@pytest.mark.parametrize("pooling", [True, False])
def test_hugging_face_backbones_take_a_new_head(kind: str, pooling: bool, tmp_path: Path) -> None:
    theirs = hf_model(kind, use_mean_pooling=pooling)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="new_head=True"):
        load_checkpoint(tmp_path)
    ours = load_checkpoint(tmp_path, new_head=True, num_classes=3)
    backbone = theirs if kind == "VideoMAEModel" else theirs.videomae
    with torch.inference_mode():
        last = backbone(normalised(video()).permute(0, 1, 4, 2, 3)).last_hidden_state
        tokens = ours.forward_tokens(rlt.pack(rlt.tokenize(video(), rule=rlt.Everything()))).unflatten(0, (2, -1))
        if not pooling:
            tokens = backbone.layernorm(tokens)
    assert (tokens - last).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'; only 'gelu'"),
        ({"use_mean_pooling": False}, "use_mean_pooling=False|only models that average"),
        ({"model_type": "vivit"}, "model_type 'vivit'"),
        ({"num_channels": 1}, "num_channels=1"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"patch_size": [16, 8]}, re.escape("patch_size=[16, 8]")),
        ({"num_hidden_layers": 3}, "depth 3, its weights have 2 blocks"),
        ({"intermediate_size": 48}, "another shape"),
        ({"qkv_bias": False, "qv_bias": False}, "unexpected"),
        ({"num_attention_heads": 5}, "not a multiple of num_heads 5"),
    ],
)
def test_hugging_face_configurations_that_do_not_fit(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises((CheckpointError, InvalidArgumentError), match=message) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_lost_bias_is_never_silent(tmp_path: Path) -> None:
    state = hf_model().state_dict()
    for lost in ("query.bias", "value.bias"):
        some = next(name for name in state if name.endswith(lost))
        every = {name for name in state if name.endswith(("query.bias", "value.bias"))}
        for gone in ({some}, {name for name in every if name.endswith(lost)}, every):
            saved({name: value for name, value in state.items() if name not in gone}, tmp_path / "pytorch_model.bin")
            hf_config().save_pretrained(tmp_path)
            with pytest.raises(CheckpointError, match="missing"):
                load_checkpoint(tmp_path)
    twice = state | {some.replace("value.bias", "v_bias"): state[some]}
    saved(twice, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="twice"):
        load_checkpoint(tmp_path)


# Ours, and round trips


def our_model(**changes: object) -> VisionTransformer:
    config = ViTConfig(width=32, depth=2, num_heads=4, mlp_width=64, num_classes=3, num_frames=4, image_size=32)
    model = VisionTransformer(config.replace(**{"labels": ("a", "b", "ü"), **changes})).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(shaken(parameter, name, 0.2, generator))
    return model


def assert_same(one: VisionTransformer, other: VisionTransformer) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "changes", [{}, {"length_encoding": "learned"}, {"num_classes": 0, "labels": ()}, {"qkv_bias": False}]
)
def test_save_and_load_ours(changes: dict[str, object], tmp_path: Path) -> None:
    model = our_model(**changes)
    model.save_pretrained(tmp_path / "model")
    for back in (
        VisionTransformer.from_pretrained(tmp_path / "model"),
        load_checkpoint(tmp_path / "model"),
        load_checkpoint(tmp_path / "model" / "model.safetensors"),
    ):
        assert_same(model, back)
        assert back.config == model.config
        assert not back.training
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "rlt_vit"
    assert config["rlt_version"]
    assert "video-classification" in (tmp_path / "model" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_saving_takes_the_configuration_as_it_is_now(tmp_path: Path) -> None:
    model = our_model()
    model.config = model.config.replace(labels=("x", "y", "z"))
    model.save_pretrained(tmp_path)
    assert VisionTransformer.from_pretrained(tmp_path).config.labels == ("x", "y", "z")
    with pytest.raises(InvalidArgumentError, match="own configuration"):
        model.save_pretrained(tmp_path, config={})


def test_a_failed_save_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = our_model()
    old.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights.safetensors.torch, "save_file", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            our_model(depth=3).save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="No space left"):
            our_model().save_pretrained(tmp_path / "new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert list((tmp_path / "new").iterdir()) == []
    our_model(depth=3).save_pretrained(tmp_path)
    assert VisionTransformer.from_pretrained(tmp_path).config.depth == 3
    assert (tmp_path / "README.md").read_text() == "mine"


def test_push_to_hub_uploads_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, bytes] = {}

    def upload(self: object, *, folder_path: Path, **_: object) -> str:
        uploaded.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})
        return "url"

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda *_, repo_id, **__: argparse.Namespace(repo_id=repo_id)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    our_model().push_to_hub("someone/model")
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "videomae"}, "model_type 'videomae'"),
        ({"width": "wide"}, "width='wide'"),
        ({"depth": 3}, "12 missing|13 missing"),
        ({"mlp_width": 65}, "another shape"),
        ({"labels": ["a"]}, "1 labels for 3 classes"),
        ({"num_heads": None}, "num_heads=None"),
        ({"new_field": 1}, "new_field.*upgrade"),
    ],
)
def test_our_configuration_that_does_not_fit(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    our_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for load in (VisionTransformer.from_pretrained, load_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=message):
        VisionTransformer.from_pretrained(tmp_path)


def test_from_pretrained_takes_only_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        VisionTransformer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        VisionTransformer.from_pretrained(tmp_path)
    hf_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'videomae'.*create_model"):
        VisionTransformer.from_pretrained(tmp_path)


def test_a_bare_state_dict_of_ours(tmp_path: Path) -> None:
    model = our_model(length_encoding="learned")
    path = saved(model.state_dict(), tmp_path / "weights.pth")
    assert_same(model, load_checkpoint(path, num_heads=4))


@pytest.mark.parametrize("length_encoding", ["none", "learned"])
def test_round_trip_through_videomae(length_encoding: str, tmp_path: Path) -> None:
    model = our_model(length_encoding=length_encoding)
    model.save_pretrained(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "theirs.pth", to="videomae")
    assert "does not hold num_heads" in str(report)
    state = torch.load(tmp_path / "theirs.pth", weights_only=True)["model"]
    assert state["patch_embed.proj.weight"].shape == (32, 3, 2, 16, 16)
    if length_encoding == "learned":
        assert state.pop("length_embed").shape == (1, 2, 32)
    else:
        assert set(state) == set(videomae_state())
        assert (logits_of(model, video()) - videomae_forward(state, video())).abs().max() <= 1e-5
    convert(tmp_path / "theirs.pth", tmp_path / "again", num_heads=4)
    assert_same(model, VisionTransformer.from_pretrained(tmp_path / "again"))


def test_round_trip_through_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = our_model(head_norm_eps=1e-5, pixel_mean=(0.5, 0.5, 0.5))
    model.save_pretrained(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "theirs", to="hf")
    assert report.notes == ()
    theirs, info = transformers.VideoMAEForVideoClassification.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info.values()), info
    pixels = ((video().float() / 255 - 0.5) / STD).permute(0, 1, 4, 2, 3)
    with torch.inference_mode():
        assert (theirs.eval()(pixels).logits - logits_of(model, video())).abs().max() <= 1e-4
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "ü"}
    convert(tmp_path / "theirs", tmp_path / "again")
    back = VisionTransformer.from_pretrained(tmp_path / "again")
    assert_same(model, back)
    assert back.config == model.config
    model.config = model.config.replace(head_norm_eps=1e-6)
    model.save_pretrained(tmp_path / "ours")
    assert "head_norm_eps is 1e-06" in str(convert(tmp_path / "ours", tmp_path / "theirs", to="hf"))  # replaced
    our_model(length_encoding="learned").save_pretrained(tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"length_embed.*to='videomae'"):
        convert(tmp_path / "ours", tmp_path / "theirs", to="hf")


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_hugging_face_to_videomae_and_back_is_bit_identical(qkv_bias: bool, tmp_path: Path) -> None:
    theirs = hf_model(qv_bias=qkv_bias)
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a.pth", to="videomae")
    convert(tmp_path / "a.pth", tmp_path / "back", to="hf", num_heads=4)
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_convert_destroys_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(videomae_state(), tmp_path / "source.pth")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    run = functools.partial(convert, source, num_heads=HEADS)
    with pytest.raises(CheckpointError, match="other files"):
        run(folder)
    with pytest.raises(CheckpointError, match="is no name of a file"):
        run(folder, to="videomae")
    with pytest.raises(CheckpointError, match="is the source itself"):
        run(source, to="videomae")
    with pytest.raises(CheckpointError, match="is a file"):
        run(source)
    with pytest.raises(InvalidArgumentError, match="allowed are rlt, videomae, hf"):
        run(tmp_path / "x", to="onnx")
    run(tmp_path / "ours")
    with pytest.raises(CheckpointError, match="holds another model"):
        run(tmp_path / "ours", to="hf")
    run(tmp_path / "ours")  # an older result of the same kind is replaced
    before = (tmp_path / "ours" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError):
        convert(tmp_path / "missing.pth", tmp_path / "ours")
    assert (tmp_path / "ours" / "model.safetensors").read_bytes() == before
    old = saved({"old": 1}, tmp_path / "old.pth").read_bytes()
    monkeypatch.setattr(exporting.torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CheckpointError, match="No space left"):
        run(tmp_path / "old.pth", to="videomae")
    assert (tmp_path / "old.pth").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "old.pth", "ours", "source.pth"]


def test_pretraining_checkpoint_converts_with_a_new_head(tmp_path: Path) -> None:
    source = saved({"model": pretraining_state()}, tmp_path / "a.pth")
    report = convert(source, tmp_path / "ours", num_heads=HEADS, new_head=True, num_classes=3)
    assert len(report.missing) == 4
    assert VisionTransformer.from_pretrained(tmp_path / "ours").config.num_classes == 3


# The report, and everything that can be wrong


def test_report_is_one_readable_line() -> None:
    ignored = (("decoder.a", "decoder"), ("decoder.b", "decoder"), ("decoder.c", "decoder"))
    report = LoadReport("x.pth", "videomae_pretrain", 150, ("head.bias",), ignored, ("stored as float16",))
    assert str(report) == (
        "x.pth (VideoMAE pretraining layout): 150 weights loaded; 1 new (head.bias); "
        "3 left out as decoder (decoder.a, decoder.b and 1 more); note: stored as float16"
    )


def test_layouts_are_told_apart_by_their_keys() -> None:
    assert detect_layout(videomae_state()).name == "videomae"
    assert detect_layout(pretraining_state()).name == "videomae_pretrain"
    assert detect_layout(our_model().state_dict()).name == "rlt"
    assert detect_layout(["conv1.weight", "layer1.0.conv1.weight"]) is None
    for layout in LAYOUTS:  # every one of our weights has a place in every layout, length_embed but for Hugging Face's
        ours = {rule.ours for rule in layout.rules}
        lacking = {rule.ours for rule in LAYOUTS[0].rules} - ours
        assert lacking == ({"length_embed"} if layout.name.startswith("hf") else set())


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"mkdir {self.folder}",)


@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_a_malicious_pickle_never_runs(writer: str, tmp_path: Path) -> None:
    content = {"model": videomae_state(), "args": Evil(tmp_path / "pwned")}
    path = tmp_path / "evil.pth"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"args": Evil(tmp_path / "pwned")}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(
        CheckpointError, match=r"evil\.pth holds Python objects \((posix|nt)\.system\).*never loaded"
    ) as e:
        load_checkpoint(path, num_heads=HEADS)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(CheckpointError):
        convert(path, tmp_path / "out", num_heads=HEADS)
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


def test_python_objects_are_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    content = lightning(hyper_parameters={"optimizer": functools.partial(torch.optim.AdamW, lr=1e-3)})
    path = saved(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"\(functools\.partial\)") as caught:
        load_checkpoint(path, num_heads=HEADS)
    remedy = str(caught.value).split("keep only its weights: ")[1]
    exec(remedy, {"torch": torch, "OLD": path, "NEW": tmp_path / "new.pth"})
    load_checkpoint(tmp_path / "new.pth", num_heads=HEADS)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    return written(path, content[: int(len(content) * share)])


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in videomae_state().items() if key != name}


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: d / "nothing.pth", r"nothing\.pth does not exist"),
    "missing_folder": (lambda d: d / "no" / "thing", "does not exist"),
    "empty_file": (lambda d: written(d / "a.pth", b""), "is empty"),
    "empty_safetensors": (lambda d: written(d / "a.safetensors", b""), "is empty"),
    "text": (lambda d: written(d / "a.pth", b"hello world"), "is no PyTorch checkpoint"),
    "cut": (lambda d: cut(saved(videomae_state(), d / "a.pth"), 0.6), "damaged"),
    "cut_legacy": (
        lambda d: cut(
            torch.save(videomae_state(), d / "a.pth", _use_new_zipfile_serialization=False) or d / "a.pth", 0.6
        ),
        "damaged",
    ),
    "broken_header": (lambda d: written(d / "a.safetensors", b"\xff" * 64), "damaged or cut off"),
    "cut_safetensors": (
        lambda d: cut(safetensors.torch.save_file(videomae_state(), d / "a.safetensors") or d / "a.safetensors", 0.7),
        "damaged or cut off",
    ),
    "folder": (lambda d: written(d / "notes.txt", b"x").parent, r"holds no model\.safetensors.*notes\.txt"),
    "list": (lambda d: saved([1, 2], d / "a.pth"), "holds a list"),
    "no_tensors": (lambda d: saved({"epoch": 1, "model": {}}, d / "a.pth"), "holds no weights"),
    "resnet": (
        lambda d: saved({"conv1.weight": torch.ones(2), "fc.bias": torch.ones(3)}, d / "a.pth"),
        r"is no VideoMAE-style checkpoint \(keys: conv1\.weight, fc\.bias\); supported are rlt, ",
    ),
    "image_vit": (
        lambda d: saved(
            videomae_state() | {"patch_embed.proj.weight": torch.ones(32, 3, 16, 16), "cls_token": torch.ones(1)},
            d / "a.pth",
        ),
        r"unexpected \(cls_token\).*patch_embed\.proj\.weight is \[32, 3, 16, 16\]",
    ),
    "q_bias": (lambda d: saved(without("blocks.1.attn.q_bias"), d / "a.pth"), r"1 missing \(blocks\.1\.attn\.q_bias\)"),
    "norm": (lambda d: saved(without("fc_norm.bias"), d / "a.pth"), r"1 missing \(fc_norm\.bias\)"),
    "head": (lambda d: saved(without("head.bias"), d / "a.pth"), r"1 missing \(head\.bias\)"),
    "patch_bias": (
        lambda d: saved(without("patch_embed.proj.bias"), d / "a.pth"),
        r"1 missing \(patch_emb",
    ),
    "block": (
        lambda d: saved({k: v for k, v in videomae_state(depth=3).items() if "blocks.1." not in k}, d / "a.pth"),
        "13 missing .*13 unexpected",
    ),
    "layer_scale": (
        lambda d: saved(videomae_state() | {"blocks.0.gamma_1": torch.ones(32)}, d / "a.pth"),
        "layer scale .* is not supported",
    ),
    "class_token": (
        lambda d: saved({k.replace("fc_norm", "norm"): v for k, v in videomae_state().items()}, d / "a.pth"),
        "only models that average",
    ),
    "shape": (
        lambda d: saved(videomae_state() | {"blocks.1.mlp.fc1.weight": torch.ones(60, 32)}, d / "a.pth"),
        r"blocks\.1\.mlp\.fc1\.weight is \(60, 32\), \(64, 32\) is needed",
    ),
    "integers": (
        lambda d: saved(videomae_state() | {"head.weight": torch.ones(5, 32, dtype=torch.int8)}, d / "a.pth"),
        r"head\.weight is torch\.int8",
    ),
    "broken_json": (
        lambda d: (our_model().save_pretrained(d), written(d / "config.json", b"{"))[1].parent,
        "cannot be read as JSON",
    ),
    "index_leaves_folder": (
        lambda d: written(d / "model.safetensors.index.json", b'{"weight_map": {"a": "../b.safetensors"}}').parent,
        "which is not in the folder",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_clear_line(case: str, tmp_path: Path) -> None:
    make, message = BROKEN[case]
    path = make(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path, num_heads=HEADS)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_hub_id_while_offline_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for load in (load_checkpoint, VisionTransformer.from_pretrained):
        with pytest.raises(CheckpointError, match=r"someone/model is no file or folder, and the .* hub") as caught:
            load("someone/model")
        assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_without_pickles_where_safetensors_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(repo_id: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        if any(pattern.startswith("pytorch_model") for pattern in allow_patterns):
            our_model().save_pretrained(tmp_path / "hub")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert_same(load_checkpoint("someone/model"), our_model())
    assert len(asked) == 2
    assert_same(VisionTransformer.from_pretrained("someone/model"), our_model())
    assert len(asked) == 3
    assert not any("pytorch_model" in pattern for pattern in asked[2])

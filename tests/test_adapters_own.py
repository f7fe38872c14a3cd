"""A user's own adapter, registered from outside the package; what every adapter asks of the device; the statistics of
checkpoints."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

import rlt
from rlt import Budget, Everything, PatchSpec, Random, adapters, assets
from rlt.adapters import Hook, Override, PackedPatch, Patch, register_adapter, tiny
from rlt.adapters.packed import embed_patches
from rlt.errors import InvalidArgumentError
from rlt.network.attention import packed_attention
from rlt.network.run_lengths import NOWHERE, RunLengthParts

WIDTH, PATCH = 16, 8


class OwnAttention(nn.Module):
    """One head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return (q @ k.transpose(-1, -2) * WIDTH**-0.5).softmax(-1) @ v


class OwnNet(nn.Module):
    """Pixels [B, 4, 3, 32, 32] -> logits [B, 5], as somebody might write it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut = nn.Conv3d(3, WIDTH, (2, PATCH, PATCH), (2, PATCH, PATCH))
        self.position = nn.Parameter(torch.randn(32, WIDTH))
        self.layers = nn.ModuleList(OwnAttention() for _ in range(3))
        self.head = nn.Linear(WIDTH, 5)

    def embed(self, pixels: Tensor) -> Tensor:
        return self.cut(pixels.transpose(1, 2)).flatten(2).transpose(1, 2) + self.position

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.pool(x))


class OwnPatch(PackedPatch):
    """What a user writes."""

    model_classes: ClassVar[tuple[str, ...]] = ("OwnNet",)
    library: ClassVar[str] = __name__
    counted = RunLengthParts(pooling=True, attention=True, position=True)

    @override
    def edits(self) -> list[Override | Hook]:
        return [
            Override(self.model, "embed", self.embed),
            Override(self.model, "pool", self.pool),
            *(Override(layer, "forward", partial(self.attend, layer)) for layer in self.model.layers),
            Hook(self.model, self.finish),
        ]

    @override
    def attention_modules(self) -> list[nn.Module]:
        return list(self.model.layers)

    @override
    def input_shape(self) -> tuple[int, int, int, int]:
        return 4, 3, 32, 32

    @override
    def token_size(self) -> tuple[int, int]:
        return 2, PATCH

    def embed(self, pixels: Tensor) -> Tensor:
        x_TD = embed_patches(self.begin(pixels), self.model.cut)
        return (x_TD + self.call.positions(self.model.position))[None]

    def attend(self, layer: Any, x: Tensor) -> Tensor:
        self.call.packed_calls += 1
        q_THK, k_THK, v_THK = layer.qkv(x[0])[:, None].chunk(3, dim=-1)
        bias_T = self.call.key_bias
        return packed_attention(q_THK, k_THK, v_THK, self.call.segments, key_bias_T=bias_T).flatten(1)[None]

    def pool(self, x: Tensor) -> Tensor:
        if self.options.expand == "fill":
            return self.call.fill(x[0]).mean(1)
        return self.call.mean(self.remember(x)[0])


@pytest.fixture
def _own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "ADAPTERS", list(adapters.ADAPTERS))
    register_adapter(OwnPatch)


def pixels() -> Tensor:
    frames = torch.randn(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    for number in range(3):
        frames[number, 2:, :, : 8 * number] = frames[number, :1, :, : 8 * number]
    return frames


def twin(model: OwnNet, frames: Tensor, mask: Tensor) -> Tensor:
    """Clip by clip, with the model's own layers on the kept tokens."""
    rows = []
    for clip, kept in zip(frames, mask.flatten(1), strict=True):
        x = model.embed(clip[None])[:, kept]
        for layer in model.layers:
            x = x + layer(x)
        rows.append(model.head(x.mean(1)))
    return torch.cat(rows)


@pytest.mark.usefixtures("_own")
def test_a_registered_adapter_patches_as_the_built_in_ones_do() -> None:
    model, frames = OwnNet(), pixels()
    dense, state = model(frames), set(model.__dict__)
    patched: Any = rlt.patch(model)
    logits = patched(frames)
    last = patched.rlt.last
    assert last.num_kept == (32, 28, 24)
    logits.square().sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    patched.rlt.check()
    for twice in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert torch.equal(twice(frames), logits)
        assert twice.rlt.model is twice
    with patched.rlt.override(rule=Everything()):
        torch.testing.assert_close(patched(frames), dense)
    with patched.rlt.override(expand="fill"):
        assert not torch.allclose(patched(frames), logits)
    rlt.unpatch(model)
    assert set(model.__dict__) == state
    assert torch.equal(model(frames), dense)
    model.zero_grad()
    expected = twin(model, frames, last.mask)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.usefixtures("_own")
@torch.no_grad()
def test_a_users_adapter_counts_run_lengths_if_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = OwnNet()
    model.position[16:] = model.position[:16]  # of the first time step, at both of them
    frames = pixels()
    for number in range(3):
        frames[number, 1:, :, : 8 * number] = frames[number, :1, :, : 8 * number]
    dense = model(frames)
    rlt.patch(model, threshold=0, run_lengths="aware")
    torch.testing.assert_close(model(frames), dense, atol=1e-5, rtol=1e-5)
    assert model.rlt.last.num_kept == (32, 28, 24)
    with model.rlt.override(run_lengths="ignored"):
        assert not torch.allclose(model(frames), dense, atol=1e-3)
    monkeypatch.setattr(OwnPatch, "counted", NOWHERE)  # as of one who leaves it out
    with pytest.raises(InvalidArgumentError, match="but OwnNet counts them in no part; allowed are ignored"):
        rlt.patch(model, run_lengths="aware")
    assert rlt.patch(model).rlt.options.run_lengths == "ignored"


@pytest.mark.usefixtures("_own")
def test_a_layer_that_a_users_adapter_misses_is_an_error() -> None:
    model: Any = rlt.patch(OwnNet())
    del model.layers[1].__dict__["forward"]
    with pytest.raises(InvalidArgumentError, match="2 of 3 layers used packed attention; test_adapters_own"):
        model(pixels())


@pytest.mark.usefixtures("_own")
def test_registering_says_what_does_not_fit() -> None:
    count = len(adapters.ADAPTERS)
    register_adapter(OwnPatch)  # again, as a cell of a notebook does
    assert len(adapters.ADAPTERS) == count
    assert "OwnNet" in adapters.supported_models()

    class Thief(OwnPatch):
        pass

    class Nameless(Patch):
        library = __name__

    with pytest.raises(InvalidArgumentError, match="OwnNet of test_adapters_own is OwnPatch's already"):
        register_adapter(Thief)
    with pytest.raises(InvalidArgumentError, match="Nameless names no models"):
        register_adapter(Nameless)
    with pytest.raises(InvalidArgumentError, match=r"a subclass of rlt\.adapters.Patch is needed"):
        register_adapter(OwnNet)  # type: ignore[type-var]


@pytest.mark.usefixtures("_own")
def test_options_are_told_in_one_line() -> None:
    model: Any = rlt.patch(OwnNet())
    with pytest.raises(InvalidArgumentError, match=r"option is 'treshold'; allowed are .*; did you mean 'threshold'"):
        model.rlt.override(treshold=0.2).__enter__()
    with pytest.raises(InvalidArgumentError, match=r"policy is no option any more; give rule=rlt.Everything\(\)"):
        model.rlt.override(policy="none").__enter__()
    with pytest.raises(InvalidArgumentError, match="give one of them"):
        model.rlt.override(threshold=0.2, keep_ratio=0.5).__enter__()
    model(pixels())
    with pytest.raises(AttributeError, match=r"LastForward\.tokens_kept is now num_kept"):
        _ = model.rlt.last.tokens_kept
    assert model.rlt.last.num_dense == 32
    rlt.patch(model, keep_ratio=0.5)
    with model.rlt.override(threshold=100.0):  # whichever is given replaces the rule
        model(pixels())
        assert model.rlt.last.num_kept == (16, 16, 16)
    with model.rlt.override(keep_ratio=0.75):
        model(pixels())
        assert model.rlt.last.num_kept == (24, 24, 24)
    with model.rlt.override(max_tokens=20), model.rlt.override(reference="anchor"):
        assert model.rlt.options.rule == Budget(max_tokens=20, reference="anchor")
        model(pixels())
        assert model.rlt.last.num_kept == (20, 20, 20)
    fresh: Any = OwnNet()
    with pytest.raises(InvalidArgumentError, match="no clip was embedded; call the whole model"):
        rlt.patch(fresh).layers[0](torch.zeros(1, 4, WIDTH))


# What is asked of the device


class Waits(TorchDispatchMode):
    """Counts the operators whose result the host waits for on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        masks = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masks or name in ("nonzero", "_local_scalar_dense", "masked_select", "unique_consecutive", "_unique2"):
            self.counts[name] += 1
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_waits(model: Any, frames: Tensor, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of one forward pass, without the CPU's attention, whose kernel reads where clips end."""

    def tolist(self: Tensor) -> Any:
        waits.counts["tolist"] += 1
        return own(self)

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))[0].transpose(0, 1)

    own, waits = Tensor.tolist, Waits()
    model.rlt.attention = attention
    with monkeypatch.context() as patched, torch.no_grad(), waits:
        patched.setattr(Tensor, "tolist", tolist)
        model(frames)
    return waits.counts


@pytest.mark.parametrize("options", [{}, {"expand": "fill"}], ids=["kept", "filled"])
@pytest.mark.parametrize("family", ["videomae", "vivit", "vjepa2", "timesformer", "siglip", "dinov3", "timm"])
def test_layers_do_not_wait_for_the_device(
    family: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = torch.randn(2, 4, 3, 32, 32)
    frames[:, :, :, :16] = frames[:, :1, :, :16]
    found = []
    for depth in (2, 4):
        size = tiny.Size(width=48, depth=depth, num_frames=4, image_size=32, patch_size=8)
        try:
            model = rlt.patch(tiny.build(family, size), pixel_std=(1.0, 1.0, 1.0), **options)
        except rlt.errors.MissingDependencyError as error:
            pytest.skip(str(error))
        given = frames.flatten(0, 1) if model.rlt.takes_images else frames
        found.append(count_waits(model, given, monkeypatch))
        assert 0 < model.rlt.last.share_kept < 1
    assert found[0] == found[1]
    assert found[0]["nonzero"] == 1


@pytest.mark.parametrize("family", ["videomae", "vivit", "vjepa2"])
def test_counting_run_lengths_asks_the_device_no_more(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    frames = torch.randn(2, 4, 3, 32, 32)
    frames[:, :, :, :16] = frames[:, :1, :, :16]
    model = rlt.patch(tiny.build(family, tiny.Size(width=48, num_frames=4, image_size=32, patch_size=8)))
    found = []
    for text in ("ignored", "aware"):
        with model.rlt.override(run_lengths=text):
            found.append(count_waits(model, frames, monkeypatch))
    assert any(model.rlt.call.parts)
    assert found[0] == found[1]


# What pixels were normalised by


HALVES, IMAGENET = PatchSpec(2, 8, (0.5,) * 3, (0.5,) * 3), PatchSpec(2, 8)
SIZE = tiny.Size(num_frames=8, image_size=32, patch_size=8)


def still_and_moving() -> Tensor:
    """uint8 [1, 8, 32, 32, 3] of the bundled video."""
    return rlt.read_clip(assets.path("traffic.mp4"), num_frames=8, frame_stride=2, size=32).frames[None]


def normalised(frames: Tensor, spec: PatchSpec) -> Tensor:
    return ((frames / 255 - torch.tensor(spec.mean)) / torch.tensor(spec.std)).permute(0, 1, 4, 2, 3)


def loaded(folder: Path, processor: dict[str, Any] | None, name: str = "preprocessor_config.json") -> Any:
    """A VideoMAE classifier as `from_pretrained` gives it, with a processor beside its weights."""
    transformers = pytest.importorskip("transformers")
    tiny.build("videomae", SIZE).save_pretrained(folder)
    if processor is not None:
        (folder / name).write_text(json.dumps(processor))
    return transformers.VideoMAEForVideoClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 0.5, 0.5),
        ({"image_mean": [0.4] * 3, "image_std": [0.2] * 3, "do_rescale": True, "rescale_factor": 1 / 255}, 0.4, 0.2),
        # ViViT's centres and then normalises as well.
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5, "offset": True}, 0.75, 0.25),
        ({"image_mean": [127.5] * 3, "image_std": [51.0] * 3, "do_rescale": False}, 0.5, 0.2),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, 0.0, 1.0),
    ],
)
def test_statistics_are_those_of_the_processor_beside_the_weights(
    tmp_path: Path, processor: dict[str, Any], mean: float, std: float
) -> None:
    model = rlt.patch(loaded(tmp_path, processor))
    spec = model.rlt.spec
    assert (spec.tubelet_size, spec.patch_size) == (2, 8)
    assert spec.mean == pytest.approx((mean,) * 3)
    assert spec.std == pytest.approx((std,) * 3)
    frames = still_and_moving()
    with torch.no_grad():
        from_floats = model(normalised(frames, spec)).logits
        from_bytes = model(frames.permute(0, 1, 4, 2, 3)).logits
    assert torch.equal(model.rlt.last.mask, rlt.keep_mask(frames, patch_size=8))
    torch.testing.assert_close(from_floats, from_bytes, atol=1e-5, rtol=1e-5)


def test_what_is_given_wins_over_the_processor_and_the_processor_over_the_family(tmp_path: Path) -> None:
    model = loaded(tmp_path, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    assert rlt.patch(model).rlt.spec == HALVES
    assert rlt.patch(model, pixel_mean=IMAGENET.mean, pixel_std=IMAGENET.std).rlt.spec == IMAGENET
    with model.rlt.override(pixel_std=(0.25, 0.25, 0.25)):
        assert model.rlt.spec.std == (0.25, 0.25, 0.25)
    video = {"image_mean": [0.4] * 3, "image_std": [0.2] * 3}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    assert rlt.patch(model).rlt.spec == PatchSpec(2, 8, (0.4,) * 3, (0.2,) * 3)
    assert rlt.patch(loaded(tmp_path / "none", None)).rlt.spec == IMAGENET
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5, "image_std": 0.5}))
    with pytest.raises(InvalidArgumentError, match=r"image_std=0.5; three numbers each are needed"):
        rlt.patch(model)


def test_statistics_of_the_hub_are_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without opening the network: the folders are those that downloads leave behind."""
    snapshot = tmp_path / "models--somebody--videomae" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    nested = {"video_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}}
    (snapshot / "processor_config.json").write_text(json.dumps(nested))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tiny.build("videomae", SIZE)
    assert rlt.patch(model).rlt.spec == IMAGENET
    model.config.name_or_path = "somebody/videomae"
    model.name_or_path = "somebody/videomae"
    assert rlt.patch(model).rlt.spec == HALVES
    model.name_or_path = "somebody/else"
    assert rlt.patch(model).rlt.spec == IMAGENET
    model.name_or_path = "no name: of the hub"
    assert rlt.patch(model).rlt.spec == IMAGENET


@pytest.mark.parametrize("family", ["videomae", "vivit", "vjepa2"])
def test_the_same_clip_keeps_the_same_tokens_with_every_model(family: str) -> None:
    pytest.importorskip("transformers")
    frames = still_and_moving()
    model = rlt.patch(tiny.build(family, SIZE))
    for given in (frames.permute(0, 1, 4, 2, 3), normalised(frames, model.rlt.spec)):
        with torch.no_grad():
            model(given)
        assert torch.equal(model.rlt.last.mask, rlt.keep_mask(frames, patch_size=8))


def test_floats_that_cannot_be_normalised_warn_once_per_place() -> None:
    pytest.importorskip("transformers")
    model, frames = rlt.patch(tiny.build("vivit", SIZE), rule=Random()), still_and_moving()
    raw, good = frames.permute(0, 1, 4, 2, 3).float(), normalised(frames, HALVES)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model(good)
        assert not caught
        for number in range(3):
            model(raw + number)
    lines = [str(warning.message) for warning in caught if issubclass(warning.category, RuntimeWarning)]
    assert len(lines) == 1
    assert "\n" not in lines[0]
    assert "pass uint8 frames or what the model's processor gives" in lines[0]
    assert caught[0].filename == __file__

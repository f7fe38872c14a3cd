"""One vocabulary: every rule keeps the same tokens of the same uint8 clip, whichever door it goes in by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlt
from rlt import Budget, Clip, Drawn, Everything, PatchSpec, Random, Rule, Threshold, UniformFrames, assets, cli
from rlt.benchmark.harness import BenchmarkSettings, packed_by
from rlt.data.augment import AugmentConfig
from rlt.data.batch import Collate
from rlt.data.clips import ViewConfig
from rlt.data.dataset import EvaluationDataset, TrainingSample
from rlt.data.manifest import VideoEntry
from rlt.structures import IMAGENET_STD
from rlt.tokens import PatchView, rule_options
from rlt.video import ClipSpec
from video_factory import write_video

SPEC = PatchSpec()
HALF = (0.5, 0.5, 0.5)
RULES = [
    Threshold(0.1),
    Threshold(0.3),
    Threshold(0.1, reference="anchor"),
    Threshold(0.1, exposure="gain"),
    Threshold(0.1, reference="anchor", exposure="gain", motion="global"),
    Budget(keep_ratio=0.5),
    Budget(keep_ratio=0.4, reference="anchor", exposure="gain"),
    Budget(max_tokens=47),
    Everything(),
    Random(),
    Random(like=Budget(keep_ratio=0.5)),
    UniformFrames(like=Threshold(0.2)),
    Drawn(),
]
OWN = ("seed", "keep_first", "shared", "lowest", "highest", "over")
"""Fields that a rule takes and no door spells out."""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames of 64x64 pixels of a real street, without loss, so that a file is the same clip."""
    clip = rlt.read_clip(assets.path("traffic.mp4"), num_frames=8, frame_stride=4, size=64)
    path = tmp_path_factory.mktemp("doors") / "street.mkv"
    write_video(path, 8, codec="ffv1", pix_fmt="bgr0", rate=8, picture=lambda number: clip.frames[number].numpy())
    return path


@pytest.fixture(scope="module")
def clip(video: Path) -> Clip:
    return rlt.read_clip(video, num_frames=8, frame_stride=1, size=64)


@pytest.fixture(scope="module")
def expected(clip: Clip) -> Callable[[Rule], Tensor]:
    return lambda rule: rule(PatchView(clip.frames[None], SPEC), seeds=[0])[0]


def plain(rule: Rule) -> dict[str, Any]:
    """The rule as a person writes it: its name and its options."""
    return {name: value for name, value in rule_options(rule).items() if name not in OWN and value is not None}


def mask_of(tokens: Any) -> Tensor:
    found = tokens.unpack()[0] if isinstance(tokens, rlt.PackedTokens) else tokens
    return found.mask()


def tiny(std: tuple[float, float, float] = IMAGENET_STD) -> rlt.VisionTransformer:
    config = rlt.ViTConfig(width=16, depth=1, num_heads=2, mlp_width=16, num_classes=3, num_frames=8, image_size=64)
    return rlt.VisionTransformer(config.replace(pixel_mean=HALF, pixel_std=std)).eval()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_python_and_training_and_evaluation(rule: Rule, clip: Clip, video: Path, expected: Any) -> None:
    mask = expected(rule)
    assert 0 < mask.sum() <= mask.numel()
    assert torch.equal(mask_of(rlt.tokenize(clip, rule=rule)), mask)
    assert torch.equal(mask_of(rlt.tokenize(clip.frames.numpy(), **plain(rule))), mask)
    assert torch.equal(mask_of(tiny().tokenize(clip, rule=rule)), mask)
    assert torch.equal(mask_of(tiny(HALF).tokenize(clip.frames[None], **plain(rule))), mask)
    assert torch.equal(mask_of(packed_by(rule, clip.frames[None], BenchmarkSettings(()))), mask)
    if isinstance(rule, Random | Drawn):  # drawn from the run's seed and the position there
        return
    sample = TrainingSample(clip.frames, 0, str(video), (), 0)
    collate = Collate(rule, AugmentConfig(mixup_alpha=0, cutmix_alpha=0), 3, SPEC)
    assert torch.equal(mask_of(collate([sample]).packed), mask)
    entry = VideoEntry(str(video), 0, "a", 8, 8.0, 64, 64, 1.0, "ok")
    dataset = EvaluationDataset([entry], ClipSpec(8, 1, size=64), ViewConfig(1, 1), rule, SPEC)
    assert torch.equal(mask_of(dataset[0].tokens[0]), mask)


def patched(family: str) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if family == "videomae":
        config = transformers.VideoMAEConfig(image_size=64, num_frames=8, **sizes)
        return transformers.VideoMAEForVideoClassification(config).eval()
    config = transformers.VivitConfig(image_size=64, num_frames=8, tubelet_size=[2, 16, 16], **sizes)
    return transformers.VivitForVideoClassification(config).eval()


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(("family", "std"), [("videomae", IMAGENET_STD), ("videomae", HALF), ("vivit", HALF)])
def test_models_of_others(family: str, std: tuple[float, ...], rule: Rule, clip: Clip, expected: Any) -> None:
    statistics = {"pixel_mean": HALF, "pixel_std": std}
    model = rlt.patch(patched(family), rule=rule, **statistics)
    channels_first = clip.frames.permute(0, 3, 1, 2)[None]
    floats = (channels_first / 255 - 0.5) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        model(channels_first)
        assert torch.equal(model.rlt.last.mask[0], expected(rule))
        model(floats)
        assert torch.equal(model.rlt.last.mask[0], expected(rule))
        by_options = rlt.patch(patched(family), **plain(rule), **statistics)
        by_options(floats)
        assert torch.equal(by_options.rlt.last.mask[0], expected(rule))


def test_the_family_of_a_model_decides_its_statistics_and_no_tokens(clip: Clip, expected: Any) -> None:
    channels_first = clip.frames.permute(0, 3, 1, 2)[None]
    for family in ("videomae", "vivit"):
        model = rlt.patch(patched(family), threshold=0.1)
        with torch.no_grad():
            model(channels_first)
        assert torch.equal(model.rlt.last.mask[0], expected(Threshold(0.1)))


@pytest.mark.parametrize("rule", [rule for rule in RULES if not isinstance(rule, Everything)], ids=repr)
def test_commands(rule: Rule, video: Path, tmp_path: Path, expected: Any) -> None:
    options = [part for name, value in plain(rule).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    sizes = ["--frames", "8", "--stride", "1", "--size", "64"]
    kept, target = int(expected(rule).sum()), tmp_path / "numbers.json"
    for command in (
        ["compare", "--model", "vit_tiny", "--repeats", "1"],
        ["inspect", "--output", str(tmp_path / "out")],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, str(video), *sizes, *options, "--json", str(target)])
        assert not stop.value.code
        numbers = json.loads(target.read_text())
        share = numbers["tokens_kept"] if command[0] == "compare" else numbers["videos"][0]["tokens_kept"]
        assert share == pytest.approx(kept / expected(rule).numel())

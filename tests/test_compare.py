"""`rlt.compare` and the benchmark suites on a real clip, with a network small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlt
import video_factory
from rlt import assets
from rlt.compare import CompareSettings, compare
from rlt.errors import InvalidArgumentError, VideoError
from rlt.video import ClipSpec

SMALL: dict[str, Any] = {"model": "vit_tiny", "clip": ClipSpec(8, size=64), "repeats": 2}
REQUIRED = {
    "tokens_kept",
    "speedup_forward",
    "speedup_end_to_end",
    "speedup_flops",
    "top1_agreement",
    "feature_cosine",
    "weights",
    "machine",
}


def test_both_arms_see_the_same_clips() -> None:
    steps: list[tuple[int, int, str]] = []
    video = assets.path("traffic.mp4")
    result = compare([video], CompareSettings(**SMALL, num_clips=2), on_progress=lambda *step: steps.append(step))
    numbers = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert numbers.keys() >= REQUIRED
    assert numbers["weights"] == "random"
    assert 0 < numbers["tokens_kept"] < 1
    clips = torch.stack([clip.frames for clip in rlt.video.read_clips(video, num_clips=2, num_frames=8, size=64)])
    expected = rlt.keep_mask(clips).float().mean().item()
    assert numbers["tokens_kept"] == pytest.approx(expected)
    assert numbers["speedup_flops"] == numbers["flops"]["dense"] / numbers["flops"]["rlt"] > 1
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[-1] == (4, 4, "traffic.mp4")
    assert len(numbers["videos"][0]["top5"]["dense"]) == 2
    assert numbers["videos"][0]["top5"]["rlt"][0][0]["label"] is None


def test_nothing_dropped_means_full_agreement(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = tmp_path / "noise.mkv"  # lossless: every patch differs from the one before
    video_factory.write_video(
        noise, 8, codec="ffv1", pix_fmt="bgr0", picture=lambda _: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    )
    result = compare([noise], CompareSettings(**{**SMALL, "clip": ClipSpec(8, 1, size=64)}))
    assert result.tokens_kept == 1
    assert result.speedup_flops == 1
    assert result.top1_agreement == 1
    assert result.feature_cosine == pytest.approx(1, abs=1e-6)


def test_a_checkpoint_brings_its_labels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = rlt.checkpoints.models.MODELS["vit_tiny"].replace(num_classes=3, labels=("run", "walk", "<b>sit</b>"))
    rlt.VisionTransformer(config).save_pretrained(tmp_path / "model")
    settings = CompareSettings(**SMALL, checkpoint=str(tmp_path / "model"))
    numbers = compare([assets.path("traffic.mp4")], settings).to_json()
    assert numbers["weights"] == str(tmp_path / "model")
    top = numbers["videos"][0]["top5"]["rlt"][0]  # type: ignore[index]
    assert {entry["label"] for entry in top} == {"run", "walk", "<b>sit</b>"}
    assert sum(entry["probability"] for entry in top) == pytest.approx(1, abs=1e-5)


def test_bad_videos_do_not_stop_the_good_ones(tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"this is no video")
    result = compare([bad, assets.path("traffic.mp4")], CompareSettings(**SMALL))
    assert len(result.videos) == 1
    assert [source for source, _ in result.failed] == [str(bad)]
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        compare([bad], CompareSettings(**SMALL))
    with pytest.raises(VideoError, match="none of 2 videos"):
        compare([bad, bad], CompareSettings(**SMALL))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": ClipSpec(size=70)}, "70x70 pixels are not a multiple of patch_size=16; resize or crop to 64x64"),
        ({"num_clips": 0}, "num_clips is 0"),
        ({"repeats": 0}, "repeats is 0"),
        ({"model": "vit_enormous"}, "model is 'vit_enormous'; allowed are vit_micro"),
    ],
)
def test_settings_are_checked_before_anything_slow(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        compare([Path("not-even-opened.mp4")], CompareSettings(**{**SMALL, **changes}))

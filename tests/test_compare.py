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
from rlt import assets, cli
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


def test_what_a_plain_comparison_says() -> None:
    numbers: Any = compare([assets.path("traffic.mp4")], CompareSettings(**SMALL)).to_json()
    assert numbers.keys() == REQUIRED | {"settings", "tokens", "flops", "seconds", "videos", "failed"}
    stages = {f"{stage}_{arm}" for stage in ("tokenize", "forward", "end_to_end") for arm in ("dense", "rlt")}
    assert numbers["seconds"].keys() == {"decode"} | stages
    assert numbers["tokens"].keys() == numbers["flops"].keys() == {"dense", "rlt"}
    assert "more_frames" not in numbers["settings"]
    own = {"source", "clip_starts", "tokens_kept", "flops_saved", "speedup_forward", "same_top1", "feature_cosine"}
    assert numbers["videos"][0].keys() == own | {"top5"}
    assert numbers["videos"][0]["top5"].keys() == {"dense", "rlt"}


def test_more_frames_of_the_same_span_for_the_same_tokens() -> None:
    video, rule = assets.path("traffic.mp4"), rlt.Budget(max_tokens=40)
    settings = CompareSettings(**SMALL, rule=rule, more_frames=(2, 4), num_clips=2)
    result = compare([video], settings)
    numbers: Any = json.loads(json.dumps(result.to_json(), allow_nan=False))
    torch.manual_seed(0)
    model = rlt.create_model("vit_tiny")
    logits = {}
    for name, frames, stride in (("dense", 8, 4), ("rlt", 8, 4), ("rlt_16", 16, 2), ("rlt_32", 32, 1)):
        clips = rlt.video.read_clips(video, num_clips=2, num_frames=frames, frame_stride=stride, size=64)
        tokens = rlt.tokenize(clips, rule=rlt.Everything() if name == "dense" else rule)
        packed = rlt.pack(tokens)  # type: ignore[arg-type]
        with torch.inference_mode():
            logits[name] = model(packed)
        arm = numbers["arms"][name]
        assert (arm["num_frames"], arm["frame_stride"], arm["fps"]) == (frames, stride, None)
        assert arm["tokens"] == packed.num_tokens == (128 if name == "dense" else 80) == numbers["tokens"][name]
        assert arm["flops"] == rlt.network.flops.count_forward_flops(model.config, packed)
        same = (logits[name].argmax(1) == logits["dense"].argmax(1)).float().mean()
        assert arm["top1_agreement"] == pytest.approx(float(same))
        top = [clip[0]["class"] for clip in numbers["videos"][0]["top5"][name]]
        assert top == logits[name].argmax(1).tolist()
    assert numbers["tokens_kept"] == 80 / 128
    assert numbers["speedup_forward"] == numbers["arms"]["rlt"]["speedup_forward"]
    assert numbers["feature_cosine"] == numbers["arms"]["rlt"]["feature_cosine"] < 1
    assert numbers["arms"]["dense"]["feature_cosine"] == numbers["arms"]["dense"]["speedup_end_to_end"] == 1
    decoded = [key for key in numbers["seconds"] if key.startswith("decode")]
    assert decoded == ["decode", "decode_rlt_16", "decode_rlt_32"]
    assert numbers["settings"]["more_frames"] == [2, 4]


def test_closer_frames_are_of_the_same_span() -> None:
    def clips(clip: ClipSpec) -> list[ClipSpec]:
        return [arm.clip for arm in CompareSettings(clip=clip, more_frames=(2, 4)).arms.values()][2:]

    assert clips(ClipSpec(16, fps=6)) == [ClipSpec(32, fps=12), ClipSpec(64, fps=24)]
    uniform = [ClipSpec(frames, sampling="uniform") for frames in (16, 32, 64)]
    assert clips(uniform[0]) == uniform[1:]


def test_the_command_with_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["compare", str(assets.path("traffic.mp4")), "--model", "vit_tiny", "--frames", "8", "--size", "64"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*small, "--budget", "40", "--repeats", "1"])
    assert not stop.value.code
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("│ dense ", "│ RLT "))]
    assert [[cell.strip() for cell in row.split("│")[1:4]] for row in rows[:4]] == [
        ["dense", "8", "64"], ["RLT", "8", "40"], ["RLT", "16", "40"], ["RLT", "32", "40"]
    ]  # fmt: skip
    for wrong, message in ((["--max-tokens", "9"], "budget is 40 and max_tokens is 9"), (["--rule", "none"], "budget")):
        with pytest.raises(SystemExit) as stop:
            cli.main([*small, "--budget", "40", *wrong])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


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
        ({"more_frames": (0,)}, "more_frames is 0"),
        (
            {"more_frames": (2, 4), "clip": ClipSpec(8, 2, size=64)},
            "frame_stride is 2; 4 times as many frames of the same span need a multiple of 4, or fps",
        ),
        ({"repeats": 0}, "repeats is 0"),
        ({"model": "vit_enormous"}, "model is 'vit_enormous'; allowed are vit_micro"),
    ],
)
def test_settings_are_checked_before_anything_slow(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        compare([Path("not-even-opened.mp4")], CompareSettings(**{**SMALL, **changes}))

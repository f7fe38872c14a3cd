"""The frontier: every arm against the dense network, with numbers that a plain loop gives too."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rlt
from models import tiny_model
from rlt import cli
from rlt.conf.schema import Config
from rlt.data.clips import ViewConfig, read_evaluation_clips
from rlt.data.manifest import Manifest, VideoEntry, write_manifest
from rlt.errors import InvalidArgumentError, VideoError
from rlt.evaluation import EvaluationSettings
from rlt.frontier import FrontierResult, default_arms, frontier_config, measure, measure_frontier
from rlt.frontier.arms import DENSE, FrontierArm
from rlt.frontier.plot import write_frontier_plot
from rlt.frontier.results import COLUMNS
from rlt.network.flops import forward_flops
from rlt.tokens import Threshold, tokenize_batch
from rlt.video import ClipSpec
from video_factory import numbered_picture, write_video

SETTINGS = EvaluationSettings(
    clip=ClipSpec(num_frames=4, frame_stride=3, size=32), views=ViewConfig(num_clips=2, num_crops=1)
)
ARMS = default_arms(thresholds=(0.1, 0.6), keep_ratios=(0.7,), seeds=2)
NAMES = tuple("abcdefg")


def picture(video: int, number: int) -> np.ndarray:
    moving = numbered_picture(number * (video + 1))
    moving[48:] = (40 * video, 255 - 40 * video, 100)
    return moving


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("videos")
    for video in range(4):
        write_video(folder / f"{video}.mp4", 24, picture=lambda number, video=video: picture(video, number))
    (folder / "broken.mp4").write_bytes(b"no video")
    paths = [*sorted(folder.glob("?.mp4")), folder / "broken.mp4"]
    rows = [VideoEntry(str(p), n % 3, NAMES[n % 3], 24, 25.0, 160, 96, 0.96, "ok") for n, p in enumerate(paths)]
    return Manifest(tuple(rows), NAMES)


@pytest.fixture(scope="module")
def result(manifest: Manifest) -> FrontierResult:
    return measure_frontier(tiny_model(), manifest, SETTINGS, ARMS)


def test_every_arm_is_what_a_plain_loop_gives(manifest: Manifest, result: FrontierResult) -> None:
    model = tiny_model()
    for arm in (arm for arm in ARMS if arm.family in ("paper", "aware", "fewer frames", "anchor")):
        rows = []
        for entry in manifest.entries[:4]:
            clips = read_evaluation_clips(entry.path, SETTINGS.clip, SETTINGS.views)
            for clip in clips:
                with torch.no_grad():
                    model.run_lengths = "ignored"
                    dense_tokens = rlt.pack(tokenize_batch(clip.frames[None], rlt.Everything(), model.config.patches))
                    dense = model(dense_tokens).softmax(-1)[0]
                    model.run_lengths = arm.run_lengths
                    packed = rlt.pack(tokenize_batch(clip.frames[None], arm.rule, model.config.patches))
                    ours = model(packed).softmax(-1)[0]
                rows.append(
                    [
                        float(ours.argmax() == dense.argmax()),
                        float((dense * (dense / ours).log()).sum()),
                        float(ours.argmax() == entry.label_id),
                        packed.share_kept,
                        forward_flops(model.config, packed.num_tokens),
                    ]
                )
        point = next(point for point in result.points if point.arm == arm)
        names = ("agrees", "kl", "correct", "tokens_kept", "flops")
        np.testing.assert_allclose([point.means[name] for name in names], np.mean(rows, axis=0), rtol=1e-3, atol=1e-6)


def test_the_dense_network_agrees_with_itself(result: FrontierResult) -> None:
    for video in result.videos:
        columns = dict(zip(COLUMNS, video.values[DENSE].T, strict=True))
        assert (
            columns["agrees"].tolist() == columns["tokens_kept"].tolist() == columns["flops_share"].tolist() == [1, 1]
        )
        np.testing.assert_allclose(columns["kl"], 0, atol=1e-9)
        np.testing.assert_allclose(columns["cosine"], 1)
    assert [reason for _, reason in result.failed] == [result.failed[0][1]]
    assert "broken.mp4" in result.failed[0][0]


def test_points_have_what_the_file_promises(result: FrontierResult) -> None:
    content: Any = result.to_json()
    assert len(content["points"]) == len({(p["arm"], str(p["options"])) for p in content["points"]}) == 3 * 14
    for point in content["points"]:
        assert {
            "rule",
            "options",
            "run_lengths",
            "tokens_kept",
            "flops",
            "top1_agreement",
            "agreement_interval",
        } <= set(point)
        assert {"kl", "feature_cosine", "accuracy"} <= set(point)
        low, high = point["agreement_interval"]
        assert 0 <= low <= point["top1_agreement"] <= high <= 1
        assert point["seeds"] == (2 if point["arm"].startswith("random") else 1)
    assert sum(group["points"][0]["tokens_kept"] > 0 for group in content["by_motion"].values()) == 3
    limits = [group["tokens_kept_up_to"] for group in content["by_motion"].values()]
    assert limits == sorted(limits)


def test_arms_of_one_level_spend_alike(result: FrontierResult) -> None:
    by = {(p.arm.family, str(getattr(p.arm.rule, "like", p.arm.rule))): p.means for p in result.points}
    for threshold in (0.1, 0.6):
        paper = by["paper", str(Threshold(threshold))]
        assert by["random", str(Threshold(threshold))]["tokens_kept"] == pytest.approx(paper["tokens_kept"])
        assert by["aware", str(Threshold(threshold))]["flops"] == paper["flops"]
        assert by["token merging", str(Threshold(threshold))]["flops"] == pytest.approx(paper["flops"], rel=0.25)


def test_paired_differences_are_of_the_same_videos(result: FrontierResult) -> None:
    rows: Any = result.differences("aware")
    assert len(rows) == 3 * 13
    points = {
        (p.arm.family, getattr(getattr(p.arm.rule, "like", p.arm.rule), "threshold", None)): p for p in result.points
    }
    for row in rows:
        name, value = row["level"]
        if name == "threshold":
            ours, theirs = points["aware", value], points[row["minus"], value]
            assert row["kl"] == pytest.approx(ours.means["kl"] - theirs.means["kl"])
            assert row["kl_interval"][0] <= row["kl"] + 1e-12
            assert row["kl"] <= row["kl_interval"][1] + 1e-12


def test_what_was_measured_is_not_measured_twice(
    manifest: Manifest, result: FrontierResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def run(arms: list[FrontierArm], model: rlt.VisionTransformer | None = None) -> FrontierResult:
        seen.clear()
        return measure_frontier(model or tiny_model(), manifest, SETTINGS, arms, cache=tmp_path)

    def counted(path: str, *args: Any, **options: Any) -> Any:
        seen.append(path)
        return read_evaluation_clips(path, *args, **options)

    monkeypatch.setattr(measure, "read_evaluation_clips", counted)
    run(ARMS[:3])
    assert len(seen) == 5
    again = run(ARMS)
    assert len(seen) == 5  # arms that are new
    complete = run(ARMS)
    assert seen == [manifest.entries[4].path]  # only what cannot be read is tried again
    for found in (again, complete):
        for ours, theirs in zip(found.points, result.points, strict=True):
            assert ours.means == pytest.approx(theirs.means)
    next(tmp_path.rglob("*.npz")).write_bytes(b"cut off")
    run(ARMS)
    assert len(seen) == 2
    other = tiny_model()
    other.head.weight.data.mul_(2)
    run(ARMS[:3], other)
    assert len(seen) == 5


def test_the_model_is_as_it_was(manifest: Manifest) -> None:
    model = tiny_model(run_lengths="pooling").train()
    model.merge_per_block = 3
    measure_frontier(model, manifest, SETTINGS, ARMS[:1], max_videos=1)
    assert (model.training, model.run_lengths, model.merge_per_block) == (True, "pooling", 3)


def test_nothing_to_measure_is_one_line(manifest: Manifest) -> None:
    broken = Manifest(manifest.entries[4:], NAMES)
    with pytest.raises(VideoError, match="none of 1 videos can be read; the first"):
        measure_frontier(tiny_model(), broken, SETTINGS, ARMS)
    with pytest.raises(InvalidArgumentError, match="no thresholds and no keep_ratios"):
        default_arms((), ())
    with pytest.raises(InvalidArgumentError, match="seeds is 0"):
        default_arms(seeds=0)


def test_classes_of_another_data_set_are_refused_as_in_evaluation(manifest: Manifest, tmp_path: Path) -> None:
    pytest.importorskip("hydra")
    model = rlt.create_model("vit_micro", num_classes=2)
    model.save_pretrained(tmp_path / "model")
    write_manifest(manifest, tmp_path / "videos.csv")
    config = Config(checkpoint=str(tmp_path / "model"))
    config.model.name, config.data.test = "vit_micro", str(tmp_path / "videos.csv")
    with pytest.raises(InvalidArgumentError, match=r"the model has 2 classes, the manifest \d"):
        frontier_config(config)


def test_ctrl_c_keeps_what_was_measured(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rlt frontier` and `rlt calibrate` end with 130 and one line; the same line goes on, and then nothing is read."""
    pytest.importorskip("hydra")
    rlt.create_model("vit_micro", num_classes=7).save_pretrained(tmp_path / "model")
    write_manifest(Manifest(manifest.entries[:4], NAMES), tmp_path / "videos.csv")
    frontier = [
        "frontier", f"checkpoint={tmp_path}/model", "model=vit_micro", f"data.test={tmp_path}/videos.csv",
        f"json={tmp_path}/frontier.json", "frontier.thresholds=[0.1]", "frontier.keep_ratios=[]", "frontier.seeds=1",
        "data.clip.num_frames=4", "data.clip.frame_stride=3", "data.clip.size=32",
    ]  # fmt: skip
    calibrate = [
        "calibrate", f"{tmp_path}/videos.csv", "--checkpoint", f"{tmp_path}/model", "--model", "vit_micro",
        "--max-disagreement", "1", "--output", f"{tmp_path}/rule.json", "--frames", "4", "--stride", "3",
        "--size", "32",
    ]  # fmt: skip
    for command, written in ((frontier, tmp_path / "frontier.json"), (calibrate, tmp_path / "rule.json")):
        codes, seen = [], [0]

        def interrupted(*arguments: Any, seen: list[int] = seen, **options: Any) -> Any:
            seen[0] += 1
            if seen[0] == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return read_evaluation_clips(*arguments, **options)

        monkeypatch.setattr(measure, "read_evaluation_clips", interrupted)
        for _ in range(3):
            with pytest.raises(SystemExit) as stop:
                cli.main(command)
            codes.append((stop.value.code or 0, seen[0], written.exists()))
            said = capsys.readouterr().err
            if codes[-1][0]:
                line = f"stopped: what was measured lies in {written}.cache; the same line goes on there"
                assert [text for text in said.splitlines() if not text.startswith(("Measuring: ", "Calib"))] == [line]
        assert codes == [(130, 3, False), (0, 5, True), (0, 5, True)]


def test_a_plot(result: FrontierResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_frontier_plot(result, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")

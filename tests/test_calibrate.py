"""The threshold for a data set: shares that the rule itself gives, and answers that a frontier gives too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rlt
from models import tiny_model
from rlt import PatchSpec, Threshold, cli
from rlt.calibrate import (
    CalibrateSettings,
    Calibration,
    calibrate_agreement,
    calibrate_tokens,
    shares,
    write_calibration_plot,
)
from rlt.data.clips import ViewConfig
from rlt.data.manifest import Manifest, VideoEntry, write_manifest
from rlt.errors import InvalidArgumentError, VideoError
from rlt.evaluation import EvaluationSettings
from rlt.frontier import measure_frontier
from rlt.frontier.arms import FrontierArm
from rlt.loading import stored_config
from rlt.tokens import PatchView, make_rule
from rlt.tokens.aligned import Camera
from rlt.video import ClipSpec, read_spread
from video_factory import write_video

CLIP = ClipSpec(8, 1, size=64)
RULES = [
    Threshold(reference=reference, exposure=exposure)
    for reference in ("previous", "anchor")
    for exposure in ("none", "gain")
] + [Threshold(reference=reference, motion="global") for reference in ("previous", "anchor")]


def picture(video: int, number: int) -> np.ndarray:
    """A square that moves over a gradient which becomes brighter, one of the videos noisier than the other."""
    grey = np.linspace(40, 150, 96)[:, None, None] + np.zeros((96, 96, 3)) + (2 + video) * number
    grey += np.random.default_rng(number).normal(0, 2 * video, grey.shape)
    grey[30:60, 4 * number % 70 : 4 * number % 70 + 20] = 230
    return grey.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    for video in range(4):
        write_video(root / f"{video}.mp4", 20, picture=lambda number, video=video: picture(video, number))
    return root


def kept(folder: Path, rule: rlt.Rule, num_clips: int) -> list[float]:
    """The share of each video by the rule itself."""
    found = []
    for path in sorted(folder.glob("*.mp4")):
        frames = torch.stack([clip.frames for clip in read_spread(path, CLIP, num_clips)])
        found.append(float(rule(PatchView(frames, PatchSpec()), seeds=range(num_clips)).double().mean()))
    return found


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_rule_keeps_what_was_asked_for(rule: Threshold, target: float, folder: Path) -> None:
    settings = CalibrateSettings(rule, CLIP, num_clips=2)
    steps: list[tuple[int, int, str]] = []
    result = calibrate_tokens([folder], target, settings, on_progress=lambda *step: steps.append(step))
    assert result.found.tokens_kept.value == pytest.approx(np.mean(kept(folder, result.rule, 2)), abs=1e-12)
    one_token = 1 / (4 * 2 * 64)
    assert abs(result.found.tokens_kept.value - target) <= (0.02 if rule.reference == "anchor" else one_token)
    assert result.found.tokens_kept.low < target < result.found.tokens_kept.high
    assert result.rule == replace(rule, threshold=result.rule.threshold)
    for step in result.curve[::16]:
        there = replace(rule, threshold=step.threshold)
        assert step.tokens_kept.value == pytest.approx(np.mean(kept(folder, there, 2)), abs=1e-12)
    assert steps == [(done, 4, f"{done - 1}.mp4") for done in range(1, 5)]


@pytest.mark.parametrize("exposure", ["none", "gain"])
@pytest.mark.parametrize("floats", [False, True])
def test_pair_differences_hold_every_mask_with_anchors(exposure: str, floats: bool, folder: Path) -> None:
    clip = rlt.read_clip(folder / "2.mp4", num_frames=8, frame_stride=1, size=64).frames[None]
    spec = PatchSpec(std=(0.5, 0.4, 0.3))
    normalised = (clip.permute(0, 1, 4, 2, 3) / 255 - 0.5) / torch.tensor(spec.std).view(3, 1, 1)
    view = PatchView(normalised if floats else clip, spec)
    thresholds = torch.tensor([0.0, 0.1, 0.237, 0.3, 0.5, 3.0], dtype=torch.float64)
    camera = Camera(exposure=exposure)  # type: ignore[arg-type]
    pairs = view.pair_differences(camera)
    found = shares._anchored_counts(pairs, thresholds).tolist()
    masks = [view.differ(x, reference="anchor", camera=camera) for x in thresholds.tolist()]
    expected = [int(mask.sum()) for mask in masks]
    assert [abs(ours - theirs) <= 2 * floats for ours, theirs in zip(found, expected, strict=True)] == [True] * 6
    assert len(set(found)) >= 3


def write_steps(path: Path, levels: list[int]) -> Path:
    """A lossless video whose tokens all change alike: from one grey level to the next."""
    frames = [np.full((32, 32, 3), level, np.uint8) for level in levels for _ in range(2)]
    write_video(path, len(frames), codec="ffv1", pix_fmt="bgr0", picture=lambda number: frames[number])
    return path


def test_differences_of_one_size_are_kept_or_dropped_together(tmp_path: Path) -> None:
    video = write_steps(tmp_path / "steps.mkv", [10, 10, 10, 20, 30, 50, 50, 50])
    settings = CalibrateSettings(clip=ClipSpec(16, 1, size=32))
    # Of eight time steps the first is kept, four repeat exactly, two change by 10 levels and one by 20.
    for target, share in ((0.5, 0.5), (0.45, 0.5), (0.3, 0.25), (0.25, 0.25), (0.2, 0.25), (0.125, 0.125)):
        result = calibrate_tokens([video], target, settings)
        assert result.found.tokens_kept.value == share
        assert len(rlt.tokenize(read_spread(video, settings.clip)[0], rule=result.rule)) == 32 * share
    with pytest.raises(InvalidArgumentError, match=r"threshold 0, which drops repeats only, keeps 50.0%"):
        calibrate_tokens([video], 0.6, settings)
    with pytest.raises(InvalidArgumentError, match=r"12.5% of its tokens; take 20 frames or more, or --rule budget"):
        calibrate_tokens([tmp_path / "not-even-opened.mp4"], 0.1, settings)


def test_new_scenes_are_kept_at_any_threshold_with_gain(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scene = rng.integers(20, 120, (8, 8, 3)).repeat(8, 0).repeat(8, 1)
    scenes = [scene, 2 * scene]
    write_video(
        tmp_path / "cut.mkv", 8, codec="ffv1", pix_fmt="bgr0", picture=lambda n: scenes[n // 4].astype(np.uint8)
    )
    settings = CalibrateSettings(Threshold(exposure="gain"), ClipSpec(8, 1, size=64))
    with pytest.raises(InvalidArgumentError, match=r"no threshold keeps less than 50.0%.*--rule budget"):
        calibrate_tokens([tmp_path / "cut.mkv"], 0.3, settings)


def test_a_manifest_and_bad_videos(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    paths = [*sorted(folder.glob("*.mp4")), tmp_path / "bad.mp4"]
    entries = [VideoEntry(str(path), 0, "a") for path in paths] + [VideoEntry("gone.mp4", 0, "a", status="missing")]
    write_manifest(Manifest(tuple(entries), ("a",)), tmp_path / "all.csv")
    settings = CalibrateSettings(clip=CLIP)
    result = calibrate_tokens([tmp_path / "all.csv"], 0.5, settings)
    assert result.rule == calibrate_tokens([folder], 0.5, settings).rule
    assert result.num_videos == 4
    assert {Path(path).name for path, _ in result.failed} == {"bad.mp4", "gone.mp4"}
    with pytest.raises(VideoError, match="none of 1 videos can be read"):
        calibrate_tokens([tmp_path / "bad.mp4"], 0.5, settings)


def undecided_model() -> rlt.VisionTransformer:
    """Many classes that lie close together, so that a few tokens decide between them."""
    model = tiny_model(patch_size=8, num_classes=200)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_the_answers_of_a_network(folder: Path, tmp_path: Path) -> None:
    model = undecided_model()
    settings = CalibrateSettings(clip=ClipSpec(4, 2, size=32), num_clips=2)
    thresholds = (0.4, 0.02, 0.1, 0.2, 1.5)
    model.run_lengths = "aware"
    result = calibrate_agreement([folder], 0.2, model, settings, thresholds=thresholds, cache=tmp_path / "cache")
    arms = [FrontierArm("calibrated", Threshold(threshold), "aware") for threshold in sorted(thresholds)]
    entries = tuple(VideoEntry(str(path), 0, "a") for path in sorted(folder.glob("*.mp4")))
    how = EvaluationSettings(clip=settings.clip, views=ViewConfig(2, 1))
    points = measure_frontier(model, Manifest(entries, ("a",)), how, arms).points
    other = [1 - point.agreement.value for point in points]
    assert [step.threshold for step in result.curve] == sorted(thresholds)
    assert [step.disagreement.value for step in result.curve if step.disagreement] == pytest.approx(other)
    assert [step.tokens_kept.value for step in result.curve] == pytest.approx([p.means["tokens_kept"] for p in points])
    fitting = [*(value <= 0.2 for value in other), False].index(False)
    assert 0 < fitting < len(arms)
    assert result.found == result.curve[fitting - 1]
    assert result.rule == Threshold(result.found.threshold)
    assert result.found.disagreement is not None
    assert result.is_certain == (result.found.disagreement.high <= 0.2)
    again = calibrate_agreement([folder], 0.2, model, settings, thresholds=thresholds, cache=tmp_path / "cache")
    assert again.curve == result.curve
    assert any((tmp_path / "cache").rglob("*.npz"))


def test_too_few_videos_are_said_to_be(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, settings = tiny_model(patch_size=16), CalibrateSettings(clip=ClipSpec(4, 2, size=32))
    result = calibrate_agreement([folder], 0.01, model, settings, thresholds=[0])  # exact repeats change nothing
    assert result.found.disagreement is not None
    assert result.found.disagreement.value == 0
    assert 0.4 < result.found.disagreement.high < 0.5
    assert not result.is_certain
    assert result.videos_needed == 381
    assert rlt.evaluation.statistics.wilson_interval(0, 381).high <= 0.01
    assert rlt.evaluation.statistics.wilson_interval(0, 380).high > 0.01
    torch.manual_seed(0)
    rlt.create_model("vit_tiny", num_classes=3).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        cli.main(
            ["calibrate", str(folder), "--max-disagreement", "0.5", "--checkpoint", str(tmp_path / "model"), "--frames",
             "4", "--size", "32", "--model", "vit_tiny", "--output", str(tmp_path / "rule.json")]
        )  # fmt: skip
    assert not stop.value.code
    assert "Too few videos to be sure" in capsys.readouterr().out


def test_an_answer_that_changes_at_once(folder: Path) -> None:
    model, settings = undecided_model(), CalibrateSettings(clip=ClipSpec(4, 2, size=32), num_clips=2)
    with pytest.raises(InvalidArgumentError, match=r"already at threshold 1.5 the class differs in .*--rule none"):
        calibrate_agreement([folder], 0.01, model, settings, thresholds=[2, 1.5])
    with pytest.raises(InvalidArgumentError, match="thresholds are none"):
        calibrate_agreement([], 0.5, tiny_model(), thresholds=[])
    with pytest.raises(InvalidArgumentError, match="max_disagreement is 0"):
        calibrate_agreement([], 0, tiny_model())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "rule.json"], "neither --target-keep nor --max-disagreement is given"),
        (["--output", "rule.json", "--target-keep", "0.5", "--max-disagreement", "0.1"], "give one of them"),
        (["--output", "rule.txt", "--target-keep", "0.5"], "rule.txt: a rule file ends in .json"),
        (["--output", "rule.json", "--max-disagreement", "0.1"], "add --checkpoint"),
        (["--output", "rule.json", "--target-keep", "0.5", "--run-lengths", "aware"], "give one of them"),
        (["--output", "rule.json", "--target-keep", "0"], "target_keep is 0"),
        (["--output", "rule.json", "--target-keep", "0.5", "--size", "70"], "not a multiple of patch_size"),
    ],
)
def test_the_command_line_says_what_is_missing(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["calibrate", str(folder), *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def calibrated(folder: Path, path: Path, target: str = "0.5") -> Calibration:
    result = calibrate_tokens([folder], float(target), CalibrateSettings(clip=CLIP))
    result.write_rule(path)
    assert make_rule(str(path)) == result.rule
    return result


def test_the_measuring_commands_take_the_file(folder: Path, tmp_path: Path) -> None:
    rule, numbers = tmp_path / "rule.json", tmp_path / "numbers.json"
    result = calibrated(folder, rule)
    about = json.loads(rule.read_text())
    assert about["rule"] == {
        "rule": "rlt", "threshold": result.rule.threshold, "reference": "previous", "exposure": "none", "motion": "none"
    }  # fmt: skip
    assert about["target_keep"] == 0.5
    assert about["videos"] == 4
    for command in (
        ["compare", str(folder), "--model", "vit_tiny", "--repeats", "1"],
        ["inspect", str(folder), "--output", str(tmp_path / "out")],
        ["benchmark", "embed", str(folder), "--model", "vit_tiny", "--clips", "1", "--rounds", "1"],
    ):
        sizes = ["--frames", "8", "--stride", "1", "--size", "64", "--rule", str(rule), "--json", str(numbers)]
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, *sizes])
        assert not stop.value.code, command
        found = json.loads(numbers.read_text())
        if command[0] == "compare":
            assert found["tokens_kept"] == pytest.approx(result.found.tokens_kept.value)
        if command[0] == "inspect":
            assert {video["threshold"] for video in found["videos"]} == {result.rule.threshold}
        if command[0] == "benchmark":
            assert found["settings"]["threshold"] == result.rule.threshold


def test_training_and_evaluation_take_the_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    from rlt.conf import compose
    from rlt.evaluation.run import evaluate_config, evaluation_config
    from rlt.training.run import train

    monkeypatch.chdir(tmp_path)
    first, second = calibrated(folder, Path("first.json")), calibrated(folder, Path("second.json"), "0.3")
    entries = [VideoEntry(str(path), n % 2, "ab"[n % 2]) for n, path in enumerate(sorted(folder.glob("*.mp4")))]
    entries = [VideoEntry(e.path, e.label_id, e.label, 20, 25.0, 96, 96, 0.8) for e in entries]
    write_manifest(Manifest(tuple(entries), ("a", "b")), "all.parquet")
    overrides = [
        "data=folder", "model=vit_tiny", "logger=none", "data.clip.num_frames=8", "data.clip.frame_stride=1",
        "data.clip.size=64", "data.train=all.parquet", "trainer.accelerator=cpu", "trainer.batch_size=2",
        "trainer.max_steps=1", "tokenizer.rule=first.json", "run_dir=run",
    ]  # fmt: skip
    train(compose(overrides), overrides=overrides, say=lambda _: None)
    Path("first.json").unlink()  # a run does not need it any more
    plain = evaluate_config(evaluation_config(["checkpoint=run", "data.test=all.parquet"])).result
    assert plain.settings.rule == first.rule
    assert plain.tokens_kept == pytest.approx(first.found.tokens_kept.value)
    other = evaluation_config(["checkpoint=run", "data.test=all.parquet", "tokenizer.rule=second.json"])
    assert other.tokenizer.build() == second.rule
    assert evaluate_config(other).result.tokens_kept == pytest.approx(second.found.tokens_kept.value)
    assert compose(["tokenizer.rule=second.json", "tokenizer.threshold=0.2"]).tokenizer.build().threshold == 0.2
    assert (stored_config("run").clip_spec, stored_config("run").rule) == (CLIP, first.rule)


def test_the_curve_is_drawn(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, settings = tiny_model(patch_size=16), CalibrateSettings(clip=ClipSpec(4, 2, size=32))
    for name, result in (
        ("share", calibrate_tokens([folder], 0.6, CalibrateSettings(clip=CLIP))),
        ("class", calibrate_agreement([folder], 1.0, model, settings, thresholds=[0.1, 0.4])),
    ):
        write_calibration_plot(result, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        json.dumps(result.to_json(), allow_nan=False)

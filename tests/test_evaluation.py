"""Evaluation against predictions made by hand, and the files it leaves behind."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console, RenderableType

import rlt
from models import TINY, tiny_model
from rlt import Everything, Rule, Threshold
from rlt.cli.experiments import evaluate as evaluate_command
from rlt.cli.show import evaluation_report, paired_report
from rlt.data.clips import ViewConfig
from rlt.data.manifest import Manifest, VideoEntry
from rlt.data.tables import read_table, write_table
from rlt.errors import InvalidArgumentError, MissingDependencyError, VideoError
from rlt.evaluation import (
    EvaluationResult,
    EvaluationSettings,
    compare_predictions,
    evaluate,
    read_predictions,
    write_pictures,
    write_predictions,
)
from rlt.evaluation.predictions import VideoPrediction
from rlt.evaluation.statistics import wilson_interval
from rlt.files import write_json
from rlt.network.flops import count_forward_flops
from rlt.tokens import make_rule
from rlt.video import ClipSpec, read_clips
from video_factory import numbered_picture, write_video

CLIP = ClipSpec(num_frames=4, frame_stride=3, size=32)
VIEWS = ViewConfig(num_clips=3, num_crops=1)
RLT = Threshold(0.1)
NAMES = ("walk", "run", "jump", "sit", "fall [x] $\\_", "wave", "read a very long book about every one of them")
NUM_VIDEOS = 6


def picture(video: int, number: int) -> np.ndarray:
    """Numbers count on in the upper half of a picture of its own colour; the lower half stands still."""
    moving = numbered_picture(number * (video + 1))
    moving[48:] = (40 * video, 255 - 40 * video, 100)
    return moving


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("videos")
    entries = []
    for video in range(NUM_VIDEOS):
        path = folder / f"video_{video}.mp4"
        write_video(path, 24, picture=lambda number, video=video: picture(video, number))
        entries.append(entry(path, video % 3))
    broken = folder / "broken.mp4"
    broken.write_bytes(b"not a video")
    entries.insert(2, entry(broken, 1))
    entries.append(entry(folder / "gone.mp4", 2, status="missing"))
    return Manifest(tuple(entries), NAMES)


def entry(path: Path, label_id: int, status: str = "ok") -> VideoEntry:
    return VideoEntry(str(path), label_id, NAMES[label_id], 24, 25.0, 160, 96, 0.96, status)


def evaluated(
    manifest: Manifest,
    rule: Rule = RLT,
    *,
    model: rlt.VisionTransformer | None = None,
    max_videos: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
    **changes: Any,
) -> EvaluationResult:
    settings = EvaluationSettings(**{"clip": CLIP, "views": VIEWS, "rule": rule, **changes})
    return evaluate(model or tiny_model(), manifest, settings, max_videos=max_videos, on_progress=on_progress)


@pytest.fixture(scope="module")
def result(manifest: Manifest) -> EvaluationResult:
    return evaluated(manifest)


def by_hand(model: rlt.VisionTransformer, path: str) -> tuple[torch.Tensor, list[int]]:
    """Mean of the softmax over the views of one video, view by view, and the tokens of each."""
    clips = read_clips(path, num_clips=3, num_frames=4, frame_stride=3, size=32)
    tokens = [rlt.tokenize(clip, threshold=0.1, patch_size=8) for clip in clips]
    with torch.no_grad():
        views = [model(rlt.pack(view)).double().softmax(-1)[0] for view in tokens]
    return sum(views) / len(views), [len(view) for view in tokens]


def test_predictions_equal_those_made_by_hand(manifest: Manifest, result: EvaluationResult) -> None:
    model, right, right_5 = tiny_model(), 0, 0
    confusion = np.zeros((7, 7), int)
    good = [video for video in manifest.usable if "broken" not in video.path]
    assert [video.path for video in result.predictions] == [video.path for video in good]
    for video, found in zip(good, result.predictions, strict=True):
        expected, counts = by_hand(model, video.path)
        order = expected.argsort(descending=True)[:5]
        assert found.top_ids == tuple(order.tolist())
        assert found.top_probabilities == pytest.approx(expected[order].tolist(), abs=1e-5)
        assert list(found.tokens) == counts
        assert found.tokens_dense == 32
        right += int(order[0] == video.label_id)
        right_5 += int(video.label_id in order)
        confusion[video.label_id, order[0]] += 1
    assert result.top1 == right / NUM_VIDEOS
    assert result.top5 == right_5 / NUM_VIDEOS
    assert np.array_equal(result.confusion, confusion)
    assert len({video.tokens for video in result.predictions}) > 1  # tokens differ between the videos
    assert 0.5 <= result.tokens_kept < 1


def test_failed_videos_are_listed_and_left_out(manifest: Manifest, result: EvaluationResult) -> None:
    assert [Path(path).name for path, _ in result.failed] == ["gone.mp4", "broken.mp4"]
    assert result.failed[0][1] == "missing"
    assert "broken.mp4" in result.failed[1][1]
    assert "\n" not in result.failed[1][1]
    assert result.to_json()["top1_failed_as_wrong"] == result.top1 * NUM_VIDEOS / (NUM_VIDEOS + 2)
    nothing = Manifest((manifest.entries[2], manifest.entries[-1]), NAMES)
    with pytest.raises(VideoError, match=r"none of 2 videos could be evaluated; the first: .*gone"):
        evaluated(nothing)
    with pytest.raises(VideoError, match=r"none of 1 videos could be evaluated; the first: .*gone.mp4: missing"):
        evaluated(Manifest(manifest.entries[-1:], NAMES))


def test_numbers_do_not_depend_on_batches_workers_or_the_run(manifest: Manifest, result: EvaluationResult) -> None:
    assert evaluated(manifest).predictions == result.predictions
    seen: list[tuple[int, int, str]] = []
    batched = evaluated(manifest, batch_videos=4, num_workers=2, on_progress=lambda *step: seen.append(step))
    usable = [Path(entry.path).name for entry in manifest.entries if entry.usable]
    assert seen == [(4, 7, usable[3]), (7, 7, usable[6])]
    assert [video.top_ids for video in batched.predictions] == [video.top_ids for video in result.predictions]
    assert [video.tokens for video in batched.predictions] == [video.tokens for video in result.predictions]
    for ours, theirs in zip(batched.predictions, result.predictions, strict=True):
        assert ours.top_probabilities == pytest.approx(theirs.top_probabilities, abs=1e-5)
    assert batched.failed == result.failed


def test_the_json_holds_what_the_predictions_say(result: EvaluationResult, tmp_path: Path) -> None:
    write_predictions(result.predictions, tmp_path / "a.parquet", class_names=NAMES, settings={"threshold": 0.1})
    write_json(tmp_path / "a.json", result.to_json())
    columns, metadata = read_table(tmp_path / "a.parquet")
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert json.loads(metadata["class_names"]) == list(NAMES)
    assert json.loads(metadata["settings"]) == {"threshold": 0.1}
    assert read_predictions(tmp_path / "a.parquet") == list(result.predictions)
    assert numbers["num_videos"] == len(columns["path"]) == NUM_VIDEOS
    assert numbers["num_clips"] == 3 * NUM_VIDEOS
    assert numbers["top1"] == np.mean(columns["correct"])
    hits = [label in ids for label, ids in zip(columns["label_id"], columns["top_ids"], strict=True)]
    assert numbers["top5"] == np.mean(hits)
    assert numbers["top1_interval"] == wilson_interval(sum(columns["correct"]), NUM_VIDEOS).to_json()
    assert numbers["tokens_kept"] == pytest.approx(np.mean(columns["tokens_kept"]))
    shares = np.array(columns["tokens"]).flatten() / 32
    assert numbers["tokens_kept_spread"] == pytest.approx(shares.std(ddof=1))
    histogram = numbers["tokens_histogram"]
    assert histogram["edges"] == pytest.approx(np.linspace(0, 1, 21))
    assert histogram["clips"] == np.histogram(shares, np.linspace(0, 1, 21) - 1e-9)[0].tolist()
    confusion = np.array(numbers["confusion"])
    for label, predicted in zip(columns["label_id"], columns["predicted_id"], strict=True):
        confusion[label, predicted] -= 1
    assert not confusion.any()
    assert [row["videos"] for row in numbers["per_class"]] == [2, 2, 2, 0, 0, 0, 0]
    assert numbers["per_class"][3]["accuracy"] is None
    assert numbers["mean_class_accuracy"] == pytest.approx(numbers["top1"])  # classes of one size
    assert [Path(failure["path"]).name for failure in numbers["failed"]] == ["gone.mp4", "broken.mp4"]
    assert numbers["settings"]["tokenizer"]["policy"] == "rlt"
    assert numbers["machine"]["torch"] == torch.__version__
    assert numbers["peak_memory"]["bytes"] > 2**20
    assert 0 < numbers["clips_per_second_end_to_end"] < numbers["clips_per_second"]
    assert numbers["seconds"]["wall"] > numbers["seconds"]["decode"] > 0


def test_flops_equal_those_counted_clip_by_clip(manifest: Manifest, result: EvaluationResult) -> None:
    clips = [
        clip
        for video in result.predictions
        for clip in read_clips(video.path, num_clips=3, num_frames=4, frame_stride=3, size=32)
    ]
    kept = sum(count_forward_flops(TINY, rlt.pack(rlt.tokenize(clip, patch_size=8))) for clip in clips)
    everything = rlt.pack(rlt.tokenize(clips[0], rule="none", patch_size=8))
    assert result.flops == kept
    assert result.flops_dense == count_forward_flops(TINY, everything) * len(clips)
    merged = evaluated(manifest, Everything(), model=merging_model(5))
    assert merged.tokens_kept == 1
    assert merged.flops == count_forward_flops(TINY, everything, 5) * len(clips)
    assert merged.flops < merged.flops_dense


def merging_model(merge_per_block: int) -> rlt.VisionTransformer:
    model = tiny_model()
    model.merge_per_block = merge_per_block
    return model


def test_merging_is_that_of_the_network(manifest: Manifest) -> None:
    dense = evaluated(manifest, Everything())
    merged = evaluated(manifest, Everything(), model=merging_model(5))
    assert [video.top_probabilities for video in merged.predictions] != [v.top_probabilities for v in dense.predictions]
    assert merged.to_json()["settings"]["tokenizer"]["merge_per_block"] == 5


def test_the_model_is_left_as_it_was(manifest: Manifest) -> None:
    model = tiny_model().train()
    model.set_drop_path(0.5)
    first = evaluated(manifest, model=model, max_videos=3)
    assert model.training
    assert model.blocks[0].training
    assert evaluated(manifest, model=model, max_videos=3).predictions == first.predictions  # drop path was off


def test_a_few_videos_are_spread_over_the_manifest(manifest: Manifest) -> None:
    few = evaluated(manifest, max_videos=2)
    assert [video.path for video in few.predictions] == [manifest.entries[0].path, manifest.entries[4].path]
    assert evaluated(manifest, max_videos=100).num_videos == NUM_VIDEOS


def test_top_5_of_fewer_classes(manifest: Manifest) -> None:
    torch.manual_seed(1)
    small = Manifest(manifest.entries[:2], NAMES[:3])
    found = evaluated(small, model=rlt.VisionTransformer(TINY.replace(num_classes=3)))
    assert found.top_k == 3
    assert found.top5 == 1.0
    assert found.to_json()["top5_counts_the_best"] == 3
    assert sum(found.predictions[0].top_probabilities) == pytest.approx(1)


def test_outputs_that_are_not_finite_count_as_failed(manifest: Manifest) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(VideoError, match=r"none of 8 videos could be evaluated"):
        evaluated(manifest, model=model)


def test_half_precision_under_autocast(manifest: Manifest, result: EvaluationResult) -> None:
    half = evaluated(manifest, dtype="bfloat16")
    assert half.settings.dtype == "bfloat16"
    for ours, theirs in zip(half.predictions, result.predictions, strict=True):
        assert dict(zip(ours.top_ids, ours.top_probabilities, strict=True))[theirs.predicted_id] == pytest.approx(
            theirs.top_probabilities[0], abs=0.05
        )


def test_accuracies_by_hand(result: EvaluationResult) -> None:
    """Three videos of six classes: right, second place, last place."""
    rankings = ((2, (2, 0, 1, 3, 4)), (0, (2, 0, 1, 3, 4)), (5, (1, 0, 2, 3, 4)))
    videos = tuple(
        VideoPrediction(f"{label}", label, top, (0.3, 0.2, 0.2, 0.1, 0.1), (8,), 8) for label, top in rankings
    )
    found = replace(result, class_names=tuple("abcdef"), predictions=videos)
    assert (found.top1, found.top5, found.top_k) == (1 / 3, 2 / 3, 5)
    assert found.confusion[0] == (0, 0, 1, 0, 0, 0)
    assert found.confusion[5] == (0, 1, 0, 0, 0, 0)
    assert sum(map(sum, found.confusion)) == 3


def test_pictures_are_written(result: EvaluationResult, tmp_path: Path) -> None:
    confusion, tokens = write_pictures(result, tmp_path / "pictures")
    assert [path.name for path in (confusion, tokens)] == ["confusion.png", "tokens.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in (confusion, tokens))
    names = tuple(f"class {index}" for index in range(400))
    videos = tuple(prediction(f"{index}.mp4", index, index) for index in range(400))
    write_pictures(replace(result, class_names=names, predictions=videos), tmp_path / "pictures")  # replaces them


def prediction(path: str, label_id: int, predicted_id: int, tokens: int = 16) -> VideoPrediction:
    other = 1 - predicted_id
    return VideoPrediction(path, label_id, (predicted_id, other), (0.75, 0.25), (tokens, 32), 32)


def test_two_runs_are_compared_video_by_video(tmp_path: Path) -> None:
    outcomes = [(0, 0)] * 5 + [(0, 1)] * 4 + [(1, 0)] + [(1, 1)] * 2  # predicted ids; the label is 0
    first = [prediction(f"{index}.mp4", 0, ours) for index, (ours, _) in enumerate(outcomes)]
    second = [prediction(f"{index}.mp4", 0, theirs, 32) for index, (_, theirs) in enumerate(outcomes)]
    for name, videos in (("a", first), ("b", [*second[::-1], prediction("more.mp4", 1, 1)])):
        write_predictions(videos, tmp_path / f"{name}.parquet", class_names=("x", "y"))
    found = compare_predictions(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert (found.counts.both, found.counts.only_first, found.counts.only_second, found.counts.neither) == (5, 4, 1, 2)
    assert found.same_prediction == 7
    assert found.p_value == 2 * (1 + 5) / 2**5
    assert found.difference.value == 3 / 12
    assert found.difference.low < 0 < found.difference.high
    assert (found.tokens_kept_first, found.tokens_kept_second) == (0.75, 1.0)
    assert found.left_out == ("more.mp4",)
    numbers = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert numbers["num_videos"] == 12
    assert numbers["p_value"] == found.p_value
    text = rendered(paired_report(found))
    assert "p = 0.375" in text
    assert "+25.00 points" in text


def test_the_report_names_numbers_failures_and_the_machine(manifest: Manifest, result: EvaluationResult) -> None:
    text = rendered(evaluation_report(result))
    for part in ("tokenizer rlt", f"{result.top1:.1%}", "tokens kept", "Not evaluated: 2", "gone.mp4", "cores"):
        assert part in text
    assert "dropped nothing" not in text
    idle = evaluated(manifest, make_rule("random", keep_ratio=1.0), max_videos=2)
    assert "dropped nothing" in rendered(evaluation_report(idle))


def rendered(report: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_videos": 0}, "batch_videos is 0; at least 1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"max_videos": 0}, "max_videos is 0"),
        ({"dtype": "float64"}, "dtype is 'float64'; allowed are float32"),
        ({"device": "gpu"}, "device is 'gpu'; cpu or cuda"),
        ({"clip": ClipSpec(num_frames=4, size=33)}, "not a multiple of patch_size=8"),
        ({"model": rlt.VisionTransformer(TINY.replace(num_classes=0))}, "model has 0 classes, the manifest 7"),
        (
            {"model": rlt.VisionTransformer(TINY.replace(labels=("Run", *"bcdefg")))},
            "'run' is class 1 of the manifest and class 0 of the model",
        ),
    ],
)
def test_bad_arguments_are_refused_in_one_line(manifest: Manifest, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        evaluated(manifest, **changes)
    assert "\n" not in str(caught.value)


def test_bad_tables_are_refused_in_one_line(tmp_path: Path) -> None:
    write_predictions([prediction("a.mp4", 0, 0)], tmp_path / "a.parquet", class_names=("x", "y"))
    write_predictions([prediction("b.mp4", 0, 0)], tmp_path / "b.parquet", class_names=("x", "y"))
    write_predictions([prediction("a.mp4", 1, 0)], tmp_path / "c.parquet", class_names=("x", "y"))
    write_predictions([prediction("a.mp4", 1, 0)] * 2, tmp_path / "twice.parquet", class_names=("x", "y"))
    write_table(tmp_path / "other.parquet", {"path": ["a.mp4"]})
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    for name, message in (
        ("b", "have no video in common"),
        ("c", "has label 0 in .* and 1 in"),
        ("twice", "holds a.mp4 twice"),
        ("other", "lacks the columns label_id"),
        ("cut", "is not a whole Parquet file"),
        ("absent", "cannot be read .No such file"),
    ):
        with pytest.raises(InvalidArgumentError, match=message) as caught:
            compare_predictions(tmp_path / "a.parquet", tmp_path / f"{name}.parquet")
        assert "\n" not in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="no predictions to write"):
        write_predictions([], tmp_path / "empty.parquet", class_names=("x", "y"))
    with pytest.raises(InvalidArgumentError, match=r"these columns: .*expected length 1 but got length 0"):
        write_table(tmp_path / "new.parquet", {"a": [1], "b": []})
    with pytest.raises(InvalidArgumentError, match="cannot hold these columns"):
        write_table(tmp_path / "new.parquet", {"a": [1, "x"]})
    assert not (tmp_path / "new.parquet").exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "rlt\[train\]"'):
        write_table(tmp_path / "a.parquet", {"a": [1]})


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(manifest: Manifest, result: EvaluationResult) -> None:
    on_gpu = evaluated(manifest, device="cuda", num_workers=2, batch_videos=3)
    assert [video.tokens for video in on_gpu.predictions] == [video.tokens for video in result.predictions]
    for ours, theirs in zip(on_gpu.predictions, result.predictions, strict=True):
        assert ours.top_probabilities == pytest.approx(theirs.top_probabilities, abs=1e-3)
    assert on_gpu.peak_memory is not None
    assert "device" in on_gpu.peak_memory.meaning


@pytest.mark.parametrize(
    ("option", "needed"), [("predictions=FILE.parquet", "pyarrow"), ("pictures=DIR", "matplotlib")]
)
def test_packages_that_are_used_last_are_asked_for_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, needed: str
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, {"pyarrow": "pyarrow", "matplotlib": "matplotlib.figure"}[needed], None)
    given = [f"checkpoint={tmp_path / 'model'}", "data.test=missing.csv"]
    with pytest.raises(MissingDependencyError, match=needed):
        evaluate_command([*given, option])
    with pytest.raises(InvalidArgumentError, match=r"missing\.csv: no such file"):
        evaluate_command(given)

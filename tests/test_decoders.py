"""The table of decoders: one that a program adds serves every door, and gives what PyAV gives."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import rlt
import video_factory
from rlt.compare import CompareSettings, compare
from rlt.data.augment import AugmentConfig
from rlt.data.clips import ViewConfig, read_evaluation_clips, read_training_clip
from rlt.data.dataset import EvaluationDataset, TrainingDataset
from rlt.data.manifest import Manifest, VideoEntry
from rlt.data.sampler import SampleKey
from rlt.errors import InvalidArgumentError
from rlt.structures import PatchSpec
from rlt.tokens import Threshold
from rlt.video import DECODERS, ClipPlan, ClipSpec, TimedFrame, VideoFile, iter_clips, read_clip, read_clips, read_views
from rlt.video.sampling import nearest_in_time

SPEC = ClipSpec(4, 3, size=32)
CLIP = {"num_frames": 4, "frame_stride": 3, "size": 32}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoders") / "video.mp4"
    video_factory.write_video(path, 60, options={"g": "20"})
    return path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that the decoder "whole" was asked for: it never seeks, but decodes from the beginning of the video."""
    called: list[str] = []

    def frames_at(file: VideoFile, moments: Iterable[Fraction], /) -> Iterator[TimedFrame]:
        called.append(file.name)
        return nearest_in_time(file.decode(0), moments, file.frame_ticks)

    monkeypatch.setitem(DECODERS, "whole", frames_at)
    return called


def entry(path: Path) -> VideoEntry:
    return VideoEntry(str(path), 0, "class", 60, 25.0, 160, 96, 2.4)


def plan(file: VideoFile) -> list[ClipPlan]:
    return [ClipPlan((3, file.num_frames - 1))]


DOORS = {
    "read_clip": lambda path, decoder: [read_clip(path, **CLIP, start=1.0, decoder=decoder)],
    "read_clips": lambda path, decoder: read_clips(path, num_clips=3, **CLIP, decoder=decoder),
    "iter_clips": lambda path, decoder: list(iter_clips(path, **CLIP, decoder=decoder)),
    "read_views": lambda path, decoder: read_views(path, plan, decoder=decoder)[0],
    "training": lambda path, decoder: [read_training_clip(path, SPEC, AugmentConfig(), seed=1, decoder=decoder)],
    "evaluation": lambda path, decoder: read_evaluation_clips(path, SPEC, ViewConfig(2, 3), decoder=decoder),
    "training data": lambda path, decoder: [
        TrainingDataset([entry(path)], SPEC, AugmentConfig(), decoder=decoder)[SampleKey(0, 0)]
    ],
    "evaluation data": lambda path, decoder: (
        EvaluationDataset([entry(path)], SPEC, ViewConfig(1, 1), Threshold(), PatchSpec(), decoder=decoder)[0].tokens
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_reads_with_the_decoder_of_that_name(door: str, video: Path, calls: list[str]) -> None:
    theirs = DOORS[door](video, "whole")
    assert set(calls) == {str(video)}
    calls.clear()
    ours = DOORS[door](video, "pyav")
    assert calls == []
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        pixels = [getattr(item, "frames", getattr(item, "patches", None)) for item in (one, other)]
        assert torch.equal(*pixels)
    with pytest.raises(InvalidArgumentError) as caught:
        DOORS[door](video, "pyva")
    assert (
        str(caught.value) == "decoder is 'pyva'; allowed are pyav, pyav_whole, torchcodec, whole; did you mean 'pyav'?"
    )


def test_compare_reads_with_it(video: Path, calls: list[str]) -> None:
    settings = CompareSettings(model="vit_tiny", clip=ClipSpec(4, size=32), repeats=1, decoder="whole")
    numbers = compare([video], settings).to_json()
    assert calls
    assert numbers["settings"]["decoder"] == "whole"  # type: ignore[index]
    again = compare([video], dataclasses.replace(settings, decoder="pyav")).to_json()
    assert again["tokens"] == numbers["tokens"]
    with pytest.raises(InvalidArgumentError, match="decoder is 'opencv'"):
        compare([Path("not-even-opened.mp4")], dataclasses.replace(settings, decoder="opencv"))


def test_inspect_reads_with_it(video: Path, calls: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rlt.inspection import inspect_video

    reports = [inspect_video(video, tmp_path / name, **CLIP, decoder=name) for name in ("pyav", "whole")]
    assert calls
    assert json.dumps(reports[0].to_json()["clips"]) == json.dumps(reports[1].to_json()["clips"])


def test_evaluate_reads_with_it(video: Path, calls: list[str]) -> None:
    from rlt.evaluation import EvaluationSettings, evaluate

    torch.manual_seed(0)
    config = rlt.ViTConfig(width=24, depth=1, num_heads=2, mlp_width=48, num_classes=2, num_frames=4, image_size=32)
    manifest = Manifest((entry(video),), ("class", "other"))
    results = [
        evaluate(rlt.VisionTransformer(config), manifest, EvaluationSettings(SPEC, ViewConfig(1, 1), decoder=decoder))
        for decoder in ("pyav", "whole")
    ]
    assert calls == [str(video)]
    assert results[0].tokens_kept == results[1].tokens_kept
    assert results[1].to_json()["settings"]["decoder"] == "whole"  # type: ignore[index]


def test_the_configuration_names_the_decoder(calls: list[str]) -> None:
    pytest.importorskip("hydra")
    from rlt.conf import compose

    assert compose([]).data.decoder == "pyav"
    assert compose(["data.decoder=whole"]).data.decoder == "whole"
    with pytest.raises(InvalidArgumentError, match=r"data\.decoder is 'torchcodek'.*did you mean 'torchcodec'\?"):
        compose(["data.decoder=torchcodek"])


def test_the_configuration_of_a_clip_is_a_clip_spec() -> None:
    pytest.importorskip("hydra")
    from rlt.conf import compose

    assert compose([]).data.clip == ClipSpec()
    assert compose(["data=ssv2", "data.clip.num_frames=8"]).data.clip == ClipSpec(8, sampling="uniform")
    given = ["data.clip.fps=6", "data.clip.size=[64,96]"]
    assert compose(given).data.clip == ClipSpec(fps=6.0, size=(64, 96))
    for wrong, words in {"size=abc": "size is abc", "size=null": "size is None", "fps=0": "fps is 0"}.items():
        with pytest.raises(InvalidArgumentError, match=words):
            compose([f"data.clip.{wrong}"])


def test_a_stride_and_a_rate_are_not_typed_together() -> None:
    """What is typed undoes the other of an experiment or of a run, also of one that wrote a stride beside a rate."""
    pytest.importorskip("hydra")
    from rlt.conf import compose

    for both in (["data.clip.frame_stride=2", "data.clip.fps=5"], ["data.clip={frame_stride: 2, fps: 5}"]):
        with pytest.raises(InvalidArgumentError, match=r"frame_stride is 2 and data\.clip\.fps is 5; give one"):
            compose(both)
    before = {"data": {"clip": {"frame_stride": 4, "fps": 5.0}}}
    for typed, run, expected in (
        (["data.clip={fps: 5}"], {}, ClipSpec(fps=5.0)),
        (["data.clip.fps=5", "data.clip.frame_stride=null"], {}, ClipSpec(fps=5.0)),
        (["experiment=ucf_small", "data.clip.fps=5"], {}, ClipSpec(fps=5.0, size=112)),
        ([], before, ClipSpec(fps=5.0)),
        (["data.clip.frame_stride=2"], before, ClipSpec(frame_stride=2)),
        (["data.clip.fps=null"], before, ClipSpec(frame_stride=4)),
        (["data.clip.fps=3"], {"data": {"clip": {"frame_stride": 2, "fps": None}}}, ClipSpec(fps=3.0)),
    ):
        assert compose(typed, run=run).data.clip == expected

"""The script of the reference network: no source is on both sides of a split, and its runs chain and repeat nothing."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from video_factory import write_video

pytest.importorskip("lightning")

import rlt
from rlt.checkpoints.models import MODELS
from rlt.data.manifest import read_manifest

ROOT = Path(__file__).parents[1]
SMALLEST = (
    "data.clip.num_frames=4", "data.clip.size=32", "data.num_workers=0", "trainer.batch_size=2", "logger=none",
    "trainer.max_steps=1",
)  # fmt: skip


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script with stages of one small step each, writing its numbers into a folder of the test."""
    found = runpy.run_path(str(ROOT / "scripts" / "reference_model.py"))
    variables = found["main"].__globals__
    stages = [stage._replace(overrides=(*stage.overrides, *SMALLEST)) for stage in variables["STAGES"]]
    monkeypatch.setitem(variables, "STAGES", tuple(stages))
    monkeypatch.setitem(MODELS, "vit_micro", MODELS["vit_micro"].replace(depth=1))
    monkeypatch.setitem(variables, "SHORT_SIDE", 32)
    monkeypatch.setitem(variables, "ROOT", tmp_path)
    return variables


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two data sets of two classes, with names like those of the real ones."""
    folder = tmp_path / "data"
    for dataset, classes, names in (
        (
            "ucf6",
            ("Archery", "Surfing"),
            {"train": ("v_A_g01_c01.avi", "v_A_g10_c01.avi"), "val": ("v_A_g06_c02.avi",)},
        ),
        ("surveillance", ("fight", "noFight"), {"train": ("fi001.mp4", "fi058.mp4"), "val": ("fi076.mp4",)}),
    ):
        for split, files in names.items():
            for label in classes:
                for name in files:
                    path = folder / dataset / split / label / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_video(path, 12, codec="mpeg4")
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v_Archery_g08_c01.avi", False),
        ("v_Archery_g09_c07.avi", True),
        ("v_HorseRace_g10_c01.avi", True),
        ("v_HorseRace_g01_c10.avi", False),
        ("fi057.mp4", False),
        ("nofi058.mp4", True),
    ],
)
def test_whole_groups_and_ranges_are_left_for_choices(script: dict[str, Any], name: str, expected: bool) -> None:
    assert script["is_for_choice"](name) == expected


def test_manifests_of_all_parts(script: dict[str, Any], data: Path, tmp_path: Path) -> None:
    script["write_manifests"](data, ["ucf6", "surveillance"], tmp_path / "made")
    manifests = tmp_path / "made" / "manifests"
    classes = ("Archery", "Surfing", "fight", "noFight")
    paths = {}
    for part in ("fit", "choice", "test", "train"):
        manifest, small = (
            read_manifest(manifests / f"{part}.parquet"),
            read_manifest(manifests / "small" / f"{part}.parquet"),
        )
        assert manifest.class_names == small.class_names == classes
        assert [entry.label for entry in manifest.entries] == [Path(entry.path).parent.name for entry in small.entries]
        assert {Path(entry.path).suffix for entry in small.entries} == {".mkv"}
        of_one = [read_manifest(manifests / f"{part}-{name}.parquet") for name in ("ucf6", "surveillance")]
        assert {entry for one in of_one for entry in one.entries} == {*manifest.entries}
        paths[part] = {entry.path for entry in manifest.entries}
    assert paths["fit"] | paths["choice"] == paths["train"]
    assert not paths["fit"] & paths["choice"]
    assert not paths["train"] & paths["test"]


def test_networks_are_trained_stage_by_stage_and_not_twice(
    script: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["reference_model.py", str(data), "--output", str(tmp_path / "made")])
    script["main"]()
    without, whole = (
        json.loads((tmp_path / "docs" / "results" / f"reference-joint{name}.json").read_text()) for name in ("-fit", "")
    )
    assert (without["videos"], whole["videos"]) == (4, 8)
    assert [stage["steps"] for stage in whole["stages"].values()] == [1, 1, 1]
    assert whole["stages"]["few-tokens"]["tokens_kept"] < 0.5 < whole["stages"]["dense"]["tokens_kept"]
    for result, parts in ((without, ("choice", "test")), (whole, ("test",))):
        for stage in result["stages"].values():
            assert set(stage["accuracy"]) == {f"{part}-{name}" for part in parts for name in ("ucf6", "surveillance")}
            assert all(count["videos"] == 2 and 0 <= count["right"] <= 2 for count in stage["accuracy"].values())
    folder = tmp_path / "made" / "joint"
    first, last = (rlt.VisionTransformer.from_pretrained(folder / stage / "model") for stage in ("few-tokens", "dense"))
    moved = (first.head.weight - last.head.weight).abs().max()
    assert 0 < moved < 0.01  # the second stage goes on from the first one
    assert last.config.labels == ("Archery", "Surfing", "fight", "noFight")

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a finished run is not repeated")

    monkeypatch.setitem(script, "train", fail)
    script["main"]()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--until", "few-tokens", "--parts", "train"])
    script["main"]()
    whole = json.loads((tmp_path / "docs" / "results" / "reference-joint.json").read_text())
    assert list(whole["stages"]) == ["mixed", "few-tokens"]

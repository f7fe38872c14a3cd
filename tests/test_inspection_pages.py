"""Pages of several inspections, and the threshold that moves on the page of one."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

import rlt
from rlt import assets
from rlt.errors import InvalidArgumentError
from rlt.inspection import inspect_video, inspect_videos
from rlt.inspection.scan import bend_of_curve
from rlt.video import iter_clips
from rlt.video.geometry import cut_away
from video_factory import write_frames

CLIP = {"num_frames": 8, "frame_stride": 1, "size": 64}


def moving(columns: int, num_frames: int = 16) -> np.ndarray:
    """64x64, of which so many of the four columns of patches are new in every frame."""
    rng = np.random.default_rng(columns)
    frames = np.full((num_frames, 64, 64, 3), 90, dtype=np.uint8)
    frames[:, :, : 16 * columns] = rng.integers(0, 256, (num_frames, 64, 16 * columns, 3), dtype=np.uint8)
    return frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos that keep 1, 1/4 and 5/8 of their tokens, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for name, columns in (("a.mkv", 4), ("sub/b <i>&'\"#?.mkv", 0), ("c.mkv", 2)):
        (folder / name).parent.mkdir(exist_ok=True)
        write_frames(folder / name, moving(columns))
    (folder / "z.mkv").write_bytes(b"nothing")
    return folder


def test_the_index_sorts_by_savings_and_links_every_page(folder: Path, tmp_path: Path) -> None:
    result = inspect_videos([folder], tmp_path / "out", **CLIP)
    assert [report.tokens_kept for report in result.by_savings] == [0.25, 0.625, 1.0]
    numbers = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    shares = [0.25, 0.625, 1.0]
    assert numbers["summary"]["mean_tokens_kept"] == statistics.fmean(shares)
    assert numbers["summary"]["deviation_tokens_kept"] == statistics.stdev(shares)
    assert (numbers["summary"]["least_tokens_kept"], numbers["summary"]["most_tokens_kept"]) == (0.25, 1.0)
    assert result.to_json()["summary"] == numbers["summary"]
    assert [video["tokens_kept"] for video in numbers["videos"]] == shares
    assert "z.mkv" in numbers["failed"][0]["error"]
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"]*)"', text)
    assert links == ["sub/b%20%3Ci%3E%26%27%22%23%3F.mkv/index.html", "c.mkv/index.html", "a.mkv/index.html"]
    assert all((tmp_path / "out" / video["page"]).is_file() for video in numbers["videos"])
    assert "<i>" not in text
    assert "<script" not in text
    for fact in ("62.5%", "from 25.0% to\n100.0%", "37.5%", "z.mkv"):
        assert fact in text


def test_an_index_takes_the_place_of_ours_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("my site")
    with pytest.raises(InvalidArgumentError, match=r"index\.html exists and was not made by rlt inspect"):
        inspect_videos([folder], tmp_path, **CLIP)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]  # found before any work
    (tmp_path / "report.json").write_text('{"made_by": "rlt inspect"}')
    inspect_videos([folder / "c.mkv", folder / "a.mkv"], tmp_path, **CLIP)
    assert "2 videos" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_the_slider_holds_what_every_threshold_keeps(tmp_path: Path) -> None:
    report = inspect_video(assets.path(), tmp_path, size=64, threshold=0.2)
    text = report.paths["index.html"].read_text(encoding="utf-8")
    found = re.search(r"const \{ curve, tokens \} = (\{.*\});", text)
    assert found is not None
    held = json.loads(found.group(1))
    frames = [clip.frames for clip in iter_clips(assets.path(), size=64)]
    masks_at = {at: [rlt.keep_mask(clip[None], threshold=at) for clip in frames] for at in (0.0, 0.05, 0.2)}
    assert held["tokens"] <= sum(mask.numel() for mask in masks_at[0.2])  # steps that only repeat the end are left out
    kept = dict(map(tuple, held["curve"]))
    assert kept[0.2] == report.scan.num_kept
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    for at, masks in masks_at.items():
        repeated = sum(mask.numel() for mask in masks) - held["tokens"]
        assert 0 <= sum(int(mask.sum()) for mask in masks) - kept[at] <= repeated
    shown = re.search(r'max="(\d+)" value="(\d+)"', text)
    assert shown is not None
    assert int(shown.group(1)) == len(held["curve"]) - 1
    assert held["curve"][int(shown.group(2))][0] == 0.2
    assert f"keeps {report.tokens_kept:.1%}: {report.scan.num_kept:,} of" in text


def test_what_was_cut_away_and_repeated_is_said(tmp_path: Path) -> None:
    wide = np.zeros((10, 64, 128, 3), dtype=np.uint8)
    wide[:, ::2] = 200
    report = inspect_video(write_frames(tmp_path / "wide.mkv", wide), tmp_path / "out", **CLIP)
    assert report.cut_away == (0.0, 0.5)
    assert report.scan.num_repeated == 6
    numbers = report.to_json()
    assert numbers["cut_away"] == {"height": 0.0, "width": 0.5}
    assert numbers["num_repeated"] == 6
    text = " ".join(report.paths["index.html"].read_text(encoding="utf-8").split())
    assert "50% of it is cut away, half of that at the left and at the right each." in text
    assert "whose last frame is repeated there (6 frames)" in text
    whole = inspect_video(write_frames(tmp_path / "fit.mkv", moving(1)), tmp_path / "fit", **CLIP)
    plain = whole.paths["index.html"].read_text(encoding="utf-8")
    assert "cut away" not in plain
    assert "repeated there" not in plain


@pytest.mark.parametrize(
    ("source", "size", "expected"),
    [
        ((1280, 720), 224, (0.0, 1 - 224 / 398)),
        ((720, 1280), 224, (1 - 224 / 398, 0.0)),
        ((224, 224), 224, (0.0, 0.0)),
        ((1280, 720), None, (0.0, 0.0)),
        ((1280, 720), (224, 384), (0.0, 1 - 384 / 398)),
    ],
)
def test_cut_away(source: tuple[int, int], size: object, expected: tuple[float, float]) -> None:
    assert cut_away(*source, size) == pytest.approx(expected)  # type: ignore[arg-type]


def test_the_bend_of_a_curve() -> None:
    thresholds = [index / 10 for index in range(11)]
    assert bend_of_curve(thresholds, [1.0, 0.6, 0.3, *([0.2] * 8)]) == 0.3
    assert bend_of_curve(thresholds, [1.0] * 11) is None
    assert bend_of_curve(thresholds, [1 - at for at in thresholds]) is None
    # Of exp(-x / s) the bend lies where its slope is that of the line between its ends.
    scale = 0.12
    fine = np.linspace(0, 1, 100_001)
    slope = 1 - np.exp(-1 / scale)
    assert bend_of_curve(fine.tolist(), np.exp(-fine / scale).tolist()) == pytest.approx(
        -scale * np.log(scale * slope), abs=1e-4
    )

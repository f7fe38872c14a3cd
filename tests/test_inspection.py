"""`inspect_video`: what the pictures, the video, the page and the numbers say, held against the definitions."""

from __future__ import annotations

import ast
import base64
import dataclasses
import io
import json
import sys
import weakref
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import oracles
import rlt
from rlt import assets
from rlt.errors import InvalidArgumentError, MissingDependencyError, TruncatedVideoWarning, VideoError
from rlt.inspection import FILES, InspectReport, charts, entry, inspect_video, inspect_videos, passes, sampled_starts
from rlt.inspection.charts import (
    CAPTION_HEIGHT,
    GAP,
    draw_contact_sheet,
    draw_run_lengths,
    draw_tokens_against_threshold,
    draw_tokens_over_time,
    shown_steps,
)
from rlt.inspection.passes import clip_views, read_at, window
from rlt.inspection.scan import ScanResult, curve_thresholds
from rlt.inspection.views import ClipSettings, ClipView, dim_dropped, display_size
from rlt.plots import save_figure
from rlt.video import VideoFile, VideoInfo, iter_clips, probe, read_clip
from video_factory import write_frames

FPS = 10
SETTINGS = ClipSettings(num_frames=8, frame_stride=1, size=64)
CLIP = {"num_frames": 8, "frame_stride": 1, "size": 64}


def half_moving(num_frames: int, side: int, *, moves_from: int = 0) -> np.ndarray:
    """The left half stands still; the right half is new in every frame from `moves_from` on."""
    rng = np.random.default_rng(0)
    block = side // 16
    noise = rng.integers(0, 256, (num_frames + 1, 16, 16, 3), dtype=np.uint8).repeat(block, 1).repeat(block, 2)
    frames = noise[:1].repeat(num_frames, 0)
    frames[moves_from:, :, side // 2 :] = noise[moves_from + 1 :, :, side // 2 :]
    return frames


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4.4 s of 128x128: still for 1.6 s, then the right half moves. Five whole clips and one half of one."""
    return write_frames(tmp_path_factory.mktemp("video") / "half.mkv", half_moving(44, 128, moves_from=16))


@pytest.fixture(scope="module")
def report(video: Path, tmp_path_factory: pytest.TempPathFactory) -> InspectReport:
    return inspect_video(video, tmp_path_factory.mktemp("output") / "deep" / "folder", **CLIP)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the pictures and one clip of overlay, for tests that look at neither."""
    monkeypatch.setattr(entry, "save_figure", lambda _, path: Image.new("RGB", (1, 1)).save(path))
    for name in ("contact_sheet", "run_lengths", "tokens_over_time", "tokens_against_threshold"):
        monkeypatch.setattr(charts, f"draw_{name}", lambda *_: None)
    for module in (entry, passes):
        monkeypatch.setattr(module, "OVERLAY_SECONDS", 0.8)


def expected_masks(video: Path, threshold: float) -> list[np.ndarray]:
    """Mask of every clip by the oracle, without the steps that only repeat the end of the video."""
    masks = []
    for clip in iter_clips(video, **CLIP):
        real = -(-(len(clip.frames) - clip.num_repeated) // 2)
        masks.append(oracles.keep_mask(clip.frames.numpy(), threshold, 2, 16)[:real])
    return masks


def decode(source: Path | io.BytesIO) -> list[np.ndarray]:
    with av.open(source if isinstance(source, io.BytesIO) else str(source)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_numbers_equal_the_oracle_step_by_step(report: InspectReport, video: Path) -> None:
    masks = expected_masks(video, 0.1)
    assert [len(mask) for mask in masks] == [4, 4, 4, 4, 4, 2]
    assert [clip.kept for clip in report.clips] == [tuple(mask.sum((1, 2)).tolist()) for mask in masks]
    assert [clip.tokens_kept for clip in report.clips] == [0.25, 0.25, 0.625, 0.625, 0.625, 0.75]
    assert report.tokens_kept == np.concatenate(masks).mean() == (2 * 16 + 3 * 40 + 24) / (22 * 16)
    assert report.clips[2].times == pytest.approx([1.6, 1.8, 2.0, 2.2])
    assert report.clips[5].start == pytest.approx(4.0)
    assert report.clips[5].end == pytest.approx(4.3)
    assert report.whole_video
    assert report.grid == (4, 4, 4)


def test_threshold_curve_equals_keep_mask_at_every_threshold(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    levels = 128 + rng.uniform(-1, 1, (16, 4, 4, 1)) * np.linspace(0, 40, 16).reshape(4, 4, 1)  # restless to the right
    noisy = levels.repeat(16, 1).repeat(16, 2).repeat(3, 3).astype(np.uint8)
    video = write_frames(tmp_path / "noisy.mkv", noisy)
    scan = ScanResult(dataclasses.replace(SETTINGS, rule=rlt.Threshold(0.137)), info(1.6, fps=FPS))
    clips = list(iter_clips(video, **CLIP))
    for clip in clips:
        scan.add(clip)
    frames = torch.stack([clip.frames for clip in clips])
    assert len(scan.thresholds) == 102
    assert scan.thresholds == tuple(sorted(scan.thresholds))
    for threshold, share in zip(scan.thresholds, scan.curve, strict=True):
        assert share == rlt.keep_mask(frames, threshold=threshold).double().mean().item()
    assert dict(zip(scan.thresholds, scan.curve, strict=True))[0.137] == scan.tokens_kept
    assert len(set(scan.curve)) > 15  # it falls step by step, or equality would say little
    mask = rlt.keep_mask(frames, threshold=0.137)
    for row, column in np.ndindex(4, 4):
        lengths = rlt.run_lengths(mask[:, :, row : row + 1, column : column + 1])
        assert scan.run_lengths[row, column].item() == pytest.approx(lengths.double().mean().item())


def test_token_differences_are_what_keep_mask_compares() -> None:
    frames = torch.randint(0, 256, (2, 8, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames[0] //= 8
    differences = rlt.tokens.token_differences(frames, tubelet_size=2, patch_size=16)
    assert differences.shape == (2, 3, 2, 3)
    assert differences.dtype == torch.float64
    for threshold in (0.0, float(differences[0, 1, 1, 2]), float(differences.median()), 9.0):  # ties are not kept
        mask = rlt.keep_mask(frames, threshold=threshold)
        assert torch.equal(differences > threshold, mask[:, 1:])
        assert bool(mask[:, 0].all())
    assert rlt.tokens.token_differences(frames[:, :2]).shape == (2, 0, 2, 3)


def test_thresholds_reach_beyond_a_high_one_and_bad_ones_are_named() -> None:
    assert curve_thresholds(0.1)[:2] == (0.0, 0.005)
    assert curve_thresholds(0.1)[-1] == 0.5
    assert curve_thresholds(2.0)[-1] == 2.5
    assert 2.0 in curve_thresholds(2.0)
    with pytest.raises(InvalidArgumentError, match="threshold is inf"):
        curve_thresholds(float("inf"))
    assert 0.1 in curve_thresholds(None)


def test_dimming_touches_dropped_patches_only() -> None:
    frame = torch.randint(0, 256, (8, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True, False, True], [False, True, False]])
    dimmed = dim_dropped(frame, mask)
    for row, column in np.ndindex(2, 3):
        place = np.s_[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        if mask[row, column]:
            assert torch.equal(dimmed[place], frame[place])
            continue
        grey = frame[place].double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
        expected = 0.36 * grey[..., None] + torch.tensor([14, 18, 30])
        assert (dimmed[place] - expected).abs().max() <= 1


def test_contact_sheet_shows_kept_patches_untouched_and_dropped_ones_dimmed(report: InspectReport, video: Path) -> None:
    clip = report.representative
    assert clip is report.clips[2]  # 0.625 is nearest to 0.5, and it is the first of them
    shown = read_clip(video, num_frames=8, frame_stride=1, size=128, start=clip.start).frames.numpy()
    mask = expected_masks(video, 0.1)[2]
    sheet = np.asarray(Image.open(report.paths["contact_sheet.png"]).convert("RGB"))
    for step in range(4):
        top, left = GAP, GAP + step * (128 + GAP)
        for row, column in np.ndindex(4, 4):
            place = np.s_[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            found = sheet[top : top + 128, left : left + 128][place]
            original = shown[2 * step + 1][place]
            if mask[step, row, column]:
                np.testing.assert_array_equal(found, original)
            else:
                assert not np.array_equal(found, original)
                assert found.max() <= 0.36 * 255 + 31
        caption = sheet[top + 128 : top + 128 + CAPTION_HEIGHT, left : left + 128]
        assert caption.min() < 100 < caption.max()  # something is written there


def test_contact_sheet_of_many_steps_is_thinned_out(tmp_path: Path) -> None:
    assert shown_steps(8) == list(range(8))
    assert shown_steps(40)[:2] == [0, 2]
    assert shown_steps(40)[-1] == 39
    assert len(set(shown_steps(40))) == 16
    frames = torch.zeros(7, 32, 32, 3, dtype=torch.uint8)  # an odd number: the last step holds one frame
    view = ClipView(frames, torch.arange(7).double(), torch.ones(4, 2, 2, dtype=torch.bool), 2)
    save_figure(draw_contact_sheet(view), tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").size == (4 * (32 + GAP) + GAP, 32 + CAPTION_HEIGHT + 2 * GAP)


def test_overlay_plays_the_sampled_frames_with_dropped_patches_dimmed(report: InspectReport, video: Path) -> None:
    with av.open(str(report.paths["overlay.mp4"])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", FPS)
        assert (stream.width, stream.height) == (128, 128)
    data = report.paths["overlay.mp4"].read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # starts to play before it is there as a whole
    found = decode(report.paths["overlay.mp4"])
    assert len(found) == report.overlay.num_frames == 44  # the whole video, without its padding
    assert report.overlay.seconds == pytest.approx(4.4)
    masks = np.concatenate([mask.repeat(2, 0) for mask in expected_masks(video, 0.1)])
    originals = np.concatenate(
        [clip.frames.numpy() for clip in iter_clips(video, num_frames=8, frame_stride=1, size=128)]
    )
    for frame, original, mask in zip(found, originals, masks, strict=False):
        expected = dim_dropped(torch.from_numpy(original), torch.from_numpy(mask)).numpy()
        error = np.abs(frame.astype(int) - expected.astype(int)).reshape(4, 32, 4, 32, 3).mean((1, 3, 4))
        assert error.max() < 40  # coloured noise in 4:2:0 with a quantiser is the worst there is for a codec
        brightness = frame.reshape(4, 32, 4, 32, 3).mean((1, 3, 4))
        assert brightness[~mask].max(initial=0) < 0.36 * 255 + 31
        assert brightness[mask].min(initial=255) > 60


def test_charts_show_the_numbers(report: InspectReport) -> None:
    over_time = draw_tokens_over_time(report.scan).axes[0]
    lines = {line.get_label(): line for line in over_time.lines}
    assert lines["dense: every token"].get_ydata()[0] == 100
    assert lines[f"mean: {100 * report.tokens_kept:.1f} %"].get_ydata()[0] == pytest.approx(100 * report.tokens_kept)
    points = {
        (round(float(x), 3), round(float(y), 3))
        for line in over_time.lines
        if line.get_marker() == "o"
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }
    steps = {
        (round(time + 0.1, 3), 100 * share)
        for clip in report.clips
        for time, share in zip(clip.times, clip.shares, strict=True)
    }
    assert points == steps
    against = draw_tokens_against_threshold(report.scan, 0.1).axes[0]
    curve = against.lines[0]
    assert list(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == [
        (threshold, 100 * share) for threshold, share in report.threshold_curve
    ]
    (clips,) = read_at(report.video.source, SETTINGS, clip_views(report.video, SETTINGS), [16])
    view = ClipView.of(clips, SETTINGS)
    heat = draw_run_lengths(view, report.scan).axes[1].images[1]
    seconds = np.asarray(heat.get_array()).reshape(4, 32, 4, 32)
    assert seconds.min((1, 3)).tolist() == seconds.max((1, 3)).tolist()
    np.testing.assert_allclose(seconds[:, 0, :, 0], report.scan.run_lengths * 0.2)
    assert report.scan.run_lengths[0].tolist() == pytest.approx([22 / 6, 22 / 6, 22 / 16, 22 / 16])


class Page(HTMLParser):
    """What a page refers to, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[tuple[str, str]] = []
        self.alternatives: list[str | None] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.sources += [(tag, str(values[name])) for name in ("src", "href", "poster") if name in values]
        if tag == "img":
            self.alternatives.append(values.get("alt"))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_everything_itself(report: InspectReport) -> None:
    text = report.paths["index.html"].read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in "".join(part for part in text.split('"') if not part.startswith("data:"))
    assert page.tags.count("script") == 1  # the threshold that moves; all that it needs stands in it
    assert "link" not in page.tags
    assert [tag for tag, _ in page.sources] == ["video", "img", "img", "img", "img"]
    for tag, source in page.sources:
        kind, _, data = source.partition(",")
        content = io.BytesIO(base64.b64decode(data, validate=True))
        if tag == "img":
            assert kind == "data:image/png;base64"
            assert min(Image.open(content).size) > 100
        else:
            assert kind == "data:video/mp4;base64"
            assert len(decode(content)) == 44
    assert all(alternative and len(alternative) > 20 for alternative in page.alternatives)
    for fact in ("half.mkv", "50.0%", "176 of 352 kept", "ffv1, 128×128, 10 frames a second", "4 × 4 × 4", "4.40 s"):
        assert fact in page.text
    assert "The whole video was looked at, 6 clips on end." in page.text
    assert "prefers-color-scheme: dark" in text


@pytest.mark.usefixtures("quick")
def test_names_are_escaped(video: Path, tmp_path: Path) -> None:
    name = tmp_path / "<b>&$\\x$.mp4"
    name.write_bytes(video.read_bytes())
    report = inspect_video(name, tmp_path / "out", **CLIP)
    text = report.paths["index.html"].read_text(encoding="utf-8")
    page = Page(text)
    assert "<b>" not in text
    assert "b" not in page.tags
    assert page.text.count(name.name) == 2  # title and heading
    assert json.loads(report.paths["report.json"].read_text(encoding="utf-8"))["source"] == str(name)


def test_report_json_holds_the_numbers(report: InspectReport) -> None:
    content = json.loads(report.paths["report.json"].read_text(encoding="utf-8"))
    assert content == report.to_json()
    assert content["tokens_kept"] == report.tokens_kept
    assert content["num_kept"] == sum(sum(clip["kept_per_step"]) for clip in content["clips"])
    assert content["threshold_curve"][20] == {"threshold": 0.1, "tokens_kept": report.tokens_kept}
    assert content["video"] == {
        "codec": "ffv1", "width": 128, "height": 128, "fps": 10.0, "duration": 4.4, "num_frames": 44,
    }  # fmt: skip
    assert content["settings"]["size"] == 64
    assert set(FILES) == {path.name for path in report.paths.values()}
    assert all(path.is_file() for path in report.paths.values())


@pytest.mark.usefixtures("quick")
def test_no_frames_are_held_while_clips_are_counted(
    monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def many_clips(*_: object, **__: object) -> Iterator[list[rlt.Clip]]:
        generator = torch.Generator().manual_seed(0)
        for number in range(60):
            frames = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8, generator=generator)
            times = 0.8 * (number % 5) + torch.arange(8).double() / 10
            seen.append(weakref.ref(frames))
            yield [rlt.Clip(frames, times)]
            del frames
            alive.append(sum(ref() is not None for ref in seen))

    monkeypatch.setattr(passes, "iter_views", many_clips)
    report = inspect_video(video, tmp_path / "out", **CLIP)
    assert len(report.clips) == len(alive) == 60
    assert max(alive) <= 1


@pytest.mark.parametrize("moment", ["counting tokens", "encoding the overlay", "writing the page"])
@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_leaves_everything_as_it_was(video: Path, tmp_path: Path, moment: str) -> None:
    def interrupt(_: int, __: int, what: str) -> None:
        if what == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_video(video, tmp_path / "new" / "deep", on_progress=interrupt, **CLIP)
    assert not (tmp_path / "new").exists()
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for name in FILES:
        (earlier / name).write_text('{"made_by": "rlt inspect"}')
    (earlier / "mine.txt").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        inspect_video(video, earlier, on_progress=interrupt, **CLIP)
    assert {path.name for path in earlier.iterdir()} == {*FILES, "mine.txt"}
    assert {(earlier / name).read_text() for name in FILES} == {'{"made_by": "rlt inspect"}'}


@pytest.mark.usefixtures("quick")
def test_an_earlier_inspection_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    other = write_frames(tmp_path / "other.mkv", half_moving(8, 64))
    first = inspect_video(other, tmp_path / "out", **CLIP)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    second = inspect_video(other, tmp_path / "out", threshold=9.0, **CLIP)
    assert (first.tokens_kept, second.tokens_kept) == (0.625, 0.25)
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["threshold"] == 9.0
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "mine.txt"}


@pytest.mark.usefixtures("quick")
def test_bad_outputs_are_refused_in_one_line_and_nothing_is_lost(video: Path, tmp_path: Path) -> None:
    def refused(output: Path, message: str, source: Path = video) -> None:
        with pytest.raises(InvalidArgumentError, match=message) as error:
            inspect_video(source, output, **CLIP)
        assert "\n" not in str(error.value)

    file = tmp_path / "file"
    file.write_text("mine")
    refused(file, "file is a file; give the name of a folder")
    refused(file / "below", "cannot be written")
    assert file.read_text() == "mine"
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.html").write_text("my site")
    refused(site, "index.html exists and was not made by rlt inspect; choose another")
    assert (site / "index.html").read_text() == "my site"
    made = tmp_path / "made"
    made.mkdir()
    (made / "report.json").write_text('{"made_by": "rlt inspect"}')
    (made / "overlay.mp4").write_bytes(video.read_bytes())
    refused(made, "would be overwritten by its own inspection", made / "overlay.mp4")
    (made / "overlay.mp4").unlink()
    (made / "overlay.mp4").mkdir()
    refused(made, "overlay.mp4 is a folder where a file is to be written")


@pytest.mark.usefixtures("quick")
def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(entry, "write_page", full)
    with pytest.raises(InvalidArgumentError, match="cannot be written \\(No space left on device\\)"):
        inspect_video(video, tmp_path / "out", **CLIP)
    assert not (tmp_path / "out").exists()


def test_bad_videos_and_arguments_leave_no_folder(video: Path, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    for source in (tmp_path / "missing.mp4", tmp_path / "text.mp4"):
        with pytest.raises(VideoError, match=source.name) as error:
            inspect_video(source, tmp_path / "out")
        assert "\n" not in str(error.value)
    for arguments, message in (
        ({"threshold": -1.0}, "threshold is -1.0; 0 or more"),
        ({"size": 60}, "60x60 pixels are not a multiple of patch_size=16; resize or crop to 64x64"),
        ({"num_frames": 7}, "7 frames are not a multiple of tubelet_size=2"),
        ({"frame_stride": 0}, "frame_stride is 0"),
        ({"max_seconds": 0.0}, "max_seconds is 0.0; more than 0"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            inspect_video(video, tmp_path / "out", **{**CLIP, **arguments})
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r'matplotlib, which.*pip install "rlt\[viz\]"') as error:
        inspect_video(video, tmp_path / "out", **CLIP)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_plotting_is_imported_in_one_file_and_only_when_used() -> None:
    for path in Path(rlt.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if {name.partition(".")[0] for name in names} & {"matplotlib", "PIL"}:
                assert node.col_offset > 0, f"{path.name}:{node.lineno} imports a plotting package right away"
                assert path.name == "plots.py" or isinstance(parent_of(tree, node), ast.If)  # for type checkers only


def parent_of(tree: ast.AST, child: ast.AST) -> ast.AST:
    return next(node for node in ast.walk(tree) if child in ast.iter_child_nodes(node))


def info(duration: float, *, fps: float = 25.0, truncated: bool = False) -> VideoInfo:
    return VideoInfo("long.mp4", "h264", 640, 360, fps, duration, round(duration * fps), 0, False, truncated)


def test_long_video_is_sampled_evenly() -> None:
    settings = ClipSettings(16, 4)
    assert sampled_starts(info(600.0), settings, 600.0) is None
    assert sampled_starts(info(7200.0), settings, None) is None
    assert sampled_starts(info(7200.0, truncated=True), settings, 600.0) is None
    starts = sampled_starts(info(7200.0), settings, 600.0)
    assert starts is not None
    assert len(starts) == 234  # times 2.56 s
    assert starts[0] == 0
    assert starts[-1] == pytest.approx(7200 - 61 / 25)
    gaps = np.diff(starts)
    assert gaps.max() - gaps.min() <= 0.04 + 1e-9
    every_frame = ClipSettings(16, 1)
    assert len(sampled_starts(info(7200.0), every_frame, 600.0) or ()) == 300


@pytest.mark.usefixtures("quick")
def test_a_sampled_video_says_so(video: Path, tmp_path: Path) -> None:
    report = inspect_video(video, tmp_path / "out", max_seconds=2.0, **CLIP)
    assert not report.whole_video
    assert [clip.start for clip in report.clips] == pytest.approx([0.0, 3.6])
    assert [clip.tokens_kept for clip in report.clips] == [0.25, 0.625]
    page = Page(report.paths["index.html"].read_text(encoding="utf-8"))
    assert "sampled: 2 clips, spread evenly over it, cover 1.60 s of 4.40 s." in page.text
    assert report.to_json()["whole_video"] is False


def test_the_overlay_of_a_long_video_is_a_window_around_the_representative_clip(video: Path) -> None:
    seen = probe(video)
    scan = ScanResult(SETTINGS, seen)
    for clip in iter_clips(video, **CLIP):
        scan.add(clip)
    assert scan.representative() == 2  # at 1.6 s
    assert window(seen, SETTINGS, scan, 1.0) == range(1)
    assert window(seen, SETTINGS, scan, 2.5) == range(3)
    assert window(seen, SETTINGS, scan, 4.0) == range(-1, 4)
    assert window(seen, SETTINGS, scan, 99.0) == range(-2, 4)
    cut_off = dataclasses.replace(seen, truncated=True)  # the last clip, of which half is there, cannot be read alone
    assert window(cut_off, SETTINGS, scan, 99.0) == range(-2, 3)


def test_frames_are_shown_at_a_readable_size() -> None:
    grid = rlt.TokenGrid(8, 14, 14)
    assert display_size(grid, 16, info(1.0)) == (336, 336)
    small = VideoInfo("small.mp4", "h264", 160, 120, 25.0, 1.0, 25, 0, False, False)
    assert display_size(grid, 16, small) == (224, 224)  # the tokens are made of no more
    assert display_size(rlt.TokenGrid(8, 7, 14), 16, info(1.0)) == (336, 672)
    assert display_size(rlt.TokenGrid(8, 3, 5), 7, small) == (120, 200)


@pytest.mark.filterwarnings("ignore:.*1 frame:rlt.errors.VideoWarning")
def test_one_frame_is_refused_and_one_step_is_not(tmp_path: Path) -> None:
    picture = write_frames(tmp_path / "one.mkv", half_moving(1, 64))
    with pytest.raises(VideoError, match=r"one\.mkv has 1 frame"):
        inspect_video(picture, tmp_path / "out", **CLIP)
    assert not (tmp_path / "out" / "index.html").exists()
    video = write_frames(tmp_path / "two.mkv", half_moving(2, 64))
    short = inspect_video(video, tmp_path / "short", num_frames=2, frame_stride=1, size=64)
    assert short.grid == (1, 4, 4)
    assert short.tokens_kept == 1.0


@pytest.mark.usefixtures("quick")
def test_progress_never_falls_and_reaches_the_end(video: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    inspect_video(video, tmp_path / "out", on_progress=lambda *step: told.append(step), **CLIP)
    assert {total for _, total, _ in told} == {100}
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert (told[0], told[-1]) == ((0, 100, "counting tokens"), (100, 100, "done"))
    assert len({done for done, _, what in told if what == "counting tokens"}) >= 6
    with pytest.raises(InvalidArgumentError, match=r"takes no progress= any more; write on_progress=f"):
        inspect_video(video, tmp_path / "out", progress=lambda *_: None, **CLIP)


@pytest.mark.usefixtures("quick")
def test_bytes_and_open_files(video: Path, tmp_path: Path) -> None:
    report = inspect_video(video.read_bytes(), tmp_path / "bytes", **CLIP)
    assert report.tokens_kept == 0.5
    with video.open("rb") as file:
        assert inspect_video(file, tmp_path / "file", **CLIP).tokens_kept == 0.5


@pytest.mark.parametrize("share", [0.45, 0.6, 0.9])
def test_a_short_file_that_is_cut_off_is_drawn_up_to_the_cut(tmp_path: Path, share: float) -> None:
    whole = assets.path("traffic.mp4").read_bytes()
    source = tmp_path / "cut.mp4"
    source.write_bytes(whole[: int(len(whole) * share)])
    with pytest.warns(TruncatedVideoWarning, match="cut off"):
        report = inspect_video(source, tmp_path / "out", size=64)
    assert 0 < report.overlay.num_frames <= report.scan.clips[-1].end * 12.5 / 4 + 1
    assert all(path.stat().st_size > 0 for path in report.paths.values())


class Counted:
    """How often files were opened since the beginning of a test, and how many frames were decoded from them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.frames = 0, 0
        opening, decoding = VideoFile.__init__, VideoFile._raw_frames

        def opened(file: VideoFile, *arguments: object, **options: object) -> None:
            self.opened += 1
            opening(file, *arguments, **options)

        def decoded(file: VideoFile, packets: Iterator[object]) -> Iterator[object]:
            for frame in decoding(file, packets):
                self.frames += 1
                yield frame

        monkeypatch.setattr(VideoFile, "__init__", opened)
        monkeypatch.setattr(VideoFile, "_raw_frames", decoded)


def test_a_short_video_is_decoded_once(monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path) -> None:
    counted = Counted(monkeypatch)
    report = inspect_video(video, tmp_path / "out", **CLIP)
    assert report.overlay.num_frames == 44
    assert counted.opened == 2  # one of them to see what the file holds
    assert counted.frames == 1 + 44


@pytest.mark.parametrize("max_seconds", [600.0, 2.0])
def test_of_a_long_video_the_overlay_alone_is_decoded_again(
    monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path, max_seconds: float
) -> None:
    whole = inspect_video(video, tmp_path / "once", max_seconds=max_seconds, **CLIP)
    for module in (entry, passes):
        monkeypatch.setattr(module, "OVERLAY_SECONDS", 1.6)
    counted = Counted(monkeypatch)
    long = inspect_video(video, tmp_path / "twice", max_seconds=max_seconds, **CLIP)
    assert long.overlay.num_frames == 16
    assert counted.opened == 3
    assert counted.frames < 1 + 44 + 16 + 12  # a key frame every 12
    numbers = [report.to_json() for report in (whole, long)]
    assert all(content.pop("overlay") for content in numbers)
    assert numbers[0] == numbers[1]
    sheets = [(tmp_path / folder / "contact_sheet.png").read_bytes() for folder in ("once", "twice")]
    assert sheets[0] == sheets[1]


@pytest.mark.usefixtures("quick")
def test_frames_are_not_held_beyond_a_limit(monkeypatch: pytest.MonkeyPatch, video: Path, tmp_path: Path) -> None:
    for module in (entry, passes):
        monkeypatch.setattr(module, "OVERLAY_SECONDS", 20.0)
    monkeypatch.setattr(passes, "_MAX_HELD_BYTES", 5 * 8 * 128 * 128 * 3)  # of the five and a half clips that there are
    counted = Counted(monkeypatch)
    assert inspect_video(video, tmp_path / "out", **CLIP).overlay.num_frames == 44
    assert 1 + 44 + 44 <= counted.frames < 1 + 44 + 44 + 12  # the second half begins at a key frame, one every 12


@pytest.mark.usefixtures("quick")
def test_several_videos_at_once(video: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mkv", "sub/b.mkv"):
        (folder / name).write_bytes(video.read_bytes())
    (folder / "bad.mkv").write_bytes(b"nothing")
    told: list[tuple[int, int, str]] = []
    result = inspect_videos([folder], tmp_path / "out", on_progress=lambda *step: told.append(step), **CLIP)
    assert [report.paths["index.html"] for report in result.reports] == [
        tmp_path / "out" / name / "index.html" for name in ("a.mkv", "sub/b.mkv")
    ]
    assert [source for source, _ in result.failed] == [str(folder / "bad.mkv")]
    assert [Path(video["source"]).name for video in result.to_json()["videos"]] == ["a.mkv", "b.mkv"]
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert (told[0], told[-1]) == ((0, 300, "a.mkv: counting tokens"), (300, 300, "b.mkv: done"))
    with pytest.raises(VideoError, match=r"bad\.mkv"):
        inspect_videos([folder / "bad.mkv"], tmp_path / "one", **CLIP)
    with pytest.raises(InvalidArgumentError, match=r"has no option 'treshold'.*did you mean 'threshold'"):
        inspect_videos([video], tmp_path / "one", treshold=0.1)

"""The command line as a user meets it: what it prints, what it writes, and every kind of bad input."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

import rlt
import video_factory
from rlt import assets, cli
from rlt.benchmark import SUITES
from rlt.cli import console
from rlt.data.sources import KINETICS
from rlt.network.flops import forward_flops

QUICK = ["--model", "vit_tiny", "--size", "64", "--frames", "8", "--repeats", "1"]


class Result:
    """Exit code and both streams of one call."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def flat_out(self) -> str:
        """Standard output with the line breaks of a narrow terminal taken back."""
        return " ".join(self.out.split())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Call the command line in this process; what it says does not depend on how long it takes."""
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", math.inf)

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        code = stop.value.code
        return Result(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def whole_video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A good MP4 whose index comes first, 60 frames with a key frame every 10."""
    path = tmp_path_factory.mktemp("good") / "good.mp4"
    video_factory.write_video(path, 60, options={"g": "10"}, container_options={"movflags": "+faststart"})
    return path.read_bytes()


def test_compare_shows_and_writes_what_it_measured(run, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out.json"
    result = run("compare", assets.path("traffic.mp4"), *QUICK, "--json", target)
    assert result.code == 0, result.err
    for word in ("tokens", "decode", "tokenize", "forward", "end to end", "FLOPs", "fewer", "feature cosine"):
        assert word in result.flat_out
    assert "Weights: random (no --checkpoint)" in result.flat_out
    assert "class " in result.out
    numbers = json.loads(target.read_text())
    assert f"{numbers['tokens_kept']:.1%}" in result.out
    assert f"{numbers['speedup_forward']:.2f}x" in result.out
    assert f"{numbers['speedup_flops']:.2f}x fewer" in result.out
    assert "one run" in result.out
    words = result.out[result.out.index("Token: ") :]
    assert all(f"{word}: " in words for word in ("Run length", "Threshold", "dense", "RLT", "FLOPs", "Feature cosine"))


def test_compare_names_classes_only_with_a_checkpoint(run, tmp_path: Path) -> None:
    config = rlt.checkpoints.models.MODELS["vit_tiny"].replace(num_classes=2, labels=("standing still", "[red]driving"))
    rlt.VisionTransformer(config).save_pretrained(tmp_path / "model")
    result = run("compare", assets.path("traffic.mp4"), *QUICK, "--checkpoint", tmp_path / "model")
    assert result.code == 0, result.err
    assert "standing still" in result.out
    assert "[red]driving" in result.out  # markup in a label is shown, not obeyed
    assert "random" not in result.out


def test_compare_takes_folders_and_lists_the_bad_at_the_end(run, tmp_path: Path, whole_video: bytes) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "c", "d"):
        (tmp_path / "in" / f"{name}.mp4").write_bytes(whole_video)
    (tmp_path / "in" / "broken.mp4").write_bytes(b"")
    (tmp_path / "in" / "cut.mp4").write_bytes(whole_video[: len(whole_video) * 9 // 10])
    (tmp_path / "in" / "notes.txt").write_text("not a video, and not looked at")
    result = run("compare", tmp_path / "in", *QUICK, "--clips", 2, "--json", tmp_path / "out.json")
    assert result.code == 2
    assert "Bad videos: 2" in result.err
    assert "broken.mp4" in result.err
    assert "cut.mp4" in result.err
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert [Path(video["source"]).name for video in numbers["videos"]] == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    assert [Path(entry["source"]).name for entry in numbers["failed"]] == ["broken.mp4", "cut.mp4"]


def test_compare_says_which_video_of_a_folder_saves_most(run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    for name, moving_rows in (("a", 32), ("b", 16), ("c", 0)):

        def picture(number: int, rows: int = moving_rows) -> np.ndarray:
            return np.concatenate([noise[number, :rows], np.full((64 - rows, 64, 3), 90, np.uint8)])

        path = tmp_path / "in" / f"{name}.mkv"
        video_factory.write_video(path, 8, codec="ffv1", pix_fmt="bgr0", picture=picture)
    result = run("compare", tmp_path / "in", *QUICK, "--stride", 1, "--json", tmp_path / "out.json")
    assert result.code == 0, result.err
    videos = json.loads((tmp_path / "out.json").read_text())["videos"]
    assert [video["tokens_kept"] for video in videos] == [40 / 64, 28 / 64, 16 / 64]
    config = rlt.checkpoints.models.MODELS["vit_tiny"]
    for video, kept in zip(videos, (40, 28, 16), strict=True):
        assert video["flops_saved"] == 1 - forward_flops(config, kept) / forward_flops(config, 64)
    videos.reverse()  # as they are read, the one that saves least comes first
    table = result.out[result.out.index("saved") :]
    rows = [line.split("│")[1:5] for line in table.splitlines() if ".mkv" in line]
    assert [[cell.strip() for cell in row[:3]] for row in rows] == [
        [f"{Path(video['source']).name}", f"{video['tokens_kept']:.1%}", f"{video['flops_saved']:.1%}"]
        for video in videos
    ]
    assert all(row[3].strip() == f"{video['speedup_forward']:.2f}x" for row, video in zip(rows, videos, strict=True))


def test_benchmark_writes_the_speedup(run, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    result = run("benchmark", "tokenize", "--clips", 2, "--rounds", 2, "--json", target)
    assert result.code == 0, result.err
    numbers = json.loads(target.read_text())
    assert numbers["mask_entries_that_differ"] == 0
    rlt_arm = next(arm for arm in numbers["arms"] if arm["name"] == "rlt")
    assert f"{rlt_arm['speedup']:.2f}x" in result.out


def test_models_and_back_ends_are_shown(run) -> None:
    result = run("models")
    assert result.code == 0
    assert all(name in result.out for name in rlt.list_models())
    assert "cuda bfloat16: varlen" in result.flat_out


def test_convert_there_and_back(run, tmp_path: Path) -> None:
    config = rlt.checkpoints.models.MODELS["vit_tiny"].replace(num_classes=3)
    model = rlt.VisionTransformer(config)
    model.save_pretrained(tmp_path / "ours")
    assert run("convert", tmp_path / "ours", tmp_path / "theirs.pth", "--to", "videomae").code == 0
    back = run("convert", tmp_path / "theirs.pth", tmp_path / "back")
    assert back.code == 0, back.err
    restored = rlt.create_model("vit_tiny", checkpoint=tmp_path / "back")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, restored.state_dict()[name]), name


def test_inspect_writes_a_page_per_video(run, tmp_path: Path, whole_video: bytes) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.mp4", "sub/b.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(whole_video)
    (tmp_path / "in" / "z.mp4").write_bytes(b"nothing")
    result = run("inspect", tmp_path / "in", "--output", tmp_path / "out", "--size", 64, "--json", tmp_path / "o.json")
    assert result.code == 2
    assert "Bad videos: 1" in result.err
    assert (tmp_path / "out" / "a.mp4" / "index.html").exists()
    assert (tmp_path / "out" / "sub" / "b.mp4" / "overlay.mp4").exists()
    numbers = json.loads((tmp_path / "o.json").read_text())
    assert len(numbers["videos"]) == 2
    assert "z.mp4" in numbers["failed"][0]["error"]
    one = run("inspect", tmp_path / "in" / "a.mp4", "--output", tmp_path / "one", "--size", 64)
    assert one.code == 0, one.err
    assert (tmp_path / "one" / "index.html").exists()


def test_progress_without_a_terminal_is_a_line_every_few_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([100.0, 101.9, 104.9, 105.1, 105.1, 107.0, 111.0, 111.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with console.progress("Comparing") as update:
        for done in range(5):
            update(done, 1000, f"[b]{done}.mp4")
    lines = ["Comparing: 2 of 1,000, about 42 min left, [b]2.mp4", "Comparing: 4 of 1,000, about 46 min left, [b]4.mp4"]
    assert capsys.readouterr() == ("", "\n".join([*lines, ""]))
    assert [console._duration(seconds) for seconds in (0.4, 89, 100, 7000)] == ["0 s", "89 s", "2 min", "1.9 h"]


def test_progress_on_a_terminal_is_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "messages", Console(file=screen, force_terminal=True, width=120, color_system=None))
    with console.progress("Inspecting") as update:
        update(1, 4, "[b].mkv: counting tokens")
    shown = screen.getvalue()
    assert "Inspecting" in shown
    assert "1/4" in shown
    assert "[b].mkv: counting tokens" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def bad_videos(folder: Path, whole: bytes) -> dict[str, Path]:
    """Every kind of file that cannot be compared, by name."""
    paths = {name: folder / f"{name}.mp4" for name in ("zero", "truncated", "no_index", "text", "corrupt")}
    paths["zero"].write_bytes(b"")
    paths["truncated"].write_bytes(whole[: len(whole) // 2])
    paths["no_index"].write_bytes(whole[-len(whole) // 2 :])
    paths["text"].write_text("renamed from notes.txt\n" * 50)
    damaged = whole
    for packet in range(20, 40):
        damaged = video_factory.damage_packet(damaged, packet)
    paths["corrupt"].write_bytes(damaged)
    paths["audio"] = folder / "audio.mp4"
    video_factory.write_audio(paths["audio"])
    paths["one_frame"] = folder / "one_frame.mp4"
    video_factory.write_video(paths["one_frame"], 1)
    paths["missing"] = folder / "missing.mp4"
    paths["empty_folder"] = folder / "empty_folder"
    paths["empty_folder"].mkdir()
    return paths


@pytest.mark.parametrize("command", ["compare", "inspect"])
@pytest.mark.parametrize(
    "kind",
    ["zero", "truncated", "no_index", "text", "corrupt", "audio", "one_frame", "missing", "empty_folder"],
)
def test_a_bad_video_is_one_line_and_exit_code_2(
    run, tmp_path: Path, whole_video: bytes, command: str, kind: str
) -> None:
    path = bad_videos(tmp_path, whole_video)[kind]
    rest = QUICK if command == "compare" else ["--size", "64", "--frames", "8", "--output", str(tmp_path / "out")]
    result = run(command, path, *rest)
    assert result.code == 2
    assert path.name in result.err
    assert "Traceback" not in result.err
    errors = [line for line in result.err.splitlines() if line.strip()]
    assert len(errors) == 1, result.err


def test_what_is_left_of_a_video_is_drawn_and_the_file_still_counts_as_bad(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    faststart = {"movflags": "+faststart"}
    video_factory.write_video(whole, 120, rate=2, options={"g": "10"}, container_options=faststart)
    cut.write_bytes(whole.read_bytes()[:-40])  # far behind the seconds that the overlay shows
    result = run("inspect", cut, "--output", tmp_path / "out", "--size", 64, "--frames", 8, "--stride", 2)
    assert result.code == 2
    assert (tmp_path / "out" / "index.html").exists()
    assert "of the tokens kept" in result.out
    assert result.err.startswith("error: ")
    assert "cut.mp4" in result.err
    assert "cut off" in result.err
    assert len(result.err.strip().splitlines()) == 1


class Malicious:
    """Unpickling this makes a folder."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.target,)


def bad_checkpoint(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.pth"
    if kind == "malicious":
        path.write_bytes(pickle.dumps({"model": Malicious(str(folder / "pwned"))}))
    elif kind == "malicious_zip":
        torch.save({"model": Malicious(str(folder / "pwned"))}, path)
    elif kind == "wrong":
        torch.save({"conv1.weight": torch.zeros(3), "layer1.0.bn1.weight": torch.zeros(3)}, path)
    elif kind == "zero":
        path.write_bytes(b"")
    elif kind == "other_size":
        rlt.VisionTransformer(rlt.checkpoints.models.MODELS["vit_small"].replace(num_classes=2)).save_pretrained(
            folder / "small"
        )
        return folder / "small"
    return path


@pytest.mark.parametrize("kind", ["malicious", "malicious_zip", "wrong", "zero", "missing", "other_size"])
def test_a_bad_checkpoint_is_one_line_and_exit_code_2(run, tmp_path: Path, kind: str) -> None:
    path = bad_checkpoint(kind, tmp_path)
    result = run("compare", assets.path("traffic.mp4"), *QUICK, "--checkpoint", path)
    assert result.code == 2
    assert path.name in result.err
    assert "Traceback" not in result.err
    assert len(result.err.strip().splitlines()) == 1, result.err
    assert not (tmp_path / "pwned").exists()
    if kind != "other_size":
        assert run("convert", path, tmp_path / "out").code == 2
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "-0.5"], "threshold is -0.5; 0 or more is needed"),
        (["--size", "100"], "100x100 pixels are not a multiple of patch_size=16; resize or crop to 96x96"),
        (["--frames", "7"], "7 frames are not a multiple of tubelet_size=2; sample 6 frames"),
        (["--stride", "0"], "frame_stride is 0"),
        (["--stride", "4", "--fps", "5"], "frame_stride is 4 and fps is 5.0; give one of them"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "inspect"])
def test_a_bad_value_is_one_line_and_exit_code_2(
    run, tmp_path: Path, command: str, arguments: list[str], message: str
) -> None:
    rest = [] if command == "compare" else ["--output", str(tmp_path / "out")]
    result = run(command, assets.path("traffic.mp4"), *arguments, *rest)
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1, result.err
    if command == "compare":
        assert message in result.err
    assert not (tmp_path / "out").exists()


def test_wrong_words_are_refused(run) -> None:
    for arguments in (
        ["compare"],
        ["compare", "x.mp4", "--modle", "a"],
        ["compare", "x.mp4", "--model", "vit"],
        ["go"],
    ):
        result = run(*arguments)
        assert result.code == 2
        assert "Traceback" not in result.err


def test_help_names_what_can_be_chosen(run) -> None:
    compare, benchmark, prepare = (run(*command, "--help") for command in (["compare"], ["benchmark"], ["prepare"]))
    assert all(name in compare.flat_out and name in benchmark.flat_out for name in rlt.list_models())
    assert all(name in benchmark.flat_out for name in SUITES)
    assert all(name in prepare.out for name in KINETICS)
    for command in ("train", "evaluate"):
        assert "optimizer.layer_decay=" in run(command, "--help").out


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "compare", "missing.mp4"], ["compare", "missing.mp4", "--debug"]):
        with pytest.raises(rlt.errors.VideoError):
            cli.main(arguments)


def test_the_installed_command_runs(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "rlt"
    done = subprocess.run(
        [command, "compare", "missing.mp4"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: missing.mp4")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_compare_says_when_a_threshold_is_at_its_floor(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    video_factory.write_video(
        tmp_path / "moving.mp4", 30, picture=lambda number: video_factory.numbered_picture(number)
    )
    small = ["compare", str(tmp_path / "moving.mp4"), "--model", "vit_micro", "--frames", "4", "--stride", "3",
             "--size", "32", "--repeats", "2"]  # fmt: skip
    for threshold, at_floor in (("50", True), ("0.05", False)):
        with pytest.raises(SystemExit) as stop:
            cli.main([*small, "--threshold", threshold])
        shown = " ".join(capsys.readouterr().out.split())
        assert not stop.value.code
        assert ("Only the first time step of each clip is left" in shown) == at_floor
        assert "Top 5" not in shown  # classes of random weights
        assert "random (no --checkpoint)" in shown


def test_the_shell_completes_commands() -> None:
    asked = {**os.environ, "_RLT_COMPLETE": "complete_bash", "COMP_WORDS": "rlt comp", "COMP_CWORD": "1"}
    command = Path(sys.executable).parent / "rlt"
    done = subprocess.run([command], env=asked, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["compare"], done.stderr

"""The campaign for a GPU, rehearsed: every piece runs, is resumed after a kill, and fills the tables."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlt import assets, cli
from rlt.benchmark import BenchmarkSettings, run_suite
from rlt.benchmark.frame_files import read_clips, unpack_archive, write_archive
from rlt.benchmark.harness import read_frames
from rlt.checkpoints import MODELS
from rlt.errors import InvalidArgumentError, VideoError
from rlt.video import ClipSpec, read_spread

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts as modules."""
    names = ("campaign", "figures_gpu", "gpu_clips", "gpu_tables", "gpu_training", "profile_forward")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(SCRIPTS)
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.fixture(scope="module")
def clips(scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    archive = tmp_path_factory.mktemp("clips") / "clips.npz"
    assert scripts.gpu_clips.write_tiny_clips(archive) == archive.stat().st_size
    found: dict[str, Path] = scripts.gpu_clips.clip_files(archive)
    return found


@pytest.fixture(scope="module")
def rehearsed(
    scripts: SimpleNamespace, clips: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """The result of every piece but the tests, by its name: the same commands, in one process and two layers deep.

    What differs in size, clips or seed alone is the same command here, and runs once.
    """
    folder, results = tmp_path_factory.mktemp("rehearsal"), {}
    done: dict[tuple[str, ...], dict[str, Any]] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS, "vit_micro", MODELS["vit_micro"].replace(depth=2))
        patched.setattr(torch, "compile", lambda function, **_: function)  # which tests/test_compile.py runs
        for piece in scripts.figures_gpu.list_pieces(clips, device="cpu", tiny=True):
            if piece.name == "tests":
                continue
            command = tuple("0" if argument in ("1", "2") else argument for argument in piece.arguments)
            if command in done:
                results[piece.name] = done[command]
                continue
            numbers = folder / f"{piece.name}.json"
            places = {"{json}": str(numbers), "{folder}": str(folder)}
            arguments = [scripts.campaign._filled(argument, places) for argument in piece.arguments]
            if arguments[0] == "-m":
                assert arguments[1] == "rlt"
                with pytest.raises(SystemExit) as stop:
                    cli.main(arguments[2:])
                assert not stop.value.code, piece.name
            else:
                patched.setattr(sys, "argv", arguments)
                getattr(scripts, Path(arguments[0]).stem).main()
            results[piece.name] = done[command] = json.loads(numbers.read_text())
    return results


# What there is


def test_the_list_of_pieces(scripts: SimpleNamespace, clips: dict[str, Path]) -> None:
    pieces = scripts.figures_gpu.list_pieces(clips, device="cuda")
    names = [piece.name for piece in pieces]
    assert len(set(names)) == len(names)
    assert names[:2] == ["forward-base-8", "train-step-base-8"]
    assert names.index("tests") < 8  # before most of what it vouches for
    assert all(piece.limit_seconds < 480 and "{json}" in piece.arguments for piece in pieces)
    assert {f"forward-{size}-{clips}" for size in ("base", "large", "huge") for clips in (8, 64)} <= set(names)
    assert {f"training-{size}-{seed}" for size in ("small", "base") for seed in range(3)} <= set(names)
    assert {f"towers-{name}" for name in scripts.gpu_tables.TOWERS} <= set(names)
    assert {"attention", "attention-fa3", "attention-fa4", "feed", "static-128", "forward-compiled"} <= set(names)
    for piece in pieces:
        if "benchmark" in piece.arguments:
            options = " ".join(piece.arguments)
            assert "--device cuda" in options
            assert "--dtype bfloat16" in options
            assert "micro" not in options
            assert "tiny" not in options


def test_a_rehearsal_has_the_same_pieces(scripts: SimpleNamespace, clips: dict[str, Path]) -> None:
    whole, tiny = (
        [piece.name for piece in scripts.figures_gpu.list_pieces(clips, device=device, tiny=device == "cpu")]
        for device in ("cuda", "cpu")
    )
    assert [name for name in whole if name not in ("attention-fa3", "attention-fa4")] == tiny


def test_every_gpu_test_is_in_the_piece_or_needs_videos(scripts: SimpleNamespace) -> None:
    marked = {
        path.stem.removeprefix("test_")
        for path in (ROOT / "tests").glob("test_*.py")
        if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)
    }
    assert marked - set(scripts.figures_gpu.GPU_TESTS) == {"data", "evaluation"}
    assert set(scripts.figures_gpu.GPU_TESTS) <= marked


# What it measures


def test_every_piece_leaves_the_promised_keys(rehearsed: dict[str, dict[str, Any]]) -> None:
    for name, result in rehearsed.items():
        assert result["machine"]["torch"] == torch.__version__
        assert result["arms"], name
        if name == "profile":
            assert [len(arm["operators"]) for arm in result["arms"]] == [10, 10, 10]
            continue
        if name.startswith("training"):
            assert [arm["name"] for arm in result["arms"]] == ["dense", "rlt", "random"]
            assert {"seconds_training", "tokens_kept", "top1", "top1_dense"} <= set(result["arms"][0])
            continue
        for arm in result["arms"]:
            assert {"seconds_median", "tokens_kept", "flops", "peak_memory_bytes", "device_waits"} <= set(arm), name
    for name in ("forward-base-8", "train-step-base-8"):
        arms = {arm["name"] for arm in rehearsed[name]["arms"]}
        assert {"dense", "rlt", "random", "padded", "transformers"} <= arms
        assert rehearsed[name]["time_ratio_over_flop_ratio"] > 0
    assert {arm["part"] for arm in rehearsed["towers-qwen3_vl_8b"]["arms"]} == {"prefill", "tower"}
    assert {arm["part"] for arm in rehearsed["towers-vjepa2_giant"]["arms"]} == {"model"}
    assert all(result.get("largest_difference", 0) < 1e-4 for result in rehearsed.values())


def test_tokens_chosen_on_either_side_are_the_same(rehearsed: dict[str, dict[str, Any]]) -> None:
    assert rehearsed["feed"]["values_that_differ"] == 0
    assert {arm["name"] for arm in rehearsed["feed"]["arms"]} == {"host", "device", "on_device", "copy"}


def test_tables_are_filled_from_the_json(
    scripts: SimpleNamespace, rehearsed: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = scripts.gpu_tables
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    empty = [tables.gpu_targets_table(), tables.gpu_tables()]
    for line in "".join(empty).splitlines():
        is_row = line.startswith("| ") and not re.match(r"\| (---|target|piece|frames|arm|8 clips|model) ", line)
        assert not is_row or "not measured yet" in line, line
    tests = {"passed": 7, "failed": 0, "skipped": 1, "machine": rehearsed["feed"]["machine"]}
    for name, result in {**rehearsed, "tests": tests}.items():
        content = {"piece": name, "state": "done", "reason": "", "seconds": 1.0, "command": [], "result": result}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    for name in ("attention-fa3", "attention-fa4"):
        content = {"piece": name, "state": "failed", "reason": "no such package", "result": None}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    whole = tables.gpu_tables()
    assert "not measured yet" not in whole
    assert "7 passed, 0 failed, 1 skipped" in whole
    assert "| rlt by FA3 | failed: no such package |" in whole
    ratio = rehearsed["forward-base-8"]["time_ratio_over_flop_ratio"]
    targets = tables.gpu_targets_table()
    assert f"| at most 1.1 | {ratio:.4g} | {'yes' if ratio <= 1.1 else '**no**'} |" in targets
    assert targets.count("not measured yet") == 2  # a CPU has no device to wait for


# How it goes on


def sleeper(scripts: SimpleNamespace, name: str, code: str, limit: int = 30) -> Any:
    return scripts.campaign.Piece(name, "a test", ("-c", code, "{json}"), limit)


COUNT = """
import json, pathlib, sys
count = pathlib.Path(sys.argv[1]).with_suffix(".count")
count.write_text(count.read_text() + "x" if count.exists() else "x")
pathlib.Path(sys.argv[1]).write_text(json.dumps({"runs": len(count.read_text())}))
"""


def test_a_campaign_that_was_killed_goes_on_with_what_is_missing(tmp_path: Path, scripts: SimpleNamespace) -> None:
    wait = "import pathlib, sys, time\nsign = pathlib.Path(sys.argv[1]).with_name('began')\n"
    wait += "if not sign.exists(): sign.touch(); time.sleep(60)\n" + COUNT
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
from campaign import Piece, run_campaign
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
pieces = [Piece("a", "", ("-c", {COUNT!r}, "{{json}}"), 30), Piece("b", "", ("-c", {wait!r}, "{{json}}"), 90)]
sys.exit(bool(run_campaign(pieces, Path({str(tmp_path)!r}), budget_seconds=100)))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "work" / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143
    assert json.loads((tmp_path / "a.json").read_text())["state"] == "done"
    assert not (tmp_path / "b.json").exists()
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0
    results = {name: json.loads((tmp_path / f"{name}.json").read_text())["result"] for name in "ab"}
    assert results == {"a": {"runs": 1}, "b": {"runs": 1}}


def test_what_fails_says_why_and_is_tried_again_last(tmp_path: Path, scripts: SimpleNamespace) -> None:
    said: list[str] = []
    broken = sleeper(scripts, "broken", "import sys; print('no GPU today', file=sys.stderr); sys.exit(3)")
    slow = sleeper(scripts, "slow", "import time; time.sleep(60)", limit=1)
    fine = sleeper(scripts, "fine", COUNT)
    run = scripts.campaign.run_campaign
    assert run([broken, slow], tmp_path, budget_seconds=100, say=said.append) == ["broken", "slow"]
    states = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("broken", "slow")}
    assert states["broken"]["reason"] == "exit code 3: no GPU today"
    assert states["slow"]["reason"] == "ended after 1 s"
    assert {state["state"] for state in states.values()} == {"failed"}
    said.clear()
    run([broken, fine], tmp_path, budget_seconds=100, say=said.append)
    assert [line.split()[3] for line in said if line.startswith("[")] == ["fine:", "broken:"]


def test_the_end_of_the_time_leaves_pieces_for_the_next_run(tmp_path: Path, scripts: SimpleNamespace) -> None:
    said: list[str] = []
    pieces = [sleeper(scripts, name, COUNT) for name in "abc"]
    ticks = iter([0.0, 1.0, 95.0])
    left = scripts.campaign.run_campaign(
        pieces, tmp_path, budget_seconds=100, say=said.append, clock=lambda: next(ticks)
    )
    assert left == ["b", "c"]
    assert said[-1] == "the time is over; 2 pieces are left for the next run"
    assert not (tmp_path / "b.json").exists()


def test_one_piece_by_the_command(
    tmp_path: Path, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # that of pytest stays
    arguments = ["figures_gpu.py", "--device", "cpu", "--tiny", "--output", str(tmp_path), "--only", "feed"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert scripts.figures_gpu.main() == 0, capfd.readouterr()
    content = json.loads((tmp_path / "feed.json").read_text())
    assert content["state"] == "done"
    assert content["result"]["suite"] == "feed"
    assert "every piece is done" in capfd.readouterr().out
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], "feeds"])
    assert scripts.figures_gpu.main() == 2
    assert capfd.readouterr().err.startswith("error: only is 'feeds'; allowed are forward-base-8")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "gpu"}, "device is 'gpu'; cpu or cuda is needed"),
        ({"tiny": False}, "the whole campaign needs a GPU, add --tiny"),
        ({"minutes": -1.0}, "minutes is -1.0; at least 0"),
        ({"only": ["forwards"]}, "only is 'forwards'; allowed are forward-base-8"),
        ({"output": ROOT / "docs" / "results" / "gpu"}, "a rehearsal's numbers mean nothing there"),
    ],
)
def test_what_cannot_be_meant_is_told(
    changes: dict[str, Any], message: str, scripts: SimpleNamespace, tmp_path: Path
) -> None:
    asked = {"device": "cpu", "tiny": True, "minutes": 1.0, "only": [], "data": None, "output": tmp_path / "results"}
    with pytest.raises(InvalidArgumentError, match=message):
        scripts.figures_gpu.run(SimpleNamespace(**{**asked, **changes}))


def test_missing_clips_name_the_command(scripts: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="make figures-gpu-clips DATA=FOLDER"):
        scripts.figures_gpu.prepare_clips(tmp_path / "clips.npz", None, tiny=False)


def test_another_flash_attention_is_refused_on_the_cpu(clips: dict[str, Path]) -> None:
    settings = BenchmarkSettings(model="vit_micro", clip=ClipSpec(4, size=64), videos=(clips["traffic"],), flash="FA3")
    with pytest.raises(InvalidArgumentError, match="flash is 'FA3', but device is 'cpu'; use cuda"):
        run_suite("attention", settings)


# Without PyAV, Hydra and kornia


def test_the_machine_needs_no_decoder_and_no_configuration(clips: dict[str, Path]) -> None:
    script, folder = ROOT / "tests" / "gpu_machine.py", clips["traffic"].parent
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    needs_decoder = {"rlt.streaming", "rlt.video.live"}  # cameras
    allowed = {"rlt.conf.hydra_config", "rlt.tokens._cuda", "rlt.video._torchcodec"} | needs_decoder
    assert set(report["failed"]) <= allowed, report["failed"]
    assert report["forward"]["code"] == 0, report["forward"]["errors"]
    assert report["training"] == ["dense", "rlt", "random"]
    assert report["video"]["code"] == 2
    assert report["video"]["errors"].startswith("error: PyAV cannot be imported")
    assert report["video"]["errors"].count("\n") == 1


# Frames in files


def test_frames_of_a_file_are_those_that_the_decoder_reads(tmp_path: Path) -> None:
    path = assets.path("traffic.mp4")
    whole = read_spread(path, ClipSpec(120, 1, size=64))[0]
    assert whole.num_repeated == 0
    np.save(tmp_path / "traffic.npy", whole.frames.numpy())
    spec = ClipSpec(16, 4, size=64)
    expected = [clip.frames for clip in read_spread(path, spec, 3)]
    for ours, theirs in zip(read_clips(tmp_path / "traffic.npy", spec, 3), expected, strict=True):
        assert torch.equal(ours, theirs)
    both = BenchmarkSettings(clip=spec, videos=(tmp_path / "traffic.npy", path), clips=2)
    ours, theirs = read_frames(both)
    assert torch.equal(ours, theirs)


def test_an_archive_gives_back_what_went_in(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    videos = {
        "one": rng.integers(0, 256, (5, 6, 7, 3), np.uint8),
        "many": rng.integers(0, 256, (2, 4, 3, 3, 3), np.uint8),
    }
    told: list[str] = []
    archive = tmp_path / "clips.npz"
    size = write_archive(archive, videos.items(), notes="by whom", on_progress=told.append)
    assert size == archive.stat().st_size
    assert told == ["one", "many"]
    paths = {path.stem: path for path in unpack_archive(archive, tmp_path / "out")}
    assert paths.keys() == videos.keys()
    for name, frames in videos.items():
        assert np.array_equal(np.load(paths[name]), frames)
    before = paths["one"].stat().st_mtime_ns
    unpack_archive(archive, tmp_path / "out")
    assert paths["one"].stat().st_mtime_ns == before


@pytest.mark.parametrize("keep", [0, 40, 300])
def test_a_damaged_archive_is_told(keep: int, tmp_path: Path) -> None:
    archive = tmp_path / "clips.npz"
    write_archive(archive, [("one", np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8))])
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(VideoError, match="no whole archive of frames"):
        unpack_archive(archive, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "spec", "error", "message"),
    [
        (np.zeros((4, 8, 8, 3), np.float32), ClipSpec(4, size=8), VideoError, "holds float32"),
        (np.zeros((4, 8, 8), np.uint8), ClipSpec(4, size=8), VideoError, r"uint8 frames of 4 axes"),
        (np.zeros((4, 8, 8, 3), np.uint8), ClipSpec(4, size=16), InvalidArgumentError, "size is 16; the frames of"),
        (np.zeros((4, 8, 8, 3), np.uint8), ClipSpec(4, fps=2.0, size=8), InvalidArgumentError, "fps is 2.0"),
    ],
)
def test_other_arrays_are_refused(
    content: Any, spec: ClipSpec, error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "clip.npy"
    np.save(path, content)
    with pytest.raises(error, match=message):
        read_clips(path, spec, 1)
    path.write_bytes(b"nothing of numpy")
    with pytest.raises(VideoError, match="cannot be read"):
        read_clips(path, spec, 1)

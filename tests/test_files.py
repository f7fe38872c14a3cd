"""Writing: what a user had is never lost, what a kill leaves is finished or removed, links and inputs stay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import rlt
from rlt import assets
from rlt.checkpoints import load_checkpoint
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.files import newest, refuse_inputs, replacing, replacing_all, write_json
from rlt.network.config import ViTConfig
from rlt.training.checkpointing import remove_older


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def model_of_depth(depth: int) -> rlt.VisionTransformer:
    return rlt.VisionTransformer(ViTConfig(width=32, depth=depth, num_heads=2, mlp_width=32))


def killed(script: str, *arguments: object) -> None:
    """Run a script that kills itself as `kill -9` does."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


KILL_AT_MOVE = """
import os, signal, sys
from pathlib import Path
from rlt import files
move, left = files._move, int(sys.argv[2])
def die(file, place):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    move(file, place)
files._move = die
with files.replacing_all(sys.argv[1], ("a", "b", "c")) as staging:
    for name in ("a", "b", "c"):
        (staging / name).write_text("new")
"""


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_a_kill_between_two_files_leaves_all_new_ones_to_read(tmp_path: Path, moved: int) -> None:
    """New weights stood beside an old configuration."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("old")
    killed(KILL_AT_MOVE, tmp_path, moved)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["new"] * moved + ["old"] * (3 - moved)
    assert [newest(tmp_path / name).read_text() for name in "abc"] == ["new"] * 3
    with replacing(tmp_path / "d") as temporary:  # the next writer moves the rest
        temporary.write_text("d")
    assert [(tmp_path / name).read_text() for name in "abc"] == ["new"] * 3
    assert names(tmp_path) == ["a", "b", "c", "d"]


def test_weights_that_were_killed_between_two_files_load_as_written(tmp_path: Path) -> None:
    """`save_pretrained` over a model of another depth, killed between weights and configuration."""
    model_of_depth(2).save_pretrained(tmp_path)
    script = KILL_AT_MOVE.partition("with files")[0] + (
        "import rlt\nfrom rlt.network.config import ViTConfig\n"
        "config = ViTConfig(width=32, depth=1, num_heads=2, mlp_width=32)\n"
        "rlt.VisionTransformer(config).save_pretrained(sys.argv[1])\n"
    )
    killed(script, tmp_path, 1)
    assert json.loads((tmp_path / "config.json").read_text())["depth"] == 2
    assert rlt.VisionTransformer.from_pretrained(tmp_path).config.depth == 1
    assert load_checkpoint(tmp_path).config.depth == 1


def test_what_killed_writers_staged_is_removed(tmp_path: Path) -> None:
    """The counts of kills while writing: hidden temporaries stayed for ever."""
    script = (
        "import os, signal, sys\nfrom rlt.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_bytes(bytes(1000))\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed(script, tmp_path / "model.ckpt")
    [left] = tmp_path.iterdir()
    os.utime(left, (0, 0))
    with replacing_all(tmp_path, ["at work"]) as staging:
        os.utime(staging, (0, 0))
        write = "import sys\nfrom rlt.files import write_json\nwrite_json(sys.argv[1], 1)\n"
        subprocess.run([sys.executable, "-c", write, str(tmp_path / "other.json")], check=True)
        assert names(tmp_path) == [staging.name, "other.json"]  # one that is at work is left alone
        (staging / "at work").write_text("done")
    assert names(tmp_path) == ["at work", "other.json"]


def test_old_checkpoints_of_killed_runs_are_removed(tmp_path: Path) -> None:
    """Steps 10, 20 and 30 outlived keep=2."""
    for step in (10, 20, 30, 40):
        (tmp_path / f"step={step}.ckpt").touch()
    (tmp_path / "mine.ckpt").touch()
    remove_older(tmp_path / "step=30.ckpt", 2)
    remove_older(tmp_path / "mine.ckpt", 1)
    assert names(tmp_path) == ["mine.ckpt", "step=20.ckpt", "step=30.ckpt", "step=40.ckpt"]


def test_links_are_followed(tmp_path: Path) -> None:
    """A symbolic link was replaced by a file, and what it names stayed as it was."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "numbers").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "numbers")
    (tmp_path / "new.json").symlink_to(tmp_path / "real" / "later")
    for name in ("link.json", "new.json"):
        write_json(tmp_path / name, 1)
        assert (tmp_path / name).is_symlink()
    assert [(tmp_path / "real" / name).read_text() for name in ("numbers", "later")] == ["1\n", "1\n"]
    assert names(tmp_path / "real") == ["later", "numbers"]


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    """`--json /dev/null` replaced the device as root."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "null"):
        with pytest.raises(InvalidArgumentError, match="a device or a pipe, which is never replaced"):
            write_json(tmp_path / name, 1)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidArgumentError, match="cannot be written"):
        write_json(tmp_path / "loop" / "x", 1)
    assert names(tmp_path) == ["loop", "null", "pipe"]


def test_numbers_that_json_has_not_are_one_line(tmp_path: Path) -> None:
    """A raw ValueError."""
    with pytest.raises(InvalidArgumentError, match="JSON has no such number"):
        write_json(tmp_path / "x.json", [float("inf")])
    assert names(tmp_path) == []


def test_no_output_takes_the_place_of_an_input(tmp_path: Path) -> None:
    """`rlt compare V.mp4 --json V.mp4` replaced the video by JSON."""
    from rlt.cli.main import app

    video = tmp_path / "v.mp4"
    video.write_bytes(assets.path(assets.names()[0]).read_bytes())
    (tmp_path / "hard.json").hardlink_to(video)
    (tmp_path / "soft.json").symlink_to(video)
    before = video.read_bytes()
    commands = (
        ["compare", str(tmp_path)],
        ["benchmark", "decode", str(video)],
        ["inspect", str(video), "--output", str(tmp_path / "o")],
    )
    for command in commands:
        for output in ("v.mp4", "hard.json", "soft.json"):
            result = CliRunner().invoke(app, [*command, "--json", str(tmp_path / output)])
            assert isinstance(result.exception, InvalidArgumentError)
            assert "is the same file as" in str(result.exception)
    assert video.read_bytes() == before
    refuse_inputs([tmp_path / "not there.json", "nul\0"], [video, "nul\0"])


# Weights of somebody else


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    """2 of 2 files with NaN or infinity loaded without a word."""
    model = model_of_depth(1)
    with torch.no_grad():
        model.head.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    for load in (load_checkpoint, rlt.VisionTransformer.from_pretrained):
        with pytest.raises(CheckpointError, match=r"NaN or infinite values in 1 of \d+ weights \(head\.weight\)"):
            load(tmp_path)


def test_an_index_without_entries_ends(tmp_path: Path) -> None:
    """`all()` over no keys is true, and the loop that takes prefixes off never ended."""
    (tmp_path / "config.json").write_text('{"model_type": "videomae"}')
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="no weight_map with entries"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["nul\0.pth", "n" * 300 + ".pth", "~nobody-of-this-name/x.pth"])
def test_names_that_no_checkpoint_can_have(name: str) -> None:
    """Raw OSError, ValueError and RuntimeError."""
    with pytest.raises(CheckpointError):
        load_checkpoint(name)


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw PermissionError from `load_checkpoint`."""

    def stat(self: Path, **_: object) -> object:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(CheckpointError, match="Permission denied"):
        load_checkpoint(tmp_path / "model.pth")


def test_a_checkpoint_that_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(CheckpointError, match="a device or a pipe"):
        load_checkpoint(tmp_path / "pipe.safetensors")

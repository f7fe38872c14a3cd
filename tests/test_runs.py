"""Runs that are stopped, gone on with, or started twice: nothing is lost, mixed or told wrongly."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import video_factory

pytest.importorskip("lightning")

import rlt
from rlt import cli
from rlt.cli import console
from rlt.conf.saved import training_config
from rlt.data.manifest import Manifest, VideoEntry, read_manifest, write_manifest
from rlt.errors import InvalidArgumentError, TrainingError, VideoError
from rlt.evaluation.run import evaluation_config
from rlt.training.checkpointing import read_step
from rlt.training.module import VideoClassifier
from rlt.training.run import TrainingSummary, train

SMALL = [
    "data=folder", "model=vit_tiny", "data.clip.num_frames=4", "data.clip.frame_stride=1", "data.clip.size=32",
    "data.augment.rand_augment_num_ops=0", "trainer.batch_size=2", "trainer.accelerator=cpu", "logger=none",
    "optimizer.lr=0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six short videos of two classes."""
    folder = tmp_path_factory.mktemp("videos")
    entries = []
    for number in range(6):
        path = folder / f"{number}.mp4"
        picture = partial(lambda grey, frame: np.full((48, 64, 3), grey + frame, np.uint8), 60 + 20 * number)
        video_factory.write_video(path, 8, picture=picture)
        label = ("dark", "bright")[number % 2]
        entries.append(VideoEntry(str(path), number % 2, label, 8, 25.0, 64, 48, 0.32, "ok"))
    write_manifest(Manifest(tuple(entries), ("dark", "bright")), folder / "manifest.csv")
    write_manifest(Manifest(tuple(entries[:4]), ("dark", "bright")), folder / "fewer.csv")
    return folder / "manifest.csv"


@pytest.fixture(autouse=True)
def one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    models = rlt.checkpoints.models.MODELS
    monkeypatch.setitem(models, "vit_tiny", models["vit_tiny"].replace(depth=1))


def typed(manifest: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.train={manifest}", f"run_dir={run_dir}", *more]


def start(overrides: list[str], said: list[str] | None = None) -> TrainingSummary:
    say = (lambda _: None) if said is None else said.append
    return train(training_config(overrides), overrides=overrides, say=say)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return rlt.VisionTransformer.from_pretrained(run_dir / "model").state_dict()


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def history(run_dir: Path) -> list[dict[str, object]]:
    return json.loads((run_dir / "history.json").read_text())


def signals(monkeypatch: pytest.MonkeyPatch, method: str, call: int, *sent: signal.Signals) -> None:
    """Send this process signals at a call of a method of the module, once."""
    before: Callable[..., object] = getattr(VideoClassifier, method)
    calls = iter(range(1000))

    def then(self: VideoClassifier, *arguments: object) -> object:
        if next(calls) == call:
            for number in sent:
                os.kill(os.getpid(), number)
        return before(self, *arguments)

    monkeypatch.setattr(VideoClassifier, method, then)


@pytest.mark.parametrize(("method", "call", "saved"), [("training_step", 1, 2), ("validation_step", 1, 2)])
def test_sigterm_saves_says_so_and_is_no_success(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    method: str, call: int, saved: int,
) -> None:  # fmt: skip
    more = [f"data.val={manifest}", "trainer.max_steps=4", "trainer.validate_every=2", "trainer.ema_decay=0.9"]
    start(typed(manifest, tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        signals(patch, method, call, signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *typed(manifest, tmp_path / "run", *more)])
    assert stop.value.code == 143
    assert f"SIGTERM: saved step {saved}; go on with: rlt train run_dir={tmp_path / 'run'} resume=auto" in (
        capsys.readouterr().err.replace("\n", "")
    )
    assert not (tmp_path / "run" / "summary.json").exists()
    summary = start([f"run_dir={tmp_path / 'run'}", "resume=auto"])
    assert (summary.resumed_at, summary.steps) == (saved, 4)
    assert summary.val_top1 is not None
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_what_a_stop_saves_goes_with_the_others(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's callback, which removes what it saved, never knew of them."""
    run_dir, left = tmp_path / "run", []
    command = typed(manifest, run_dir, "trainer.max_steps=6", "trainer.save_every=2", "trainer.keep_checkpoints=1")
    for _ in range(3):
        with monkeypatch.context() as patch:
            signals(patch, "training_step", 0, signal.SIGTERM)
            with pytest.raises(SystemExit):
                start([*command, "resume=auto"])
        left.append(sorted(path.name for path in (run_dir / "checkpoints").iterdir()))
    start([*command, "resume=auto"])
    left.append(sorted(path.name for path in (run_dir / "checkpoints").iterdir()))
    assert left == [["step=1.ckpt"], ["step=2.ckpt"], ["step=3.ckpt"], ["step=6.ckpt"]]


def test_ctrl_c_is_no_success(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signals(monkeypatch, "training_step", 0, signal.SIGINT)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *typed(manifest, tmp_path / "run", "trainer.max_steps=2")])
    assert stop.value.code == 130


def test_a_run_that_was_stopped_after_its_last_step_is_finished(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = [f"data.val={manifest}", "trainer.max_steps=2", "trainer.ema_decay=0.9"]
    whole = start(typed(manifest, tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        signals(patch, "validation_step", 0, signal.SIGTERM)
        with pytest.raises(SystemExit):
            start(typed(manifest, tmp_path / "run", *more))
    rest = start([f"run_dir={tmp_path / 'run'}", "resume=auto"])
    assert (rest.steps, rest.val_top1, rest.tokens_kept) == (2, whole.val_top1, whole.tokens_kept)
    assert rest.train_seconds > 0
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    with pytest.raises(TrainingError, match="nothing is left to do"):
        start([f"run_dir={tmp_path / 'run'}", "resume=auto"])


def test_slurm_saves_requeues_and_goes_on(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $* > {tmp_path}/asked\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command = typed(manifest, tmp_path / "run", "trainer.max_steps=4")
    with monkeypatch.context() as patch:
        signals(patch, "training_step", 2, signal.SIGUSR1, signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            start(command)
    assert stop.value.code == 143
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert (tmp_path / "run" / "hpc_ckpt_1.ckpt").exists()
    (tmp_path / "run" / "checkpoints" / "step=3.ckpt").unlink()  # as if there had not been the time for it
    said: list[str] = []
    assert start(command, said).resumed_at == 2  # the same line, which SLURM runs again
    assert "hpc_ckpt_1.ckpt (step 2)" in said[0]
    start(typed(manifest, tmp_path / "whole", "trainer.max_steps=4"))
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_a_folder_takes_one_process_at_a_time(manifest: Path, tmp_path: Path) -> None:
    code = "import sys; from rlt.training.folder import locked\nwith locked(sys.argv[1]): print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    overrides = typed(manifest, tmp_path / "run", "trainer.max_steps=1")
    with pytest.raises(TrainingError, match=f"is being trained in by process {other.pid} on .*; wait for it") as error:
        start(overrides)
    assert "\n" not in str(error.value)
    other.communicate(b"\n")
    assert start(overrides).steps == 1


def test_going_on_takes_nothing_else_without_a_word(manifest: Path, tmp_path: Path) -> None:
    run_dir, fewer = tmp_path / "run", manifest.with_name("fewer.csv")
    first = typed(manifest, run_dir, "trainer.max_steps=2", "tokenizer.threshold=0.2")
    start(first)
    going_on = [f"run_dir={run_dir}", "resume=auto", "trainer.max_steps=3"]
    for key, was, now in (
        ("tokenizer", "rlt", "none"),
        ("seed", "0", "1"),
        ("trainer.batch_size", "2", "4"),
        ("optimizer.lr", "0.05", "0.01"),
        ("data.train", str(manifest), str(fewer)),
    ):
        name = "tokenizer.rule" if key == "tokenizer" else key
        with pytest.raises(InvalidArgumentError, match=f"{name} {was} -> {now}.*change=true") as error:
            start([*going_on, f"{key}={now}"])
        assert "\n" not in str(error.value)
        assert "trainer.max_steps" not in str(error.value)
    assert len(history(run_dir)) == 1  # what is refused is not written down
    assert json.loads((run_dir / "config.json").read_text())["tokenizer"]["threshold"] == 0.2

    said: list[str] = []
    summary = start([*going_on, "tokenizer=none", "change=true"], said)
    assert summary.steps == 3
    assert "tokenizer.rule was rlt so far and is none from here on" in said
    assert "trainer.max_steps was 2 so far and is 3 from here on" in said
    before, after = history(run_dir)
    assert (before["resumed_at"], before["overrides"], before["changed"]) == (0, first, {})
    assert after["resumed_at"] == 2
    assert after["changed"] == {
        "tokenizer.rule": ["rlt", "none"], "tokenizer.threshold": [0.2, None], "trainer.max_steps": [2, 3],
    }  # fmt: skip


def test_other_videos_under_the_same_name_are_seen(manifest: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_bytes(manifest.read_bytes())
    start(typed(mine, tmp_path / "run", "trainer.max_steps=1"))
    mine.write_bytes(manifest.with_name("fewer.csv").read_bytes())
    with pytest.raises(InvalidArgumentError, match=r"data.train videos .* -> videos .*change=true"):
        start([f"run_dir={tmp_path / 'run'}", "resume=auto", "trainer.max_steps=2"])


def test_logs_of_before_stay(manifest: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    more = ["trainer.max_steps=3", "trainer.save_every=2", "trainer.log_every=1", "logger.csv=true"]
    start(typed(manifest, run_dir, *more, f"data.val={manifest}"))
    (run_dir / "checkpoints" / "step=3.ckpt").unlink()  # as if it had been killed after step 3 was logged
    with (run_dir / "logs" / "metrics.csv").open("a") as stream:
        stream.write("0.1,")  # half a row
    start([f"run_dir={run_dir}", "resume=auto", "trainer.max_steps=4"])
    found = rows(run_dir)
    assert [int(row["step"]) for row in found if row["train/loss"]] == [0, 1, 2, 3]
    assert [int(row["step"]) for row in found if row["val/top1"]] == [3]


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "logs" / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_the_end_is_validated_the_best_is_kept_and_rates_are_logged(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.25, 0.75, 0.5])

    def validation_step(self: VideoClassifier, batch: object, batch_idx: int) -> None:
        self.log("val/top1", next(accuracies), batch_size=1)

    monkeypatch.setattr(VideoClassifier, "validation_step", validation_step)
    told: list[tuple[int, int, str]] = []
    more = ["trainer.max_steps=5", "trainer.validate_every=2", "trainer.limit_val_batches=1", "trainer.ema_decay=0.5"]
    overrides = typed(manifest, tmp_path, *more, f"data.val={manifest}", "logger.csv=true", "trainer.save_every=1")
    overrides += ["trainer.keep_checkpoints=5", "trainer.log_every=3"]
    summary = train(
        training_config(overrides), overrides=overrides, say=lambda _: None, on_progress=lambda *now: told.append(now)
    )
    assert (summary.val_top1, summary.best_val_top1) == (0.5, 0.75)
    assert [(int(row["step"]), float(row["val/top1"])) for row in rows(tmp_path) if row["val/top1"]] == [
        (1, 0.25), (3, 0.75), (4, 0.5),
    ]  # fmt: skip
    averaged = torch.load(tmp_path / "checkpoints" / "step=4.ckpt", weights_only=True)["state_dict"]
    best = rlt.VisionTransformer.from_pretrained(tmp_path / "best").state_dict()
    assert all(torch.equal(value, averaged[f"model.{name}"]) for name, value in best.items())
    assert evaluation_config([f"checkpoint={tmp_path / 'best'}"]).data.clip.size == 32

    logged = [row for row in rows(tmp_path) if row["train/loss"]]
    assert [int(row["step"]) for row in logged] == [0, 2]  # the first, and every third
    for row in logged:
        assert float(row["train/tokens_per_second"]) > float(row["train/clips_per_second"]) > 0
        assert 0 < float(row["train/waiting_for_data"]) < 1
    assert [now[:2] for now in told] == [(step, 5) for step in range(1, 6)]
    assert "clips/s" in told[-1][2]


def test_stopping_early_keeps_what_was_reached(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoClassifier, "validation_step", lambda self, *_: self.log("val/top1", 0.5, batch_size=1))
    stopping = typed(manifest, tmp_path, "trainer.max_steps=9", "trainer.early_stopping=1")
    for missing in (["trainer.validate_every=1"], [f"data.val={manifest}"]):
        with pytest.raises(InvalidArgumentError, match=r"early_stopping is 1, but .* is not set"):
            start([*stopping, *missing])
    summary = start([*stopping, "trainer.validate_every=1", f"data.val={manifest}"])
    assert (summary.steps, summary.val_top1) == (2, 0.5)
    assert (tmp_path / "checkpoints" / "step=2.ckpt").exists()


def test_trials_see_few_batches(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, ...]] = []
    before = VideoClassifier.training_step
    monkeypatch.setattr(
        VideoClassifier, "training_step", lambda self, batch, i: (seen.append(batch.paths), before(self, batch, i))[1]
    )
    trial = ["trainer.max_steps=3", "trainer.overfit_batches=1", "trainer.profiler=simple"]
    assert start(typed(manifest, tmp_path, *trial, f"data.val={manifest}")).steps == 3
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert "run_training_batch" in (tmp_path / "fit-profile.txt").read_text()
    with pytest.raises(InvalidArgumentError, match="overfit_batches is 1, which is for trials"):
        start([f"run_dir={tmp_path}", "resume=auto", "trainer.max_steps=4"])


def test_fine_tuning_needs_weights_or_a_word(manifest: Path, tmp_path: Path) -> None:
    preset = ["experiment=k400_vit_base_train", *typed(manifest, tmp_path, "trainer.max_steps=1")]
    preset += ["trainer.precision=float32", "data.num_workers=0"]
    with pytest.raises(InvalidArgumentError, match=r"checkpoint is not set, but model.new_head is.*checkpoint=none"):
        start(preset)
    assert start([*preset, "checkpoint=none"]).steps == 1


def test_loggers_know_the_configuration(manifest: Path, tmp_path: Path) -> None:
    start(typed(manifest, tmp_path, "trainer.max_steps=1", "logger=default", "tokenizer.threshold=0.3"))
    for logger in ("logs", "tensorboard"):
        assert "threshold: 0.3" in (tmp_path / logger / "hparams.yaml").read_text()


def test_the_configuration_is_shown_and_nothing_is_done(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(typed(manifest, tmp_path, "trainer.max_steps=1"))
    kept = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--print-config", f"run_dir={tmp_path}", "resume=auto"])
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out) == {**kept, "resume": "auto"}


def test_a_run_is_tested_by_one_flag(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *typed(manifest, tmp_path / "run", "trainer.max_steps=1"), "--test"]
    for added, code in ([], 2), ([f"data.test={manifest}"], 0):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, *added])
        assert (stop.value.code or 0) == code
        assert ("--test needs a manifest" in capsys.readouterr().err) == (code == 2)
    assert json.loads((tmp_path / "run" / "test.json").read_text())["num_videos"] == 6


def test_evaluate_takes_json_like_every_command(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(typed(manifest, tmp_path / "run", "trainer.max_steps=1"))
    command = [
        "evaluate",
        f"checkpoint={tmp_path / 'run'}",
        f"data.test={manifest}",
        "--json",
        str(tmp_path / "a.json"),
    ]
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert not stop.value.code
    assert json.loads((tmp_path / "a.json").read_text())["num_videos"] == 6
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "json=b.json"])
    assert stop.value.code == 2
    assert "give one of them" in capsys.readouterr().err


def test_without_a_terminal_there_are_lines(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_SECONDS_BETWEEN_LINES", 0)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *typed(manifest, tmp_path / "run", "trainer.max_steps=2")])
    assert not stop.value.code
    said = capfd.readouterr().err
    assert re.search(r"Training: 2 of 2, loss \d\.\d{3}, \d+\.\d clips/s", said), said
    assert "Epoch" not in said


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert not stop.value.code
    assert capsys.readouterr().out == f"rlt {rlt.__version__}\n"


def test_videos_that_go_away_cost_no_step(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share that is no longer mounted: one line, also from a process that reads data, and the run goes on later."""
    entries = read_manifest(manifest).entries
    folder = tmp_path / "videos"
    folder.mkdir()
    copies = [replace(entry, path=shutil.copy(entry.path, folder)) for entry in entries]
    own = tmp_path / "own.parquet"
    write_manifest(Manifest(tuple(copies), read_manifest(manifest).class_names), own)
    more = ["trainer.max_steps=20", "data.num_workers=1"]
    start(typed(own, tmp_path / "whole", *more))
    before, calls = VideoClassifier.training_step, iter(range(1000))

    def then(self: VideoClassifier, *arguments: object) -> object:
        if next(calls) == 1:
            folder.rename(tmp_path / "away")
        return before(self, *arguments)

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(VideoClassifier, "training_step", then)
        with pytest.raises(VideoError, match=r"^none of \d+ videos can be decoded; .* no such file") as error:
            start(typed(own, tmp_path / "run", *more), said)
    assert "\n" not in str(error.value)
    assert "Original Traceback" in str(error.value.args)  # what torch tells of the process
    step = read_step(max((tmp_path / "run" / "checkpoints").glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime))
    assert 2 <= step < 20
    assert said[-1].startswith(f"stopped: saved step {step}; go on with: rlt train run_dir=")
    (tmp_path / "away").rename(folder)
    assert start([f"run_dir={tmp_path / 'run'}", "resume=auto"]).resumed_at == step
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_a_full_disk_is_one_line_and_what_was_saved_stays(manifest: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from rlt import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "cli.main(['train', *sys.argv[1:]])\n"
    )
    start(typed(manifest, tmp_path / "run", "model=vit_micro", "trainer.max_steps=2"))
    kept = (tmp_path / "run" / "checkpoints" / "step=2.ckpt").read_bytes()
    again = [f"run_dir={tmp_path / 'run'}", "resume=auto", "trainer.max_steps=4"]
    full = subprocess.run([sys.executable, "-c", code, *again], capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "step=4.ckpt cannot be written, with " in full.stderr.replace("\n", " ")
    assert "Traceback" not in full.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=2.ckpt"]
    assert (tmp_path / "run" / "checkpoints" / "step=2.ckpt").read_bytes() == kept

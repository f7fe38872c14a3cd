"""`rlt prepare`, `rlt train` and `rlt evaluate` as they are written in the README, on real encoded video."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rlt
import video_factory

pytest.importorskip("lightning")

from rlt import cli
from rlt.conf import compose
from rlt.errors import InvalidArgumentError
from rlt.evaluation.predictions import read_predictions
from rlt.evaluation.run import config_of_run, evaluation_config
from rlt.files import write_json
from rlt.tokens import PatchView

SMALL = [
    "model.drop_path=0.1",
    "data.clip.num_frames=4",
    "data.clip.frame_stride=1",
    "data.clip.size=32",
    "trainer.batch_size=4",
    "optimizer.lr=0.03",
    "logger=none",
]
REQUIRED = {"top1", "top5", "tokens_kept", "clips_per_second", "num_videos", "failed", "machine"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA/{train,val}/{dark,bright}: classes that a network can tell apart after a few steps."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 4), ("val", 2)):
        for label, value in (("bright", 210), ("dark", 40)):
            (root / split / label).mkdir(parents=True)
            for number in range(count):

                def picture(frame: int, value: int = value, number: int = number) -> np.ndarray:
                    image = np.full((48, 64, 3), value, np.uint8)
                    image[8:20, 5 * number + frame : 5 * number + frame + 12] = 125
                    return image

                video_factory.write_video(root / split / label / f"{number}.mp4", 8, picture=picture)
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        code = stop.value.code
        return (code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def test_from_a_folder_to_a_paired_comparison(
    run: Callable[..., tuple[int, str, str]], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of files are those of the folder that the user stands in
    for split in ("train", "val"):
        code, _, err = run("prepare", "folder", videos / split, "--output", f"{split}.parquet")
        assert code == 0, err
    train = [
        "experiment=surveillance_small",
        *SMALL,
        "data.train=train.parquet",
        "data.val=val.parquet",
        "tokenizer=rlt",
    ]
    code, out, err = run("train", *train, "trainer.max_steps=6", "run_dir=runs/a")
    assert code == 0, err
    assert "runs/a: step 6" in out
    code, out, err = run("train", *train, "trainer.max_steps=12", "run_dir=runs/a", "resume=auto")
    assert code == 0, err
    assert "going on from runs/a/checkpoints/step=6.ckpt" in err
    assert "runs/a: step 12" in out

    evaluate = ["evaluate", "checkpoint=runs/a", "data.test=val.parquet"]
    code, out, err = run(
        *evaluate,
        "tokenizer=rlt",
        "tokenizer.keep_ratio=null",
        "json=a.json",
        "predictions=a.parquet",
        "pictures=pictures",
    )
    assert code == 0, err
    assert "tokens kept" in out
    code, out, err = run(*evaluate, "tokenizer=none", "json=b.json", "predictions=b.parquet", "compare_with=a.parquet")
    assert code == 0, err
    rlt_numbers, dense_numbers = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    for numbers in (rlt_numbers, dense_numbers):
        assert numbers.keys() >= REQUIRED
        assert numbers["num_videos"] == 4
        assert numbers["failed"] == []
    assert rlt_numbers["tokens_kept"] < dense_numbers["tokens_kept"] == 1
    assert "comparison" in dense_numbers

    code, _, err = run(*evaluate, "tokenizer=rlt", "batch_videos=3", "optimizer.lr=1", "json=c.json")
    assert code == 0, err
    assert "warning: without effect on rlt evaluate: optimizer.lr" in err
    batched = json.loads(Path("c.json").read_text())
    assert batched["settings"].pop("batch_videos") == 3
    assert rlt_numbers["settings"].pop("batch_videos") == 1
    for name in ("settings", "top1", "top5", "tokens_histogram", "flops", "confusion"):
        assert batched[name] == rlt_numbers[name], name
    assert rlt_numbers["settings"]["clip"]["num_frames"] == 4  # as in training, without being said again
    predictions = read_predictions("a.parquet")
    assert rlt_numbers["top1"] == sum(prediction.correct for prediction in predictions) / 4
    assert len(list(Path("pictures").glob("*.png"))) == 2


def test_what_is_missing_is_said_in_one_line(
    run: Callable[..., tuple[int, str, str]], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["train"], "data.train is not set"),
        (["train", "data.train=none.parquet"], "none.parquet"),
        (["train", "experiment=none"], "experiment is 'none'; allowed are k400_vit_base_eval"),
        (["train", "trainer.max_step=3"], "did you mean trainer.max_steps?"),
        (["evaluate", "tokeniser=rlt"], "did you mean tokenizer?"),
        (["evaluate"], "checkpoint is not set"),
        (["evaluate", "checkpoint=runs/none"], "data.test is not set"),
        (["evaluate", "checkpoint=x", "tokenizer=rlt", "tokenizer.threshold=-1"], "threshold is -1.0"),
    ):
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert message in err
        assert len(err.strip().splitlines()) == 1, err


def test_a_run_is_evaluated_as_it_was_trained(videos: Path, tmp_path: Path) -> None:
    """From config.json; a run of before that has the overrides it was trained with."""
    trained = [
        "experiment=ucf_small",
        "data.clip.size=32",
        "tokenizer.threshold=0.3",
        "checkpoint=a.pth",
        "json=a.json",
    ]
    trained.append("data.test=a.csv")
    write_json(tmp_path / "run" / "overrides.json", trained)
    write_json(tmp_path / "run" / "config.json", asdict(compose([*trained, "seed=4"])))
    checkpoint = f"checkpoint={tmp_path / 'run'}"
    config = evaluation_config([checkpoint, "device=cpu"])
    assert (config.seed, config.data.clip.size, config.tokenizer.threshold, config.model.name) == (
        4,
        32,
        0.3,
        "vit_tiny",
    )
    assert (config.checkpoint, config.json) == (str(tmp_path / "run"), None)
    assert evaluation_config([checkpoint, "model.name=vit_tiny"]) == replace(config, device="auto")
    assert evaluation_config([checkpoint, "seed=3"]).data.test == "a.csv"
    assert evaluation_config([checkpoint, "data.val=b.csv"]).data.test is None  # it would come before what is typed
    for typed, message in (
        ("model=vit_base", "model is 'vit_base', but .*run was trained with 'vit_tiny'; leave it out"),
        ("model.num_heads=6", "model.num_heads is 6, but .*run was trained with None; leave it out"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            evaluation_config([checkpoint, typed])
    (tmp_path / "run" / "config.json").unlink()
    assert evaluation_config([checkpoint, "device=cpu"]) == replace(config, seed=0)
    merging = ["tokenizer=tome", "tokenizer.merge_per_block=3"]  # as it was written then
    write_json(tmp_path / "run" / "overrides.json", [*trained[:2], *merging])
    config = evaluation_config([checkpoint])
    assert (config.tokenizer.rule, config.model.merge_per_block) == ("none", 3)
    write_json(tmp_path / "model" / "config.json", {"model_type": "videomae"})
    assert config_of_run(str(tmp_path / "model")) == {}
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(InvalidArgumentError, match="is cut off"):
        evaluation_config([checkpoint])


def test_help_lists_every_option(run: Callable[..., tuple[int, str, str]]) -> None:
    _, out, _ = run("train", "--help")
    for key in (
        "tokenizer.keep_ratio=null",
        "optimizer.layer_decay=0.75",
        "trainer.token_budget=null",
        "data.clip.size=224",
    ):
        assert key in out


def test_a_rule_of_the_users_own_is_trained_and_evaluated(
    run: Callable[..., tuple[int, str, str]], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @rlt.register_rule("mine")
    @dataclass(frozen=True)
    class Mine:
        share: float = 0.5

        def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
            assert len(seeds) == len(frames)
            mask = torch.zeros(frames.shape, dtype=torch.bool)
            mask[:, : max(round(self.share * frames.grid.time), 1)] = True
            return mask

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rlt.tokens.RULES, "mine", Mine)
    for split in ("train", "val"):
        assert run("prepare", "folder", videos / split, "--output", f"{split}.parquet")[0] == 0
    data = ["experiment=surveillance_small", *SMALL, "data.train=train.parquet", "data.val=val.parquet"]
    code, out, err = run("train", *data, "tokenizer=mine", "trainer.max_steps=2", "run_dir=runs/mine")
    assert code == 0, err
    assert "50.0% of the tokens kept" in out
    code, _, err = run(
        "evaluate", "checkpoint=runs/mine", "data.test=val.parquet", "tokenizer.share=1.0", "json=m.json"
    )
    assert code == 0, err
    numbers = json.loads(Path("m.json").read_text())
    assert numbers["tokens_kept"] == 1
    assert numbers["settings"]["tokenizer"]["policy"] == "mine"

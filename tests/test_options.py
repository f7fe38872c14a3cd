"""Every documented option changes something that a user can see: a door lists its options, and a case for each.

A case takes the command line that it starts from, what it adds to it, and a look at what comes of a command line. The
look must find the same twice and something else with the addition. What is refused is seen as its message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import command_options
import video_factory

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import ModelCheckpoint

from rlt.checkpoints import convert
from rlt.conf import compose
from rlt.conf.reference import sections
from rlt.conf.saved import training_config
from rlt.conf.schema import Config, is_read_by
from rlt.data.manifest import Manifest, VideoEntry, read_manifest, write_manifest
from rlt.errors import RltError
from rlt.evaluation.run import evaluate_config, evaluation_config
from rlt.frontier import frontier_config
from rlt.training.checkpointing import newest_checkpoint
from rlt.training.folder import check_same_run
from rlt.training.loaders import TrainingData
from rlt.training.optimizer import lr_factor, make_optimizer
from rlt.training.run import build_model, count_steps, make_trainer, resume_point, train
from rlt.video import DECODERS

SMALL = (
    "data=folder", "model=vit_tiny", "logger=none", "data.clip.num_frames=4", "data.clip.frame_stride=1",
    "data.clip.size=32", "data.train=train.parquet", "data.val=val.parquet", "trainer.accelerator=cpu",
    "trainer.batch_size=4", "trainer.max_steps=1",
)  # fmt: skip
PLAIN = (  # without augmentation, which would hide what else changes
    "data.augment.random_resized_crop=false", "data.augment.horizontal_flip=false",
    "data.augment.rand_augment_num_ops=0", "data.augment.erasing_probability=0", "data.augment.mixup_prob=0",
    "data.augment.label_smoothing=0",
)  # fmt: skip

Look = Callable[[tuple[str, ...]], object]


@dataclass(frozen=True)
class Case:
    """What shows that an option has an effect."""

    added: str | tuple[str, ...]
    """To the command line."""
    look: Look
    """At what comes of a command line."""
    start: tuple[str, ...] = ()
    """What the option needs to act on."""


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.detach().cpu().numpy().tobytes() for tensor in tensors)).hexdigest()


def training_data(config: Config) -> TrainingData:
    training = read_manifest(str(config.data.train))
    validation = None if config.data.val is None else read_manifest(config.data.val)
    return TrainingData(config, training, validation, build_model(config, training).config)


def batch(overrides: tuple[str, ...]) -> object:
    """The first batch: its videos, tokens and targets."""
    made = next(iter(training_data(compose([*SMALL, *PLAIN, *overrides])).train_dataloader()))
    return made.paths, made.packed.grids, digest(made.packed.patches, made.packed.coords), made.targets.tolist()


def loaders(overrides: tuple[str, ...]) -> object:
    """How batches are made, without making one."""
    data = training_data(compose([*SMALL, *overrides]))
    validation = data.val_dataloader()
    videos = [] if isinstance(validation, list) else [entry.path for entry in validation.dataset.entries]  # type: ignore[attr-defined]
    return data.train_dataloader().num_workers, data.clips_per_step, videos


def steps(overrides: tuple[str, ...]) -> object:
    """Length of the run."""
    config = compose([*SMALL, "trainer.max_steps=null", *overrides])
    return count_steps(config, training_data(config))


def network(overrides: tuple[str, ...]) -> object:
    """The network: sizes, weights, stochastic depth, and the logits of a clip in training and in evaluation."""
    config = compose([*SMALL, *PLAIN, *overrides])
    data = read_manifest(str(config.data.train))
    model = build_model(config, data)
    packed = next(iter(TrainingData(config, data, None, model.config).train_dataloader())).packed
    rates = [block.drop_path for block in model.blocks]
    logits = model.eval()(packed)
    return model.config, rates, model.activation_checkpointing, digest(logits, *model.state_dict().values())


def optimizer(overrides: tuple[str, ...]) -> object:
    """Groups of the optimizer, and its schedule over ten steps."""
    config = compose([*SMALL, *overrides])
    model = build_model(config, read_manifest(str(config.data.train)))
    made, _ = make_optimizer(model, model.config.depth, config.optimizer, clips_per_step=8, total_steps=10)
    groups = [(group["name"], group["lr"], group["weight_decay"], group["betas"]) for group in made.param_groups]
    return groups, [lr_factor(10, config.optimizer)(step) for step in range(11)]


def trainer(overrides: tuple[str, ...]) -> object:
    """Lightning's trainer with its loggers and callbacks."""
    config = compose([*SMALL, *overrides])
    made = make_trainer(config, 10)
    loggers = [
        (
            type(logger).__name__,
            logger.name,
            getattr(logger, "_offline", None),
            {**getattr(logger, "_wandb_init", {}), "id": None},  # a new one every time
        )
        for logger in made.loggers
    ]
    kept = [
        (callback.dirpath, callback.save_top_k, callback._every_n_train_steps)
        for callback in made.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
    ]
    names = [type(callback).__name__ for callback in made.callbacks]
    strategy = type(made.strategy).__name__, made.num_devices, made.num_nodes, type(made.accelerator).__name__
    pace = made.accumulate_grad_batches, made.val_check_batch, made.val_check_interval, made.log_every_n_steps
    limits = made.limit_train_batches, made.limit_val_batches, made.overfit_batches, type(made.profiler).__name__
    return loggers, kept, names, limits, strategy, pace, made.gradient_clip_val, made.precision, made.default_root_dir


def resumed(overrides: tuple[str, ...]) -> object:
    """Where a run goes on, and what is said about it."""
    said: list[str] = []
    return resume_point(compose([*SMALL, *overrides]), said.append), said


def gone_on(overrides: tuple[str, ...]) -> object:
    """What differs from the run so far."""
    return check_same_run(training_config([*SMALL, "run_dir=run", "resume=auto", *overrides]), {})


def evaluation(overrides: tuple[str, ...]) -> object:
    """What an evaluation says of itself and of each video, and the files that it leaves."""
    before = set(Path().rglob("*"))
    run = evaluate_config(evaluation_config(["data.test=val.parquet", *overrides]))
    written = sorted(str(path) for path in set(Path().rglob("*")) - before if path.is_file())
    for name in written:
        Path(name).unlink()
    comparison = None if run.comparison is None else run.comparison.to_json()
    return run.result.settings, run.result.merge_per_block, run.result.predictions, comparison, written


def frontier(overrides: tuple[str, ...]) -> object:
    """What a frontier says of itself and of each arm, and the files that it leaves."""
    before = set(Path().rglob("*"))
    config = evaluation_config(["data.test=val.parquet", *FEW_ARMS, *overrides])
    result = frontier_config(config)
    written = sorted(str(path) for path in set(Path().rglob("*")) - before if path.is_file())
    for name in written:
        Path(name).unlink()
    return result.settings, [point.to_json() for point in result.points], len(result.videos), len(written), written[:1]


def config_keys(command: str) -> list[str]:
    """Keys of the configuration that a command reads."""
    return [option.key for section in sections() for option in section.options if is_read_by(command, option.key)]


AUGMENT: dict[str, tuple[str, tuple[str, ...]]] = {
    "random_resized_crop": ("true", ()),
    "crop_scale_min": ("0.9", ("random_resized_crop=true",)),
    "crop_scale_max": ("0.2", ("random_resized_crop=true",)),
    "crop_ratio_min": ("1.3", ("random_resized_crop=true",)),
    "crop_ratio_max": ("0.8", ("random_resized_crop=true",)),
    "horizontal_flip": ("true", ()),
    "rand_augment_num_ops": ("6", ()),
    "rand_augment_magnitude": ("1", ("rand_augment_num_ops=6",)),
    "rand_augment_magnitude_std": ("3", ("rand_augment_num_ops=6",)),
    "erasing_probability": ("1", ()),
    "mixup_alpha": ("9", ("mixup_prob=1", "switch_prob=0")),
    "cutmix_alpha": ("9", ("mixup_prob=1", "switch_prob=1")),
    "mixup_prob": ("1", ()),
    "switch_prob": ("1", ("mixup_prob=1", "switch_prob=0")),
    "label_smoothing": ("0.2", ()),
}
"""Option of data.augment -> its other value, and the options without which it has nothing to do."""

RULES_OF_TRAINING = {
    "tokenizer.rule": Case("tokenizer=none", batch),
    "tokenizer.threshold": Case("tokenizer.threshold=0.5", batch),
    "tokenizer.keep_ratio": Case("tokenizer.keep_ratio=1", batch, ("tokenizer=budget", "tokenizer.keep_ratio=0.6")),
    "tokenizer.max_tokens": Case("tokenizer.max_tokens=7", batch, ("tokenizer=budget", "tokenizer.max_tokens=5")),
    "tokenizer.reference": Case("tokenizer.reference=anchor", batch, ("data.clip.num_frames=8",)),
    "tokenizer.exposure": Case(
        "tokenizer.exposure=gain", batch, ("data.clip.num_frames=8", "tokenizer.threshold=0.05", "trainer.batch_size=6")
    ),
    "tokenizer.motion": Case(
        "tokenizer.motion=global", batch, ("data.clip.num_frames=8", "data.train=pan.parquet", "trainer.batch_size=6")
    ),
}
TRAIN: dict[str, Case] = {
    "data.train": Case("data.train=three.parquet", batch),
    "data.val": Case("data.val=null", loaders),
    "data.clip.num_frames": Case("data.clip.num_frames=6", batch),
    "data.clip.frame_stride": Case("data.clip.frame_stride=2", batch),
    "data.clip.fps": Case(("data.clip.frame_stride=null", "data.clip.fps=5"), batch),
    "data.clip.size": Case("data.clip.size=48", batch),
    "data.clip.sampling": Case("data.clip.sampling=uniform", batch),
    "data.decoder": Case("data.decoder=standing", batch),
    "data.num_workers": Case("data.num_workers=2", loaders),
    **{
        f"data.augment.{name}": Case(f"data.augment.{name}={value}", batch, tuple(f"data.augment.{on}" for on in start))
        for name, (value, start) in AUGMENT.items()
    },
    "model.name": Case("model=vit_small", network),
    "model.drop_path": Case("model.drop_path=0.3", network),
    "model.length_encoding": Case("model.length_encoding=learned", network),
    "model.new_head": Case("model.new_head=true", network, ("checkpoint=weights.pth", "data.train=three.parquet")),
    "model.num_heads": Case("model.num_heads=6", network),
    "model.merge_per_block": Case("model.merge_per_block=1", network),
    "model.run_lengths": Case("model.run_lengths=aware", network),
    **RULES_OF_TRAINING,
    "optimizer.lr": Case("optimizer.lr=1e-4", optimizer),
    "optimizer.weight_decay": Case("optimizer.weight_decay=0.3", optimizer),
    "optimizer.betas": Case("optimizer.betas=[0.8,0.9]", optimizer),
    "optimizer.layer_decay": Case("optimizer.layer_decay=0.5", optimizer),
    "optimizer.warmup_steps": Case("optimizer.warmup_steps=3", optimizer),
    "optimizer.warmup_fraction": Case("optimizer.warmup_fraction=0.5", optimizer),
    "optimizer.min_lr": Case("optimizer.min_lr=1e-4", optimizer),
    "trainer.max_steps": Case("trainer.max_steps=3", steps),
    "trainer.max_epochs": Case("trainer.max_epochs=3", steps),
    "trainer.batch_size": Case("trainer.batch_size=2", batch),
    "trainer.token_budget": Case("trainer.token_budget=10", batch),
    "trainer.accumulate": Case("trainer.accumulate=2", trainer),
    "trainer.precision": Case("trainer.precision=bfloat16", trainer),
    "trainer.gradient_clip": Case("trainer.gradient_clip=1", trainer),
    "trainer.accelerator": Case("trainer.accelerator=gpu", trainer),
    "trainer.devices": Case("trainer.devices=2", trainer),
    "trainer.num_nodes": Case("trainer.num_nodes=2", trainer),
    "trainer.strategy": Case("trainer.strategy=ddp", trainer),
    "trainer.validate_every": Case("trainer.validate_every=2", trainer),
    "trainer.save_every": Case("trainer.save_every=3", trainer),
    "trainer.keep_checkpoints": Case("trainer.keep_checkpoints=5", trainer),
    "trainer.log_every": Case("trainer.log_every=3", trainer),
    "trainer.early_stopping": Case("trainer.early_stopping=2", trainer, ("trainer.validate_every=2",)),
    "trainer.limit_train_batches": Case("trainer.limit_train_batches=3", trainer),
    "trainer.limit_val_batches": Case("trainer.limit_val_batches=3", trainer),
    "trainer.overfit_batches": Case("trainer.overfit_batches=3", trainer),
    "trainer.profiler": Case("trainer.profiler=simple", trainer),
    # A compiled network says that it cannot merge, before it compiles anything.
    "trainer.compile": Case("trainer.compile=true", network, ("model.merge_per_block=1",)),
    "trainer.activation_checkpointing": Case("trainer.activation_checkpointing=true", network),
    "trainer.ema_decay": Case("trainer.ema_decay=0.9", trainer),
    "logger.csv": Case("logger.csv=true", trainer),
    "logger.tensorboard": Case("logger.tensorboard=true", trainer),
    "logger.wandb": Case(("logger.wandb=true", "logger.offline=true"), trainer),
    "logger.project": Case("logger.project=mine", trainer, ("logger.wandb=true", "logger.offline=true")),
    "logger.name": Case("logger.name=mine", trainer, ("logger.wandb=true", "logger.offline=true")),
    "logger.tags": Case("logger.tags=[mine]", trainer, ("logger.wandb=true", "logger.offline=true")),
    "logger.group": Case("logger.group=mine", trainer, ("logger.wandb=true", "logger.offline=true")),
    "logger.offline": Case("logger.offline=true", trainer, ("logger.wandb=true",)),
    "checkpoint": Case("checkpoint=weights.pth", network),
    "run_dir": Case("run_dir=elsewhere", trainer),
    "resume": Case("resume=auto", resumed, ("run_dir=run",)),
    "change": Case("change=true", gone_on, ("seed=1",)),
    "seed": Case("seed=1", batch),
}

OF_RUN = ("checkpoint=run",)
OF_FILE = ("checkpoint=weights.pth", *SMALL[:6])
EVALUATE: dict[str, Case] = {
    "data.val": Case("data.val=train.parquet", evaluation, ("data.test=null", *OF_RUN)),
    "data.test": Case("data.test=train.parquet", evaluation, OF_RUN),
    "data.clip.num_frames": Case("data.clip.num_frames=6", evaluation, OF_RUN),
    "data.clip.frame_stride": Case("data.clip.frame_stride=2", evaluation, OF_RUN),
    "data.clip.fps": Case("data.clip.fps=5", evaluation, OF_RUN),
    "data.clip.size": Case("data.clip.size=48", evaluation, OF_RUN),
    "data.clip.sampling": Case("data.clip.sampling=uniform", evaluation, OF_RUN),
    "data.views.num_clips": Case("data.views.num_clips=2", evaluation, OF_RUN),
    "data.views.num_crops": Case("data.views.num_crops=3", evaluation, OF_RUN),
    "data.decoder": Case("data.decoder=standing", evaluation, OF_RUN),
    "data.num_workers": Case("data.num_workers=1", evaluation, OF_RUN),
    "model.name": Case("model=vit_small", evaluation, OF_FILE),
    "model.num_heads": Case("model.num_heads=6", evaluation, OF_FILE),
    "model.merge_per_block": Case("model.merge_per_block=1", evaluation, OF_RUN),
    "model.run_lengths": Case("model.run_lengths=aware", evaluation, OF_RUN),
    **{
        name: replace(
            case, look=evaluation, start=(*OF_RUN, *(on for on in case.start if not on.startswith("trainer.")))
        )
        for name, case in RULES_OF_TRAINING.items()
    },
    "trainer.precision": Case("trainer.precision=bfloat16", evaluation, OF_RUN),
    # Which does not say how clips are taken: 16 frames, here small ones.
    "checkpoint": Case(("checkpoint=weights.pth", "data.clip.size=32", "data.clip.frame_stride=1"), evaluation, OF_RUN),
    "seed": Case("seed=1", evaluation, ("tokenizer=random", *OF_RUN)),
    "device": Case("device=cuda", evaluation, ("device=cpu", *OF_RUN)),
    "batch_videos": Case("batch_videos=2", evaluation, OF_RUN),
    "max_videos": Case("max_videos=1", evaluation, OF_RUN),
    "predictions": Case("predictions=made/predictions.parquet", evaluation, OF_RUN),
    "compare_with": Case("compare_with=earlier.parquet", evaluation, ("predictions=made/a.parquet", *OF_RUN)),
    "pictures": Case("pictures=made", evaluation, OF_RUN),
    "json": Case("json=made/numbers.json", evaluation, OF_RUN),
}


FEW_ARMS = ("frontier.thresholds=[0.1]", "frontier.keep_ratios=[]", "frontier.seeds=1")
_FRONTIER_TOO = (
    "data.val", "data.test", "data.clip.num_frames", "data.clip.frame_stride", "data.clip.fps", "data.clip.size",
    "data.clip.sampling", "data.views.num_clips", "data.views.num_crops", "data.decoder", "model.name",
    "model.num_heads", "trainer.precision", "checkpoint", "device", "max_videos",
)  # fmt: skip
FRONTIER: dict[str, Case] = {
    **{name: replace(EVALUATE[name], look=frontier) for name in _FRONTIER_TOO},
    "seed": Case("seed=1", frontier, OF_RUN),
    "pictures": Case("pictures=made", frontier, OF_RUN),
    "json": Case("json=made/numbers.json", frontier, OF_RUN),
    "frontier.thresholds": Case("frontier.thresholds=[0.5]", frontier, OF_RUN),
    "frontier.keep_ratios": Case("frontier.keep_ratios=[0.7]", frontier, OF_RUN),
    "frontier.seeds": Case("frontier.seeds=2", frontier, OF_RUN),
    "frontier.cache": Case("frontier.cache=kept", frontier, OF_RUN),
}


def cases(found: Mapping[str, tuple[Any, ...]]) -> dict[str, Case]:
    return {option: Case(tuple(added), look) for option, (look, *added) in found.items()}


DOORS: dict[str, tuple[Callable[[], Sequence[str]], Mapping[str, Case]]] = {
    "train": (lambda: config_keys("train"), TRAIN),
    "evaluate": (lambda: config_keys("evaluate"), EVALUATE),
    "frontier": (lambda: config_keys("frontier"), FRONTIER),
    "compare": (lambda: command_options.command_options("compare"), cases(command_options.COMPARE)),
    "inspect": (lambda: command_options.command_options("inspect"), cases(command_options.INSPECT)),
    "calibrate": (lambda: command_options.command_options("calibrate"), cases(command_options.CALIBRATE)),
    "benchmark": (lambda: command_options.command_options("benchmark"), cases(command_options.BENCHMARK)),
    "patch": (command_options.patch_options, cases(command_options.PATCH)),
}
"""Command -> its documented options, and what shows that each has an effect."""
STARTS: dict[tuple[Look, tuple[str, ...]], object] = {}
"""What was found without an addition; found twice, and once for all cases that start alike."""


def random_scene(side: int) -> np.ndarray:
    """uint8 [side, side, 3], smooth, with contrast."""
    coarse = torch.rand(1, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0)) * 160 + 40
    scene = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")[0]
    return np.ascontiguousarray(scene.permute(1, 2, 0).to(torch.uint8).numpy())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of six and of three videos, a run of one step, its weights in VideoMAE's layout, and predictions."""
    root = tmp_path_factory.mktemp("options")
    entries = []
    for number in range(6):

        def picture(frame: int, number: int = number) -> np.ndarray:
            image = np.full((48, 64, 3), 60 + 120 * (number % 2), np.uint8)
            image[8:24, 4 * number + frame : 4 * number + frame + 12] = 200 - 20 * number
            image[30:40, 40:] = (10 * frame, 10 * number, 90)
            return image

        path = root / f"{number}.mp4"
        video_factory.write_video(path, 24, picture=picture)
        label = ("dark", "bright", "grey")[number % 2]
        entries.append(VideoEntry(str(path), number % 2, label, 24, 25.0, 64, 48, 0.96, "ok", 0.5 + number / 20))
    scene = random_scene(96)

    def pan(frame: int) -> np.ndarray:
        return scene[30:62, 60 - 2 * frame : 92 - 2 * frame]

    video_factory.write_video(root / "pan.mkv", 24, codec="ffv1", pix_fmt="bgr0", picture=pan)
    pans = [replace(entry, path=str(root / "pan.mkv"), height=32, width=32) for entry in entries]
    for name, videos, classes in (
        ("pan", pans, ("dark", "bright")),
        ("train", entries, ("dark", "bright")),
        ("val", entries[:3], ("dark", "bright")),
        ("three", entries[3:], ("dark", "bright", "grey")),
    ):
        write_manifest(Manifest(tuple(videos), classes), root / f"{name}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        overrides = [*SMALL, "run_dir=run"]
        train(compose(overrides), overrides=overrides, say=lambda _: None)
        assert newest_checkpoint("run") is not None
        convert("run/model", "weights.pth", to="videomae")
        evaluate_config(evaluation_config([*OF_RUN, "predictions=earlier.parquet"]))
    return root


@pytest.fixture
def seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Look, tuple[str, ...]], Any]]:
    """What a look finds in the folder; what is refused is found as the message, in one line."""
    decode = DECODERS["pyav"]
    monkeypatch.setitem(DECODERS, "standing", lambda file, moments: [next(iter(decode(file, moments)))] * 6)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(folder)

    def find(look: Look, overrides: tuple[str, ...]) -> object:
        try:
            return look(overrides)
        except RltError as error:
            return str(error)

    return find


@pytest.mark.parametrize("command", DOORS)
def test_every_documented_option_has_a_case(command: str) -> None:
    documented, cases = DOORS[command]
    assert sorted(cases) == sorted(documented())


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, (_, cases) in DOORS.items() for option in cases]
)
def test_every_option_has_an_effect(command: str, option: str, seen: Callable[[Look, tuple[str, ...]], Any]) -> None:
    case = DOORS[command][1][option]
    if option.startswith("logger.") and "wandb" in f"{case}":
        pytest.importorskip("wandb")
    added = (case.added,) if isinstance(case.added, str) else case.added
    if (case.look, case.start) not in STARTS:
        STARTS[case.look, case.start] = seen(case.look, case.start)
        assert seen(case.look, case.start) == STARTS[case.look, case.start]
    assert seen(case.look, (*case.start, *added)) != STARTS[case.look, case.start]

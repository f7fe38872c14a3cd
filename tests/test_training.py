"""Training: the optimizer against closed forms, and runs that can be cut off at any moment."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import video_factory

pytest.importorskip("lightning")

import rlt
from rlt.checkpoints.models import MODELS
from rlt.conf import compose, experiments, typed
from rlt.conf.schema import Config, OptimizerConfig
from rlt.data.manifest import Manifest, VideoEntry, read_manifest, write_manifest
from rlt.errors import InvalidArgumentError, TrainingError
from rlt.network.blocks import drop_path
from rlt.structures import Segments
from rlt.training.checkpointing import newest_checkpoint
from rlt.training.loaders import TrainingData
from rlt.training.module import VideoClassifier
from rlt.training.optimizer import layer_of, lr_factor, make_optimizer
from rlt.training.run import TrainingSummary, build_model, train

SMALL = [
    "data=folder",
    "model=vit_tiny",
    "model.drop_path=0.2",
    "data.clip.num_frames=4",
    "data.clip.frame_stride=1",
    "data.clip.size=32",
    "data.augment.rand_augment_num_ops=0",
    "trainer.batch_size=2",
    "trainer.accelerator=cpu",
    "trainer.save_every=2",
    "logger=none",
    "optimizer.lr=0.05",
]


@pytest.fixture(scope="module", autouse=True)
def _two_layers() -> Iterator[None]:
    """Nothing that is held here needs the twelve layers of ViT-Ti; processes of their own take ViT-micro."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS, "vit_tiny", MODELS["vit_tiny"].replace(depth=2))
        yield


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight short videos of two classes: bright or dark, with a moving square."""
    folder = tmp_path_factory.mktemp("videos")
    entries = []
    for number in range(8):
        label_id = number % 2

        def picture(frame: int, number: int = number, label_id: int = label_id) -> np.ndarray:
            image = np.full((48, 64, 3), 60 + 120 * label_id, np.uint8)
            image[8:24, 4 * number % 30 + frame : 4 * number % 30 + frame + 12] = 200 - 150 * label_id
            return image

        path = folder / f"{number}.mp4"
        video_factory.write_video(path, 8, picture=picture)
        label = ("dark", "bright")[label_id]
        entries.append(VideoEntry(str(path), label_id, label, 8, 25.0, 64, 48, 0.32, "ok", 0.5 + number / 20))
    target = folder / "manifest.parquet"
    write_manifest(Manifest(tuple(entries), ("dark", "bright")), target)
    return target


def settings(manifest: Path, run_dir: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.train={manifest}", f"data.val={manifest}", f"run_dir={run_dir}", *more]


def run(manifest: Path, run_dir: Path, *more: str) -> TrainingSummary:
    overrides = settings(manifest, run_dir, *more)
    return train(compose(overrides), overrides=overrides, say=lambda _: None)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return rlt.VisionTransformer.from_pretrained(run_dir / "model").state_dict()


def assert_same_weights(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_layer_decay_is_applied_as_the_closed_form_says() -> None:
    config = MODELS["vit_tiny"].replace(depth=3, num_classes=2, length_encoding="learned")
    model = rlt.VisionTransformer(config)
    optimizer, _ = make_optimizer(
        model, 3, OptimizerConfig(lr=1e-3, layer_decay=0.5, warmup_steps=1), clips_per_step=512, total_steps=10
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.add(name)
            layer = (
                0 if name.startswith(("patch", "length")) else int(name.split(".")[1]) + 1 if "blocks" in name else 4
            )
            assert group["lr"] == pytest.approx(2e-3 * 0.5 ** (4 - layer)), name
            decayed = name.endswith("weight") and "norm" not in name
            assert group["weight_decay"] == (0.05 if decayed else 0.0), name
    assert seen == set(names.values())
    with pytest.raises(InvalidArgumentError, match=r"'decoder\.weight' belongs to no layer"):
        layer_of("decoder.weight", 3)


def test_the_step_really_moves_layers_by_their_own_rate() -> None:
    model = rlt.VisionTransformer(MODELS["vit_tiny"].replace(depth=2, num_classes=2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, _ = make_optimizer(
        model,
        2,
        OptimizerConfig(lr=1e-3, layer_decay=0.1, weight_decay=0.0, warmup_steps=1),
        clips_per_step=256,
        total_steps=10,
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():  # AdamW's first step is lr in every direction
        moved = float((parameter - before[name]).abs().mean().detach())
        assert moved == pytest.approx(1e-3 * 0.1 ** (3 - layer_of(name, 2)), rel=1e-2), name


def test_schedule_follows_the_closed_form() -> None:
    factor = lr_factor(100, OptimizerConfig(lr=1e-3, warmup_steps=10, min_lr=1e-5))
    assert [factor(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for step in (10, 55, 100):
        progress = (step - 10) / 90
        assert factor(step) == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
    assert factor(1000) == pytest.approx(0.01)
    assert lr_factor(100, OptimizerConfig(warmup_fraction=0.2))(19) == 1.0


def test_drop_path_drops_whole_clips_and_keeps_the_mean() -> None:
    segments = Segments.from_lengths([3, 5] * 500)
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(segments.num_tokens, 2), segments, 0.25)
    per_clip = [clip.unique().tolist() for clip in dropped.split(segments.lengths)]
    assert all(len(values) == 1 for values in per_clip)
    assert {round(values[0], 6) for values in per_clip} == {0.0, 1.333333}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.06)


def test_activation_checkpointing_changes_memory_not_gradients() -> None:
    torch.manual_seed(0)
    model = rlt.VisionTransformer(MODELS["vit_tiny"].replace(depth=2, num_classes=2)).train()
    packed = rlt.pack(rlt.tokenize(torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)))
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad()
        model(packed).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])  # type: ignore[union-attr]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_length_encoding_starts_neutral() -> None:
    torch.manual_seed(0)
    model = rlt.VisionTransformer(MODELS["vit_tiny"].replace(depth=2, num_classes=2)).eval()
    packed = rlt.pack(rlt.tokenize(torch.zeros(16, 32, 32, 3, dtype=torch.uint8)))
    before = model(packed)
    model.add_length_encoding()
    assert torch.equal(model(packed), before)
    assert model.config.length_encoding == "learned"
    model(packed).sum().backward()
    assert model.length_embed is not None
    assert model.length_embed.grad is not None
    assert model.length_embed.grad[7].abs().sum() > 0
    assert model.length_embed.grad[:7].abs().sum() == 0  # every run is 8 long


@pytest.mark.parametrize("tokenizer", ["none", "rlt", "budget", "random", "uniform_frames", "drawn", "merging"])
def test_every_tokenizer_trains(manifest: Path, tmp_path: Path, tokenizer: str) -> None:
    more = {"budget": ["tokenizer.keep_ratio=0.75"], "merging": ["model.merge_per_block=1"]}.get(tokenizer, [])
    rule = tokenizer.replace("merging", "none")
    summary = run(manifest, tmp_path / "run", f"tokenizer={rule}", "trainer.max_steps=2", *more)
    assert summary.steps == 2
    assert (summary.tokens_kept == 1) == (rule == "none")
    assert summary.val_top1 is not None
    numbers = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert numbers["machine"]["processor"]
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (kept["tokenizer"]["rule"], kept["data"]["clip"]["size"]) == (rule, 32)
    config = rlt.VisionTransformer.from_pretrained(tmp_path / "run" / "model").config
    assert (config.labels, config.num_frames, config.image_size) == (("dark", "bright"), 4, 32)
    composed = compose(settings(manifest, tmp_path, f"tokenizer={rule}", *more))
    assert (config.clip, config.rule) == (
        composed.data.clip,
        composed.tokenizer.build(),
    )  # they travel with the weights


def test_one_run_for_a_range_of_thresholds(manifest: Path, tmp_path: Path) -> None:
    from rlt.evaluation.run import evaluation_config

    more = ["tokenizer=drawn", "tokenizer.lowest=0.2", "tokenizer.highest=0.7", "tokenizer.over=keep_ratio"]
    run(manifest, tmp_path / "run", "trainer.max_steps=1", *more)
    drawn = rlt.Drawn(0.2, 0.7, "keep_ratio")
    assert evaluation_config([f"checkpoint={tmp_path / 'run'}"]).tokenizer.build() == drawn
    plain = evaluation_config([f"checkpoint={tmp_path / 'run'}", "tokenizer=rlt", "tokenizer.threshold=0.3"])
    assert plain.tokenizer.build() == rlt.Threshold(0.3)
    data, config = read_manifest(manifest), compose(settings(manifest, tmp_path, *more))
    loaders = TrainingData(config, data, None, build_model(config, data).config)
    batches = iter(loaders.train_dataloader())
    counts = [len(clip) for batch in (next(batches), next(batches)) for clip in batch.packed.unpack()]
    assert len(set(counts)) > 2
    assert all(round(0.2 * 8) <= count <= round(0.7 * 8) for count in counts)
    with_budget = compose(settings(manifest, tmp_path, *more, "trainer.batch_size=2", "trainer.token_budget=9"))
    assert TrainingData(with_budget, data, None, loaders.model).expected_tokens == [4.0] * len(data)  # 0.45 of 8


def test_seeded_runs_repeat_exactly(manifest: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(manifest, tmp_path / name, "trainer.max_steps=3", f"seed={seed}")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(weights(tmp_path / "a")["head.weight"], weights(tmp_path / "c")["head.weight"])


@pytest.mark.parametrize("ema", ["null", "0.9"])
def test_a_longer_run_goes_on_from_a_finished_one(manifest: Path, tmp_path: Path, ema: str) -> None:
    constant = ["optimizer.min_lr=0.05", "optimizer.warmup_steps=1", "trainer.accumulate=2", f"trainer.ema_decay={ema}"]
    run(manifest, tmp_path / "whole", "trainer.max_steps=5", *constant)
    run(manifest, tmp_path / "parts", "trainer.max_steps=3", *constant)
    summary = run(manifest, tmp_path / "parts", "trainer.max_steps=5", "resume=auto", *constant)
    assert (summary.resumed_at, summary.steps) == (3, 5)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_network_that_is_fine_tuned_is_in_training_mode(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "first", "trainer.max_steps=2")
    start = [f"checkpoint={tmp_path / 'first' / 'model'}", "trainer.max_steps=2"]
    config = compose(settings(manifest, tmp_path, *start))
    model = build_model(config, rlt.data.manifest.read_manifest(manifest))
    assert all(module.training for module in model.modules())
    for name, rate in (("a", 0), ("b", 0.9)):  # stochastic depth had no effect in evaluation mode
        run(manifest, tmp_path / name, *start, f"model.drop_path={rate}")
    assert not torch.equal(weights(tmp_path / "a")["head.weight"], weights(tmp_path / "b")["head.weight"])


def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(manifest: Path, tmp_path: Path) -> None:
    same = ["model=vit_micro", "trainer.max_steps=40", "trainer.save_every=3"]
    overrides = settings(manifest, tmp_path / "killed", *same)
    code = "import sys; from rlt.cli import main; main(['train', *sys.argv[1:]])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    folder = tmp_path / "killed" / "checkpoints"
    while not list(folder.glob("step=*.ckpt")) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    stderr = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, stderr.decode()[-2000:]
    summary = run(manifest, tmp_path / "killed", *same, "resume=auto")
    assert 3 <= summary.resumed_at < 40
    run(manifest, tmp_path / "whole", *same)
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")


def test_a_corrupt_checkpoint_falls_back_to_the_one_before(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "run", "trainer.max_steps=4")
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    newest = folder / "step=4.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    said: list[str] = []
    overrides = settings(manifest, tmp_path / "run", "trainer.max_steps=6", "resume=auto")
    summary = train(compose(overrides), overrides=overrides, say=said.append)
    assert summary.resumed_at == 2
    assert "step=4.ckpt" in said[0]
    assert "step=2.ckpt" in said[1]
    assert sorted(path.name for path in folder.iterdir()) == ["step=4.ckpt", "step=6.ckpt"]  # the broken one replaced
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(TrainingError, match="none of the 2 checkpoints"):
        newest_checkpoint(tmp_path / "run")


def test_a_run_is_not_overwritten_by_accident(manifest: Path, tmp_path: Path) -> None:
    run(manifest, tmp_path / "run", "trainer.max_steps=2")
    with pytest.raises(TrainingError, match="resume=auto"):
        run(manifest, tmp_path / "run", "trainer.max_steps=4")
    with pytest.raises(TrainingError, match="nothing is left to do"):
        run(manifest, tmp_path / "run", "trainer.max_steps=2", "resume=auto")


def test_two_processes_equal_one(manifest: Path, tmp_path: Path) -> None:
    same = ["model=vit_micro", "model.drop_path=0", "data.augment.mixup_alpha=0", "data.augment.cutmix_alpha=0",
            "trainer.max_steps=3"]  # fmt: skip
    run(manifest, tmp_path / "one", *same, "trainer.batch_size=4")
    overrides = settings(
        manifest, tmp_path / "two", *same, "trainer.batch_size=2", "trainer.devices=2", "trainer.strategy=ddp"
    )
    command = Path(sys.executable).parent / "rlt"
    done = subprocess.run(
        [command, "train", *overrides], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    imbalance = json.loads((tmp_path / "two" / "summary.json").read_text())["tokens_max_over_mean"]
    assert 1 <= imbalance < 2
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=1e-3, msg=name)


def test_a_broken_video_is_replaced_counted_and_reported(manifest: Path, tmp_path: Path) -> None:
    entries = list(rlt.data.manifest.read_manifest(manifest).entries)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    entries[2] = VideoEntry(str(broken), 0, "dark", 8, 25.0, 64, 48, 0.32, "ok", 0.5)
    target = tmp_path / "with_broken.parquet"
    write_manifest(Manifest(tuple(entries), ("dark", "bright")), target)
    summary = run(target, tmp_path / "run", "trainer.max_steps=4")
    assert list(summary.failed) == [str(broken)]
    assert str(broken) in json.loads((tmp_path / "run" / "summary.json").read_text())["failed"]


def test_a_loss_that_is_not_finite_stops_and_names_the_files(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step \d+; the clips are from .*\.mp4") as error:
        run(manifest, tmp_path / "run", "trainer.max_steps=30", "optimizer.lr=1e30", "optimizer.warmup_steps=1")
    assert "\n" not in str(error.value)


def test_a_token_budget_sets_the_batches(manifest: Path, tmp_path: Path) -> None:
    config = compose(settings(manifest, tmp_path, "trainer.max_steps=1", "trainer.token_budget=15"))
    data = rlt.data.manifest.read_manifest(manifest)
    loaders = TrainingData(config, data, None, build_model(config, data).config)
    places = 2 * 2 * 2
    expected = [places * entry.tokens_kept for entry in data.entries if entry.tokens_kept]
    assert loaders.clips_per_step == pytest.approx(15 / (sum(expected) / 8))
    ranks = [islice(loaders.sampler(rank, 2), 4) for rank in range(2)]
    for shares in zip(*ranks, strict=True):
        assert sum(loaders.expected_tokens[key.index] for share in shares for key in share) / 2 <= 15 + places
    summary = run(manifest, tmp_path / "run", "trainer.max_steps=2", "trainer.token_budget=15")
    assert summary.steps == 2


def test_wandb_is_one_flag_away_and_works_offline(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(manifest, tmp_path / "run", "trainer.max_steps=2", "logger=wandb", "logger.offline=true", "trainer.log_every=1")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    metrics = (tmp_path / "run" / "logs" / "metrics.csv").read_text()
    assert "train/loss" in metrics.splitlines()[0]
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    run(manifest, tmp_path / "run", "trainer.max_steps=4", "logger=wandb", "logger.offline=true", "resume=auto")
    run(manifest, tmp_path / "other", "trainer.max_steps=1", "logger=wandb", "logger.offline=true")
    ids = [
        {path.stem.removeprefix("run-") for path in (tmp_path / name / "wandb").glob("offline-run-*/*.wandb")}
        for name in ("run", "other")
    ]
    assert [len(one) for one in ids] == [1, 1]  # a run that goes on writes to the record that it has
    assert ids[0] != ids[1]
    assert "WARNING" not in capfd.readouterr().err
    assert {(tmp_path / name / "wandb-id").read_text().strip() for name in ("run", "other")} == ids[0] | ids[1]


def test_compiled_blocks_give_the_same_run(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_network = rlt.VisionTransformer.compile_network
    compiled: list[rlt.VisionTransformer] = []

    def traced(model: rlt.VisionTransformer) -> None:
        """All of the compiler but its code generator, which `tests/test_compile.py` holds."""
        compile_network(model, backend="aot_eager")
        compiled.append(model)

    monkeypatch.setattr(rlt.VisionTransformer, "compile_network", traced)
    same = ["model.drop_path=0", "trainer.max_steps=2"]
    run(manifest, tmp_path / "eager", *same)
    assert not compiled
    run(manifest, tmp_path / "compiled", *same, "trainer.compile=true")
    assert len(compiled) == 1
    ours, theirs = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=1e-2, msg=name)


def test_the_loss_is_the_soft_cross_entropy_of_the_mixed_targets(manifest: Path, tmp_path: Path) -> None:
    config = compose(settings(manifest, tmp_path, "trainer.max_steps=1", "data.augment.label_smoothing=0.2"))
    content = rlt.data.manifest.read_manifest(manifest)
    model = build_model(config, content).eval()
    batch = next(iter(TrainingData(config, content, None, model.config).train_dataloader()))
    assert batch.targets.sum(1).tolist() == pytest.approx([1.0, 1.0])
    module = VideoClassifier(model, config.optimizer, total_steps=1, clips_per_step=2)
    said: dict[str, object] = {}
    module.log_dict = lambda values, **_: said.update(values)  # type: ignore[method-assign,assignment]
    module.optimizers = lambda: SimpleNamespace(param_groups=[{"lr": 0.1}])  # type: ignore[method-assign,assignment,return-value]
    module.trainer = SimpleNamespace(world_size=1)  # type: ignore[assignment]
    loss = module.training_step(batch, 0)
    logits = model(batch.packed).double()
    expected = -sum(
        float(target) * math.log(float(probability))
        for targets, probabilities in zip(batch.targets, logits.softmax(1), strict=True)
        for target, probability in zip(targets, probabilities, strict=True)
    )
    assert float(loss) == pytest.approx(expected / 2, rel=1e-5)
    assert said["train/loss"] == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize("name", experiments())
def test_presets_compose(name: str) -> None:
    config = compose([f"experiment={name}"])
    assert isinstance(config, Config)
    if name.startswith("ssv2"):
        assert config.data.augment.horizontal_flip is False
        assert config.data.clip.sampling == "uniform"
    if name == "k400_vit_base_eval":
        assert (config.data.views.num_clips, config.data.views.num_crops) == (4, 3)
    if config.trainer.max_epochs is not None:
        tried = compose([f"experiment={name}", "trainer.max_steps=1"]).trainer
        assert (tried.max_steps, tried.max_epochs) == (1, None)
    if "stride1" in name:
        assert (config.data.clip.num_frames, config.data.clip.frame_stride) == (64, 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tokenizer=best"], "tokenizer is 'best'; allowed are rlt, budget, none, random"),
        (["tokenizer=rtl"], "allowed are .*; did you mean 'rlt'?"),
        (["model=vit_bas"], "model is 'vit_bas'; allowed are vit_micro, .*; did you mean 'vit_base'?"),
        (["model.name=vit_bas"], "model.name is 'vit_bas'; allowed are .*vit_micro, .*; did you mean 'vit_base'?"),
        (["experiment=k400"], "experiment is 'k400'; allowed are .*; did you mean 'k400_vit_base_eval'?"),
        (["data=ssv3"], "data is 'ssv3'; allowed are kinetics400, .*; did you mean 'ssv2'?"),
        (["logger=wandbb"], "logger is 'wandbb'; allowed are default, wandb, none; did you mean 'wandb'?"),
        (["tokenizer.threshold=-1"], "threshold is -1.0; 0 or more"),
        (["trainer.precision=int8"], "trainer.precision is 'int8'; allowed are float32"),
        (["tokenizer.treshold=1"], "there is no option tokenizer.treshold; did you mean tokenizer.threshold?"),
        (["+tokenizer.treshold=1"], "there is no option tokenizer.treshold; did you mean tokenizer.threshold?"),
        (
            ["trainer.max_steps=1", "trainer.max_epochs=2"],
            "max_steps is 1 and trainer.max_epochs is 2; give one of them",
        ),
        (["tokeniser=rlt"], "there is no option tokeniser; did you mean tokenizer?"),
        (["trainer.max_step=3"], "there is no option trainer.max_step; did you mean trainer.max_steps?"),
        (["max_steps=3"], "there is no option max_steps; did you mean trainer.max_steps?"),
        (["data.clips.size=3"], "there is no option data.clips.size; did you mean data.clip.size?"),
        (["trainer.lr=3"], "there is no option trainer.lr; did you mean optimizer.lr?"),
        (["tokenizer=tome"], "tokenizer=tome is now written tokenizer=none model.merge_per_block=N"),
        (["tokenizer.merge_per_block=4"], "tokenizer.merge_per_block=4 is now written model.merge_per_block=N"),
        (["tokenizer.policy=rlt"], "tokenizer.policy=rlt is now written tokenizer=NAME"),
        (["+foo=1"], "there is no option foo; `rlt train --help` lists all"),
        (["hydra.run.dir=x"], "there is no option hydra.run.dir"),
        (["trainer.max_steps"], "'trainer.max_steps' is no option; options are written key=value"),
        (["data.clip.fps=abc"], "^data.clip.fps is 'abc'; a number or null is needed, see `rlt train --help`$"),
        (["trainer.max_steps=many"], "trainer.max_steps is 'many'; a whole number or null is needed"),
        (["logger.csv=perhaps"], "logger.csv is 'perhaps'; true or false is needed"),
        (["optimizer.betas=[a,b]"], r"optimizer.betas\[0\] is 'a'; a number is needed"),
        (["optimizer.betas=0.9"], "optimizer.betas is 0.9; a list in brackets is needed"),
        (["data.clip=5"], "data.clip is 5; a map {NAME: VALUE} is needed"),
        (["seed=1,2"], "seed=1,2 is more than one value"),
        (["data.test=a(b.csv"], "data.test=a.b.csv cannot be read; put the value in quotes"),
        (["trainer.batch_size=0"], "trainer.batch_size is 0"),
        (["model.length_encoding=sinus"], "model.length_encoding is 'sinus'"),
        (["optimizer.layer_decay=2"], "optimizer.layer_decay is 2.0"),
    ],
)
def test_bad_overrides_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as error:
        compose(overrides)
    assert "\n" not in str(error.value)
    assert "Config search path" not in str(error.value)


def test_what_is_typed_wins_over_the_run() -> None:
    trained = ["experiment=k400_vit_base_stride2_train", "tokenizer=rlt", "tokenizer.threshold=0.2", "seed=1"]
    trained += ["data.val=a.csv", "data.clip.size=112", "model=vit_small"]
    run = asdict(compose(trained))
    assert asdict(compose([], run=run)) == run
    assert (
        asdict(compose(["seed=1"], run={"data": run["data"]}))["data"] == run["data"]
    )  # what it leaves out is default

    some = compose(["tokenizer.keep_ratio=0.5", "data.clip.num_frames=8"], run=run | {"tokenizer": {"rule": "random"}})
    assert (some.tokenizer.rule, some.tokenizer.keep_ratio) == ("random", 0.5)
    assert (some.data.clip.num_frames, some.data.clip.frame_stride, some.data.clip.size) == (8, 2, 112)

    anew = compose(["tokenizer=rlt"], run=run)
    assert (anew.tokenizer.threshold, anew.seed, anew.data.clip.size) == (None, 1, 112)
    other = compose(["data=ssv2"], run=run)
    assert (other.data.clip.sampling, other.data.clip.size, other.data.val) == ("uniform", 224, "a.csv")
    assert (other.model.name, other.trainer.precision) == ("vit_small", "float16")

    preset = compose(["experiment=k400_vit_base_eval", "data.views.num_crops=1"], run=run)
    assert (preset.data.clip.num_frames, preset.data.views.num_clips, preset.data.views.num_crops) == (16, 4, 1)
    assert (preset.trainer.precision, preset.model.name, preset.data.val) == ("float32", "vit_base", "a.csv")
    assert (preset.tokenizer.threshold, preset.seed) == (0.2, 1)  # which no experiment decides


def test_what_is_typed_is_read_as_hydra_reads_it() -> None:
    assert typed(["checkpoint='runs/a b'", "seed=1", "seed=2", "tokenizer=rlt", "data.test=null"]) == {
        "checkpoint": "runs/a b",
        "seed": 2,
        "tokenizer": "rlt",
        "data.test": None,
    }


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["tokenizer.keep_ratio=0.5"], ("budget", None, 0.5, None)),
        (["tokenizer.threshold=0.2", "tokenizer.max_tokens=9"], ("budget", None, None, 9)),
        (["tokenizer.max_tokens=9", "tokenizer.threshold=0.2"], ("rlt", 0.2, None, None)),
        (["tokenizer=random", "tokenizer.keep_ratio=0.5", "tokenizer.threshold=0.2"], ("random", 0.2, None, None)),
        (["tokenizer={threshold: 0.2}", "tokenizer.keep_ratio=0.5"], ("budget", None, 0.5, None)),
        (["tokenizer=FILE"], ("rlt", 0.4, None, None)),
        (["tokenizer.rule=FILE"], ("rlt", 0.4, None, None)),
        (["tokenizer=FILE", "tokenizer.keep_ratio=0.5"], ("budget", None, 0.5, None)),
        (["tokenizer=FILE", "tokenizer.threshold=0.5"], ("rlt", 0.5, None, None)),
        (["tokenizer.keep_ratio=0.5", "tokenizer=FILE"], ("rlt", 0.4, None, None)),
    ],
)
def test_the_last_of_threshold_and_budgets_counts(
    tmp_path: Path, overrides: list[str], expected: tuple[object, ...]
) -> None:
    rlt.files.write_json(
        tmp_path / "rule.json", {"rule": {"rule": "rlt", "threshold": 0.4, "reference": "previous", "exposure": "none"}}
    )
    given = [override.replace("FILE", str(tmp_path / "rule.json")) for override in overrides]
    for run in ({}, {"rule": "rlt", "threshold": 0.3}, {"rule": "budget", "max_tokens": 3}):
        found = compose(given, run={"tokenizer": run} if run else {}).tokenizer
        assert (found.rule, found.threshold, found.keep_ratio, found.max_tokens) == expected


def test_a_rule_that_is_named_keeps_its_options() -> None:
    with pytest.raises(InvalidArgumentError, match=r"keep_ratio is 0.5, but rule 'rlt' has no such option"):
        compose(["tokenizer=rlt", "tokenizer.keep_ratio=0.5"])


@pytest.mark.parametrize(
    ("overrides", "ours"),
    [
        (
            ["experiment=val_vit_mae.yaml"],
            "rlt evaluate experiment=k400_vit_base_eval tokenizer=none data.test=... checkpoint=...",
        ),
        (
            ["experiment=val_vit_mae", "model.tokenizer_cfg.drop_policy='rlt'", "model.pretrain=a.pth"],
            "rlt evaluate experiment=k400_vit_base_eval tokenizer=rlt checkpoint=a.pth data.test=...",
        ),
        (
            ["experiment=val_vitl_mae", "+model.tokenizer_cfg={drop_policy: random, drop_param: 0.4}"],
            "rlt evaluate experiment=k400_vit_large_eval tokenizer=random tokenizer.keep_ratio=0.4 "
            "data.test=... checkpoint=...",
        ),
        (
            ["experiment=train_vit_mae", "model.tokenizer_cfg.encode_length=True", "trainer.devices=4"],
            "rlt train experiment=k400_vit_base_train tokenizer=rlt model.length_encoding=learned trainer.devices=4 "
            "data.train=... data.val=... checkpoint=...",
        ),
        (["model.tokenizer_cfg.drop_param=0.2", "seed=1"], "tokenizer=rlt tokenizer.threshold=0.2 seed=1"),
    ],
)
def test_commands_of_the_original_say_what_they_are_here(overrides: list[str], ours: str) -> None:
    with pytest.raises(InvalidArgumentError, match="this is a command of the original code; here it is: ") as error:
        compose(overrides)
    assert str(error.value).endswith(f"here it is: {ours}")
    given = [word for word in ours.split() if "=" in word and not word.endswith("=...")]
    assert isinstance(compose(given), Config)  # and it is one

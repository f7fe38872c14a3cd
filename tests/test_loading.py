"""A model that someone names: whatever the name is, the same network, clips, rule and classes come of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import rlt
from models import tiny_model
from rlt import Budget, Drawn, Everything, Threshold, assets, cli
from rlt.checkpoints import convert
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.evaluation.run import evaluation_config, load_evaluated
from rlt.files import write_json
from rlt.loading import dropping_rule, load_model, named, stored_config
from rlt.tokens import choose_rule
from rlt.video import ClipSpec

CLIP, RULE = ClipSpec(4, 2, size=48), Threshold(0.3, reference="anchor")
LABELS = tuple("abcdefg")


@pytest.fixture(scope="module")
def network() -> rlt.VisionTransformer:
    model = tiny_model(patch_size=16, labels=LABELS)
    model.config = model.config.replace(clip=CLIP, rule=RULE)
    return model


@pytest.fixture(scope="module")
def run_dir(network: rlt.VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run as training leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    network.save_pretrained(folder / "model")
    network.save_pretrained(folder / "best")
    return write_run(folder, {"data.clip": CLIP, "tokenizer.threshold": 0.3, "tokenizer.reference": "anchor"})


def write_run(folder: Path, options: dict[str, object]) -> Path:
    config = asdict(rlt.conf.schema.Config())
    for key, value in options.items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[name] = asdict(value) if isinstance(value, ClipSpec) else value
    write_json(folder / "config.json", config)
    write_json(folder / "overrides.json", [])
    return folder


@pytest.mark.parametrize("below", ["", "model", "best", "model/model.safetensors"])
def test_a_run_is_a_model(below: str, run_dir: Path, network: rlt.VisionTransformer) -> None:
    model, frames = load_model(run_dir / below), torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8)
    assert model.config == network.config == stored_config(run_dir / below)
    assert (model.config.clip_spec, model.config.rule, model.config.labels) == (CLIP, RULE, LABELS)
    tokens = network.tokenize(frames, rule=RULE)
    assert torch.equal(model(model.tokenize(frames)), network(tokens))  # its own rule, where no other is given
    assert not model.training


def test_what_every_layout_tells(run_dir: Path, network: rlt.VisionTransformer, tmp_path: Path) -> None:
    for to, target in (("rlt", "ours"), ("videomae", "a.pth"), ("hf", "theirs")):
        convert(run_dir, tmp_path / target, to=to, num_heads=network.config.num_heads)
        config = stored_config(tmp_path / target, num_heads=network.config.num_heads)
        model = load_model(tmp_path / target, num_heads=network.config.num_heads)
        assert model.config == config
        assert torch.equal(model.head.weight, network.head.weight)
        if to == "rlt":
            assert (config.clip, config.rule, config.labels) == (CLIP, RULE, LABELS)
        else:  # their layouts have no place for clips and rules
            assert (config.clip, config.rule) == (None, None)
            assert config.clip_spec == ClipSpec(config.num_frames, size=config.image_size)
    assert stored_config(tmp_path / "theirs").labels == LABELS
    assert stored_config(tmp_path / "theirs").clip_spec.num_frames == network.config.num_frames


def test_a_size_has_random_weights_that_are_always_the_same() -> None:
    first, second = load_model("vit_micro"), load_model("vit_micro")
    assert torch.equal(first.head.weight, second.head.weight)
    assert stored_config("vit_micro").clip_spec == ClipSpec()
    assert (named(None, None), named("vit_tiny", None)) == (("vit_base", None), ("vit_tiny", None))
    assert (named("runs/a", None), named("vit_tiny", "runs/a")) == (("runs/a", None), ("runs/a", "vit_tiny"))
    with pytest.raises(InvalidArgumentError, match="model is runs/b and checkpoint is runs/a; give one of them"):
        named("runs/b", "runs/a")
    with pytest.raises(InvalidArgumentError, match=r"model is 'vit_bas'; allowed are .*did you mean 'vit_base'"):
        named("vit_bas", None)
    with pytest.raises(CheckpointError, match=r"runs/none/model\.pth does not exist"):
        load_model("runs/none/model.pth")


def test_a_path_comes_before_a_size(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("vit_micro").symlink_to(run_dir)
    assert load_model("vit_micro").config.width == 32


def test_the_size_is_asked_for_only_by_those_who_type_it(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has width=32, vit_micro has 192; name none, and the checkpoint's own"):
        load_model(run_dir, size="vit_micro")
    rlt.create_model("vit_micro").save_pretrained(tmp_path / "micro")
    with pytest.raises(CheckpointError, match="has depth=6, vit_tiny has 12; ask for vit_micro"):
        stored_config(tmp_path / "micro", size="vit_tiny")
    config = evaluation_config([f"checkpoint={tmp_path / 'micro'}"])
    assert config.model.name is None
    assert load_evaluated(config).config.depth == 6
    typed = evaluation_config([f"checkpoint={tmp_path / 'micro'}", "model=vit_tiny"])
    with pytest.raises(CheckpointError, match="ask for vit_micro"):
        load_evaluated(typed)


def test_a_run_of_before_tells_by_its_configuration(network: rlt.VisionTransformer, tmp_path: Path) -> None:
    model = tiny_model(patch_size=16)
    model.save_pretrained(tmp_path / "a" / "model")
    assert {"clip", "rule"}.isdisjoint(json.loads((tmp_path / "a" / "model" / "config.json").read_text()))
    run = write_run(tmp_path / "a", {"data.clip": CLIP, "tokenizer.rule": "budget", "tokenizer.keep_ratio": 0.5})
    for name in (run, run / "model"):
        config = load_model(name).config
        assert config == stored_config(name)
        assert (config.clip_spec, config.rule) == (CLIP, Budget(keep_ratio=0.5))
    model.save_pretrained(tmp_path / "alone")  # neither run nor settings
    assert stored_config(tmp_path / "alone").clip_spec == ClipSpec(4, size=32)


@pytest.mark.parametrize(
    "rule", [Threshold(0.2, exposure="gain"), Budget(max_tokens=9), Everything(), Drawn(0.1, 0.4), rlt.Random(RULE, 3)]
)
def test_rules_are_stored_with_the_weights(rule: rlt.Rule, network: rlt.VisionTransformer, tmp_path: Path) -> None:
    model = rlt.VisionTransformer(network.config.replace(rule=rule))
    model.save_pretrained(tmp_path)
    config = rlt.VisionTransformer.from_pretrained(tmp_path).config
    assert (config.rule, config.clip) == (rule, CLIP)
    assert dropping_rule(config) == (None if rule == Everything() else rule)
    drawn = isinstance(rule, Drawn)  # for training alone
    assert choose_rule(stored=config.rule) == (Threshold() if drawn else rule)
    evaluated = evaluation_config([f"checkpoint={tmp_path}"])
    assert (evaluated.data.clip, evaluated.tokenizer.build()) == (CLIP, rule)
    assert evaluation_config([f"checkpoint={tmp_path}", "tokenizer=none"]).tokenizer.build() == Everything()


def test_what_is_typed_wins() -> None:
    assert choose_rule(stored=RULE, threshold=0.2) == Threshold(0.2, reference="anchor")
    assert choose_rule(stored=RULE, exposure="gain") == replace(RULE, exposure="gain")
    assert choose_rule(stored=RULE, keep_ratio=0.5) == Budget(keep_ratio=0.5, reference="anchor")
    assert choose_rule("none", stored=RULE) == Everything()
    assert CLIP.changed() == CLIP
    assert CLIP.changed(num_frames=8, fps=5) == ClipSpec(8, fps=5, size=48)
    assert ClipSpec(8, fps=5).changed(frame_stride=3, size=64) == ClipSpec(8, 3, size=64)
    assert ClipSpec(8, sampling="uniform").changed(frame_stride=3) == ClipSpec(8, 3)
    with pytest.raises(InvalidArgumentError, match=r"frame_stride is 3 and fps is 5; give one of them"):
        CLIP.changed(frame_stride=3, fps=5)


def test_settings_that_are_none(network: rlt.VisionTransformer, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for name, value in (
        ("clip", {"num_frames": "x"}),
        ("clip", {"frames": 3}),
        ("clip", {"size": 10**9}),
        ("rule", {"rule": "rlt", "threshold": -1}),
        ("rule", {"rule": "rlt", "thresh": 1}),
    ):
        write_json(path, {**content, name: value})
        for load in (stored_config, rlt.VisionTransformer.from_pretrained):
            with pytest.raises(CheckpointError, match=r"has a clip or a rule in config\.json that is none"):
                load(tmp_path)
    write_json(path, {**content, "rule": {"rule": "of_someone_else", "x": 1}})
    with pytest.warns(UserWarning, match="was trained with rule 'of_someone_else', which is not registered here"):
        assert stored_config(tmp_path).rule is None


def test_commands_take_a_run(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    video, run = str(assets.path("animation.mp4")), str(run_dir)

    def numbers(*arguments: str) -> dict[str, object]:
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--json", "n.json"])
        assert not stop.value.code
        return json.loads(Path("n.json").read_text())

    for options in (["--checkpoint", run], ["--model", run]):
        found = numbers("compare", video, "--repeats", "2", *options)
        settings = found["settings"]
        assert (settings["num_frames"], settings["frame_stride"], settings["size"]) == (4, 2, 48)
        assert (settings["threshold"], settings["reference"], found["weights"]) == (0.3, "anchor", run)
        assert found["videos"][0]["top5"]["dense"][0][0]["label"] in LABELS
    found = numbers("compare", video, "--repeats", "2", "--model", run, "--stride", "1", "--threshold", "0.1")
    assert (found["settings"]["frame_stride"], found["settings"]["threshold"]) == (1, 0.1)
    found = numbers("inspect", video, "--output", "look", "--model", run)["videos"][0]
    assert (found["settings"]["num_frames"], found["settings"]["size"], found["threshold"]) == (4, 48, 0.3)
    for target in ("keep", "disagree"):
        asked = ["--target-keep", "0.5"] if target == "keep" else ["--max-disagreement", "1"]
        calibrated = numbers("calibrate", video, "--output", f"{target}.json", "--checkpoint", run, *asked)
        assert (calibrated["clips"]["num_frames"], calibrated["clips"]["size"]) == (4, 48)

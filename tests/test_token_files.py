"""Tokens as data: what a file gives back is what the videos give, for encoders and for training."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

import rlt
from models import tiny_model, video
from rlt import Threshold, cli
from rlt.conf import compose
from rlt.data.augment import AugmentConfig
from rlt.data.clips import ViewConfig
from rlt.data.loader import training_loader
from rlt.data.manifest import Manifest, VideoEntry, write_manifest
from rlt.data.sampler import StepSampler
from rlt.data.stored import StoredCollate, StoredTraining
from rlt.data.token_files import TokenFile, is_token_file, mirrored
from rlt.encoding import Cutter, Encoder, WindowSpec, encode_videos, parts, windows_of
from rlt.errors import InvalidArgumentError
from rlt.evaluation import EvaluationSettings, evaluate
from rlt.structures import PatchSpec, RunLengthTokens
from rlt.training.run import train
from rlt.video import ClipSpec
from video_factory import write_video

CLIP, RULE = ClipSpec(4, 3, size=32), Threshold(0.2)
WINDOWS = WindowSpec(CLIP)
NAMES = ("cat", "dog")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos, one of them broken, and their manifest."""
    root = tmp_path_factory.mktemp("videos")
    entries = []
    for name, num_frames, label_id in (("a", 50, 0), ("b", 7, 0), ("c", 13, 1), ("d", 30, 1)):
        write_video(root / f"{name}.mp4", num_frames, options={"g": "8"})
        entries.append(VideoEntry(str(root / f"{name}.mp4"), label_id, NAMES[label_id], num_frames, 25.0, 64, 64, 1.0))
    (root / "broken.mp4").write_bytes(b"no video")
    entries.append(VideoEntry(str(root / "broken.mp4"), 1, NAMES[1]))
    write_manifest(Manifest(tuple(entries), NAMES), root / "all.parquet")
    return root


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Path:
    manifest = folder / "all.parquet"
    labels = {entry.path: entry.label_id for entry in rlt.data.manifest.read_manifest(manifest).entries}
    result = encode_videos(cutter(labels), [manifest], output=folder / "tokens.parquet")
    assert len(result.failed) == 1
    return folder / "tokens.parquet"


def cutter(label_ids: dict[str, int] | None = None) -> Cutter:
    return Cutter(WINDOWS, RULE, class_names=NAMES if label_ids else (), label_ids=label_ids or {})


def equal(ours: RunLengthTokens, theirs: RunLengthTokens) -> bool:
    parts = ((getattr(ours, name), getattr(theirs, name)) for name in ("patches", "coords", "lengths"))
    return ours.grid == theirs.grid and all(torch.equal(mine, yours) for mine, yours in parts)


def test_a_file_gives_back_every_token(tokens: Path, folder: Path) -> None:
    file = pickle.loads(pickle.dumps(TokenFile(tokens)))
    assert list(map(Path, file.windows)) == [folder / f"{name}.mp4" for name in ("a", "b", "c", "d", "broken")]
    for source, rows in list(file.windows.items())[:-1]:
        clips = list(windows_of(source, WINDOWS))
        assert len(clips) == len(rows)
        for clip, row in reversed(list(zip(clips, rows, strict=True))):  # in any order
            found = file[row.row]
            assert found.patches.dtype == torch.uint8
            assert equal(found, rlt.tokenize(clip, rule=RULE, seeds=[row.window]))
            found.validate()
    assert file.windows[str(folder / "broken.mp4")][0].error
    assert file.settings["rule"] == {
        "threshold": 0.2, "reference": "previous", "exposure": "none", "motion": "none", "rule": "rlt"
    }  # fmt: skip
    manifest = file.manifest()
    assert [(Path(entry.path).stem, entry.label) for entry in manifest.usable] == [
        ("a", "cat"), ("b", "cat"), ("c", "dog"), ("d", "dog")
    ]  # fmt: skip
    assert all(0 < (entry.tokens_kept or 0) <= 1 for entry in manifest.usable)


def test_a_network_says_the_same_of_tokens_as_of_videos(tokens: Path, folder: Path, tmp_path: Path) -> None:
    network = tiny_model(patch_size=16)
    network.config = network.config.replace(clip=CLIP, rule=RULE)
    encoder = Encoder(network)
    encode_videos(encoder, [folder / "all.parquet"], output=tmp_path / "videos.json")
    encode_videos(encoder, [tokens], output=tmp_path / "tokens.json")
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("tokens", "videos"))
    assert ours == theirs
    with pytest.raises(InvalidArgumentError, match=r"threshold=0.2 .* and not threshold=0.3"):
        encode_videos(Encoder(network, threshold=0.3), [tokens])
    with pytest.raises(InvalidArgumentError, match="overlap 0 and not 2"):
        encode_videos(Encoder(network, overlap=2), [tokens])
    with pytest.raises(InvalidArgumentError, match="named before"):
        encode_videos(encoder, [folder / "all.parquet", tokens])


def test_a_run_that_was_cut_off_goes_on(
    tokens: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_ROWS", 3)
    target = tmp_path / "t.parquet"

    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    label_ids = {entry.path: entry.label_id for entry in TokenFile(tokens).manifest().usable}
    with pytest.raises(KeyboardInterrupt):
        encode_videos(cutter(label_ids), [folder / "all.parquet"], output=target, on_progress=stop)
    assert not target.exists()
    result = encode_videos(cutter(label_ids), [folder / "all.parquet"], output=target)
    assert result.num_before > 0
    ours, theirs = TokenFile(target), TokenFile(tokens)
    assert ours.windows == theirs.windows
    assert all(equal(ours[row], theirs[row]) for source in ours.windows for row in ours.whole(source))


def test_a_damaged_file_is_no_data(tokens: Path, tmp_path: Path) -> None:
    content = bytearray(tokens.read_bytes())
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    assert not is_token_file(tmp_path / "cut.parquet")
    with pytest.raises(InvalidArgumentError, match="not a whole Parquet file"):
        TokenFile(tmp_path / "cut.parquet")
    for place in range(len(content) // 4, len(content) // 4 + 64):
        content[place] ^= 255
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(content)
    file, before = TokenFile(damaged), TokenFile(tokens)
    wrong = 0
    for source in file.windows:
        for row in file.whole(source):
            try:
                assert equal(file[row], before[row])
            except InvalidArgumentError:
                wrong += 1
    assert wrong
    write_manifest(Manifest((VideoEntry("a.mp4", 0, "a"),), ("a",)), tmp_path / "m.parquet")
    with pytest.raises(InvalidArgumentError, match="has no tokens"):
        TokenFile(tmp_path / "m.parquet")


TRAINING = [
    "model.name=vit_micro",
    "data.clip.num_frames=4",
    "data.clip.frame_stride=3",
    "data.clip.size=32",
    "tokenizer=rlt",
    "tokenizer.threshold=0.2",
    "trainer.max_steps=3",
    "trainer.batch_size=4",
    "trainer.accelerator=cpu",
    "data.num_workers=0",
    "logger.tensorboard=false",
]
NO_PIXELS = [
    "data.augment.random_resized_crop=false",
    "data.augment.rand_augment_num_ops=0",
    "data.augment.erasing_probability=0",
    "data.augment.mixup_alpha=0",
    "data.augment.cutmix_alpha=0",
]


def test_training_on_tokens(tokens: Path, tmp_path: Path) -> None:
    def run(*more: str) -> object:
        overrides = [*TRAINING, f"data.train={tokens}", f"data.val={tokens}", f"run_dir={tmp_path / 'run'}", *more]
        return train(compose(overrides), overrides=overrides, say=lambda _: None)

    with pytest.raises(InvalidArgumentError, match=r"turn the others off: data\.augment\.random_resized_crop=false"):
        run()
    with pytest.raises(InvalidArgumentError, match=r"and not threshold=0\.1"):
        run(*NO_PIXELS, "tokenizer.threshold=0.1")
    with pytest.raises(InvalidArgumentError, match=r"size \[32, 32\] and not \[64, 64\]"):
        run(*NO_PIXELS, "data.clip.size=64")
    summary = run(*NO_PIXELS)
    assert summary.steps == 3
    assert not summary.failed
    assert summary.val_top1 is not None
    assert 0 < summary.tokens_kept < 1


def test_batches_of_tokens_are_those_of_the_windows(tokens: Path) -> None:
    """Mirrored or not, and targets as smoothing makes them; the same from two workers as from none."""
    file = TokenFile(tokens)
    augment = AugmentConfig(False, rand_augment_num_ops=0, erasing_probability=0, mixup_prob=0, label_smoothing=0.2)
    dataset = StoredTraining(file, file.manifest().usable, augment, file.patches, seed=1)
    collate = StoredCollate(augment, 2)
    steps = list(islice(StepSampler(len(dataset), batch_size=4, seed=1), 4))
    batches = list(training_loader(dataset, collate, steps, num_workers=0, pin_memory=False))
    turned = 0
    for batch in batches:
        for path, target, found in zip(batch.paths, batch.targets, batch.packed.unpack(), strict=True):
            windows = [file[row] for row in file.whole(path)]
            straight = any(equal(found, window) for window in windows)
            turned += not straight
            assert straight or any(equal(found, mirrored(window)) for window in windows)
            label_id = NAMES.index(next(e.label for e in dataset.entries if e.path == path))
            assert target.tolist() == pytest.approx([0.9, 0.1] if label_id == 0 else [0.1, 0.9])
    assert 0 < turned < 16
    spread = list(training_loader(dataset, collate, steps, num_workers=2, pin_memory=False))
    for ours, theirs in zip(batches, spread, strict=True):
        assert ours.paths == theirs.paths
        assert torch.equal(ours.packed.patches, theirs.packed.patches)


@pytest.mark.parametrize("rule", [RULE, rlt.Threshold(0.1, reference="anchor"), rlt.Everything()])
def test_mirrored_tokens_are_those_of_the_mirrored_clip(rule: rlt.Rule) -> None:
    clip = video(1, 6, 32, 48)
    spec = PatchSpec(2, 8)
    assert equal(mirrored(rlt.tokenize(clip, rule=rule, spec=spec)), rlt.tokenize(clip.flip(2), rule=rule, spec=spec))


def test_evaluation_of_tokens_is_that_of_their_windows(tokens: Path) -> None:
    network, file = tiny_model(patch_size=16, num_classes=2, labels=NAMES), TokenFile(tokens)
    one = ViewConfig(num_clips=1, num_crops=1)
    how = EvaluationSettings(CLIP, one, RULE, batch_videos=2)
    result = evaluate(network, file.manifest(), how, stored=file)
    assert [path for path, _ in result.failed] == [entry.path for entry in file.manifest().entries if not entry.usable]
    assert len(result.predictions) == 4
    for found in result.predictions:
        rows = file.whole(found.path)
        with torch.inference_mode():
            expected = network(rlt.pack([file[rows[len(rows) // 2]]])).softmax(-1)[0]
        assert found.top_ids[0] == int(expected.argmax())
    with pytest.raises(InvalidArgumentError, match=r"give data\.views\.num_clips=1 data\.views\.num_crops=1"):
        evaluate(network, file.manifest(), replace(how, views=ViewConfig()), stored=file)
    with pytest.raises(InvalidArgumentError, match=r"and not threshold=0\.3"):
        evaluate(network, file.manifest(), replace(how, rule=Threshold(0.3)), stored=file)


def run_command(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    return ended.value.code


def test_exact_forms(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "t.parquet"
    small = ("--size", 32, "--window", 4)
    assert run_command("tokens", folder / "a.mp4", "--output", target, *small, "--json", tmp_path / "t.json") == 0
    assert "Written" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "t.json").read_text())
    assert numbers["bytes"] == target.stat().st_size
    assert numbers["num_rows"] == len(TokenFile(target)) == 4
    assert run_command("tokens", folder / "broken.mp4", "--output", tmp_path / "b.parquet") == 2
    assert run_command("tokens", folder / "a.mp4", "--output", folder / "a.csv") == 2
    assert run_command("benchmark", "loader", target) == 2
    assert "holds tokens, which rlt train, evaluate, predict and features take" in " ".join(
        capsys.readouterr().err.split()
    )
    assert run_command("predict", "vit_micro", target) == 2
    assert "size [32, 32] and not [224, 224]" in " ".join(capsys.readouterr().err.split())

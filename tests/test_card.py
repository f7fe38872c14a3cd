"""The card of a model: what it says is that of the model and of its evaluations, and its lines run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import rlt
from models import tiny_model
from rlt import assets, cli
from rlt.checkpoints import convert
from rlt.data.clips import ViewConfig
from rlt.data.manifest import Manifest, VideoEntry
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.evaluation import EvaluationSettings, evaluate
from rlt.files import write_json
from rlt.video import ClipSpec

CLIP = ClipSpec(num_frames=4, frame_stride=3, size=32)


def model_with_labels() -> rlt.VisionTransformer:
    model = tiny_model()
    labels = tuple(f"class {index}" for index in range(model.config.num_classes))
    model.config = model.config.replace(clip=CLIP, rule=rlt.Threshold(0.2, exposure="gain"), labels=labels)
    return model


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What `rlt evaluate` writes of the bundled clips, dense and with RLT."""
    folder, model = tmp_path_factory.mktemp("evaluations"), model_with_labels()
    entries = tuple(
        VideoEntry(str(assets.path(name)), 0, model.config.labels[0], 100, 25.0, 64, 64, 4.0, "ok")
        for name in assets.names()
    )
    manifest = Manifest(entries, model.config.labels)
    for name, rule in {"dense": rlt.Everything(), "rlt": rlt.Threshold(0.2)}.items():
        settings = EvaluationSettings(CLIP, ViewConfig(1, 1), rule)
        write_json(folder / f"{name}.json", evaluate(model, manifest, settings).to_json())
    return [folder / "dense.json", folder / "rlt.json"]


def test_the_lines_of_a_card_run_with_the_settings_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_with_labels()
    model.save_pretrained(tmp_path / "my model")
    shutil.copyfile(assets.path("traffic.mp4"), tmp_path / "video.mp4")
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "my model" / "README.md").read_text(), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    packed = model.tokenize(rlt.video.read_spread("video.mp4", CLIP)[0], threshold=0.2, exposure="gain")
    with torch.inference_mode():
        share, best = model.eval()(packed).softmax(-1)[0].max(-1)
    assert capsys.readouterr().out == f"{packed.num_tokens} tokens, class {best}: {share:.1%}\n"


def test_a_card_says_clips_rule_and_what_was_measured(tmp_path: Path, evaluations: list[Path]) -> None:
    model_with_labels().save_pretrained(tmp_path / "model", evaluations=evaluations)
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == "rlt"
    assert card.data.pipeline_tag == "video-classification"
    assert "| clip | 4 frames at stride 3, 32 px |" in card.text
    assert "| trained on | threshold 0.2, exposure gain |" in card.text
    dense, dropped = (json.loads(path.read_text()) for path in evaluations)
    for start, found in (("| all (dense) | 100.0% | 100.0%", dense), ("| RLT, threshold 0.2 |", dropped)):
        [row] = [line for line in card.text.splitlines() if line.startswith(start)]
        assert f"| {found['tokens_kept']:.1%} | {found['flops']['share_of_dense']:.1%} |" in row
        assert f"| {found['top1']:.1%} (" in row
        assert row.endswith("| 2 |")
    assert dropped["tokens_kept"] < 1
    with pytest.raises(InvalidArgumentError, match="is there already"):
        model_with_labels().save_pretrained(tmp_path / "model", evaluations=evaluations)


def test_a_card_of_a_model_that_knows_less_says_so(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "how clips were taken in training is not known" in text
    assert "| trained on | not known |" in text
    assert "Measured" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no evaluation"),
        ("[1]", "is no evaluation"),
        ("{", "cannot be read as JSON"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_evaluation_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bad.json").write_text(content)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        tiny_model().save_pretrained(tmp_path / "model", evaluations=[tmp_path / "bad.json"])
    assert "bad.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model").exists()


def test_evaluations_of_other_classes_are_refused(tmp_path: Path, evaluations: list[Path]) -> None:
    other: dict[str, Any] = json.loads(evaluations[0].read_text())
    other["top5_counts_the_best"] += 1
    with pytest.raises(InvalidArgumentError, match="other classes"):
        tiny_model().save_pretrained(tmp_path / "model", evaluations=[evaluations[0], other])


def test_pushing_gives_the_card_the_name_on_the_hub(monkeypatch: pytest.MonkeyPatch, evaluations: list[Path]) -> None:
    cards, made = [], []

    def create(*_: object, repo_id: str, **__: object) -> Any:
        made.append(repo_id)
        return type("Repository", (), {"repo_id": repo_id})

    def upload(self: object, *, folder_path: Path, **_: object) -> str:
        cards.append((folder_path / "README.md").read_text())
        return "address"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    assert model_with_labels().push_to_hub("someone/model", evaluations=evaluations, private=True) == "address"
    assert 'from_pretrained("someone/model")' in cards[0]
    assert "| RLT, threshold 0.2 |" in cards[0]
    with pytest.raises(InvalidArgumentError):
        model_with_labels().push_to_hub("someone/other", evaluations=["missing.json"])
    assert made == ["someone/model"]


def test_convert_writes_the_card(tmp_path: Path, evaluations: list[Path]) -> None:
    model_with_labels().save_pretrained(tmp_path / "model")
    options = [part for path in evaluations for part in ("--evaluation", str(path))]
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "card"), *options])
    assert not stop.value.code
    text = (tmp_path / "card" / "README.md").read_text()
    assert 'from_pretrained("card")' in text
    assert "| RLT, threshold 0.2 |" in text
    with pytest.raises((InvalidArgumentError, CheckpointError), match="own layout"):
        convert(tmp_path / "model", tmp_path / "theirs", to="hf", evaluations=evaluations)
    assert not (tmp_path / "theirs").exists()

"""Models of transformers by the name of a folder: what they say of windows is what they say without us."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rlt
from adapted_models import SIZE, spread, vivit, vjepa2
from rlt import assets, cli
from rlt.adapters import tiny
from rlt.adapters.encoders import encoder_inputs
from rlt.encoding import Encoder
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.loading import load_model
from rlt.video import ClipSpec, iter_clips

pytest.importorskip("transformers", minversion="5.24")

NAMES = {0: "a", 1: "b", 2: "c", 3: "d", 4: "e"}
LABELS = {"id2label": NAMES, "label2id": {name: number for number, name in NAMES.items()}}
MODELS: dict[str, Callable[[], Any]] = {
    "vivit": lambda: vivit(**LABELS),
    "vjepa2": lambda: vjepa2(**LABELS),
    "timesformer": lambda: spread(tiny.build("timesformer", SIZE, **LABELS)),
    "dinov2": lambda: spread(tiny.build("dinov2", SIZE, kind="Dinov2ForImageClassification", **LABELS)),
    "siglip": lambda: spread(tiny.build("siglip", SIZE)),
    "siglip2": lambda: spread(tiny.build("siglip2", SIZE)),
    "smolvlm": lambda: spread(tiny.build("smolvlm", SIZE)),
}


def saved(folder: Path, model: Any, side: int = 32) -> Path:
    model.save_pretrained(folder)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.6, 0.7], "size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def normalised(frames: Tensor) -> Tensor:
    """uint8 [T, H, W, 3] -> float [T, 3, H, W], as the processor does."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.5, 0.6, 0.7])
    return ((frames / 255 - mean) / std).permute(0, 3, 1, 2)


def dense(model: Any, frames: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Probabilities and, of bare encoders, the pooled output of one window by the unpatched model."""
    pixels = normalised(frames)
    by_frame = model.main_input_name == "pixel_values" and "num_frames" not in model.config.to_dict()
    inputs = encoder_inputs(model, pixels) if by_frame else {model.main_input_name: pixels[None]}
    if type(model).__name__ == "SmolVLMVisionTransformer":
        inputs = {"pixel_values": pixels}
    with torch.no_grad():
        out = model(**inputs)
    if "logits" in out:
        return out.logits.mean(0).softmax(0), None
    pooled = getattr(out, "pooler_output", None)
    return None, (out.last_hidden_state.mean(1) if pooled is None else pooled).mean(0)


@pytest.mark.parametrize("kind", MODELS)
def test_with_everything_kept_it_is_the_unpatched_model(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    has_head = hasattr(model, "classifier")
    encoder = Encoder(saved(tmp_path, model), outputs=["classes" if has_head else "embedding"], rule="none")
    rows = encoder({"video": [str(assets.path())]})
    clip = encoder.windows.clip
    assert (clip.size, encoder.patches.mean) == (32, (0.4, 0.5, 0.6))
    how = {"num_frames": clip.num_frames, "frame_stride": clip.frame_stride, "size": 32}
    windows = list(iter_clips(assets.path(), **how))  # type: ignore[arg-type]
    assert len(rows["source"]) == len(windows) > 1
    for place, window in enumerate(windows):
        probabilities, pooled = dense(model, window.frames)
        if probabilities is not None:
            best = probabilities.topk(5)
            assert rows["top_ids"][place] == best.indices.tolist()
            assert rows["top_names"][place] == [NAMES[number] for number in best.indices.tolist()]
            assert rows["top_probabilities"][place] == pytest.approx(best.values.tolist(), abs=1e-5)
        else:
            torch.testing.assert_close(torch.tensor(rows["embedding"][place]), pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reference", ["previous", "anchor"])
def test_an_image_model_goes_on_from_window_to_window(reference: str, tmp_path: Path) -> None:
    model = MODELS["siglip"]()
    folder, clip = saved(tmp_path, model), ClipSpec(4, 4, size=32)
    whole = next(iter(iter_clips(assets.path(), num_frames=16, frame_stride=4, size=32)))
    encoder = Encoder(folder, outputs=["embedding"], window=4, reference=reference)
    rows = encoder({"video": [whole.frames, whole.frames]})
    rule = encoder.rule
    windows = list(rlt.stream(assets.path(), str(folder), clip=clip, rule=rule, max_windows=4))
    rlt.patch(model, rule=rule, pixel_mean=(0.4, 0.5, 0.6), pixel_std=(0.5, 0.6, 0.7))
    with torch.no_grad():
        expected = model(whole.frames.permute(0, 3, 1, 2)).pooler_output.unflatten(0, (4, 4)).mean(1)
    kept = model.rlt.last.mask[0].unflatten(0, (4, 4)).flatten(1).sum(1).tolist()
    for video in (0, 4):  # the second begins anew
        torch.testing.assert_close(
            torch.from_numpy(np.stack(rows["embedding"][video : video + 4])), expected, rtol=1e-4, atol=1e-4
        )
        assert rows["num_tokens"][video : video + 4] == kept
    assert not model.rlt.last.mask[0, 4].all()  # as of a window that begins anew
    torch.testing.assert_close(torch.stack([w.features for w in windows]), expected, rtol=1e-4, atol=1e-4)
    assert [len(w.tokens) - w.num_reused for w in windows] == kept
    again = list(rlt.stream(assets.path(), model, clip=clip, max_windows=4))
    torch.testing.assert_close(torch.stack([w.features for w in again]), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "vivit", MODELS["vivit"]())
    with pytest.raises(InvalidArgumentError, match="a window has 4 frames, but VivitForVideoClassification takes 8"):
        Encoder(folder, window=4)
    with pytest.raises(InvalidArgumentError, match="size is 64, but"):
        Encoder(folder, size=64)
    with pytest.raises(InvalidArgumentError, match="no features per token here; ask for the embedding"):
        Encoder(folder, outputs=["tokens"])
    with pytest.raises(CheckpointError, match="model_type 'vivit'"):
        load_model(folder)
    with pytest.raises(InvalidArgumentError, match=r"after rlt\.patch\(model\) is needed"):
        Encoder(MODELS["vivit"]())
    refreshed = rlt.patch(MODELS["siglip"](), refresh_every=4)
    with pytest.raises(InvalidArgumentError, match="refresh_every of the model is 4"):
        rlt.stream(assets.path(), refreshed)
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    with pytest.raises(CheckpointError, match="model_type 'bert' and architecture 'BertModel'; supported are"):
        Encoder(folder)


def test_the_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved(tmp_path / "m", MODELS["dinov2"]())
    with pytest.raises(SystemExit) as ended:
        cli.main(["predict", str(folder), str(assets.path()), "--json", str(tmp_path / "p.json")])
    assert ended.value.code == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert rows[0]["top_names"][0] in NAMES.values()

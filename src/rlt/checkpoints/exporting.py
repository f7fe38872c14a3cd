"""Checkpoints written in the layouts of other projects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from rlt import weights
from rlt.checkpoints import hf_config
from rlt.checkpoints.models import NUM_HEADS
from rlt.checkpoints.read import LoadReport, build, read_checkpoint
from rlt.checkpoints.state_maps import LAYOUTS, LayoutName, to_theirs
from rlt.checks import one_of
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.files import replacing
from rlt.network.card import Evaluation
from rlt.network.vit import MODEL_TYPE, VisionTransformer, ViTConfig

Target = Literal["rlt", "videomae", "hf"]
"""Layouts that `rlt.checkpoints.convert` writes."""


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Target = "rlt",
    num_classes: int | None = None,
    new_head: bool = False,
    num_heads: int | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> LoadReport:
    """Write a checkpoint in another layout. What is at the destination is replaced only once all is written.

    Args:
        source: a file, a folder or a hub id in any layout that can be read.
        destination: a folder for "rlt" and "hf", a `.pth` file for "videomae".
        to: "rlt" for `VisionTransformer.from_pretrained`, "videomae" for the original VideoMAE and RLT code,
            "hf" for `VideoMAEForVideoClassification.from_pretrained`. Weights are the same bits in all of them.
        num_classes: as in `read_checkpoint`, as the next two.
        new_head: take a new random head.
        num_heads: attention heads.
        evaluations: for the card of "rlt": the JSON files of `rlt evaluate`, such as dense and with RLT.

    Returns:
        The report of reading, with notes on what the new layout cannot hold.

    Raises:
        InvalidArgumentError: for evaluations that are none, or beside another layout than "rlt".
        CheckpointError: if the source cannot be read, the destination is something else than an older result, or
            the layout cannot hold the model.
    """
    one_of(get_args(Target), to=to)
    if evaluations and to != "rlt":
        raise InvalidArgumentError(f"evaluations stand on the card of rlt's own layout; to is {to!r}, leave them out")
    target = Path(destination).expanduser()
    _check_destination(target, to, Path(source).expanduser())
    config, state, report = read_checkpoint(source, num_classes=num_classes, new_head=new_head, num_heads=num_heads)
    model = build(config, state)
    if to == "videomae":
        notes = _write_videomae(model, target)
    elif to == "hf":
        notes = _write_hf(model, target)
    else:
        notes = []
        model.save_pretrained(target, evaluations=evaluations)
    return replace(report, notes=(*report.notes, *notes))


def _check_destination(target: Path, to: Target, source: Path) -> None:
    """Raise before any work where writing would destroy something that is no older result."""
    if to == "videomae":
        if target.is_dir() or not target.suffix:
            raise CheckpointError(f"{target} is no name of a file; give one that ends in .pth")
        if target.exists() and source.exists() and target.samefile(source):
            raise CheckpointError(f"{target} is the source itself; give another destination")
        return
    weights.refuse_other_model(target, MODEL_TYPE if to == "rlt" else hf_config.MODEL_TYPE)
    if target.is_dir() and any(target.iterdir()) and weights.read_config(target) is None:
        raise CheckpointError(f"{target} is a folder with other files; give a new or an empty one")


def _exported(model: VisionTransformer, name: LayoutName) -> dict[str, Tensor]:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    return to_theirs(layout.rules, model.state_dict(), model.config.depth, model.config.patches)


def _write_videomae(model: VisionTransformer, target: Path) -> list[str]:
    config = model.config
    content = {"model": _exported(model, "videomae")}
    try:
        with replacing(target) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{target} cannot be written ({weights.first_line(error)}); choose another path"
        ) from error
    read_back = ViTConfig(layer_norm_eps=1e-6, head_norm_eps=1e-6, num_heads=NUM_HEADS.get(config.width, 1))
    fields = ["num_heads", "layer_norm_eps", "head_norm_eps", "image_size", "pixel_mean", "pixel_std", "labels"]
    if config.length_encoding == "none":
        fields.append("num_frames")
    lost = [name for name in fields if getattr(config, name) != getattr(read_back, name)]
    return [f"VideoMAE's layout does not hold {', '.join(lost)}"] if lost else []


def _write_hf(model: VisionTransformer, target: Path) -> list[str]:
    config = model.config
    if config.length_encoding != "none":
        raise CheckpointError("Hugging Face's VideoMAE has no length_embed; write it with to='videomae' or to='rlt'")
    preprocessor = json.dumps(hf_config.preprocessor_to_hf(config), indent=2) + "\n"
    weights.write_folder(
        target, _exported(model, "hf"), hf_config.config_to_hf(config), {"preprocessor_config.json": preprocessor}
    )
    if config.head_norm_eps == hf_config.HEAD_NORM_EPS:
        return []
    return [
        f"head_norm_eps is {config.head_norm_eps:g} here and always {hf_config.HEAD_NORM_EPS:g} in transformers, "
        "so logits differ in the last digits"
    ]

"""Writing a model in the layouts of other projects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlt import weights
from rlt.checkpoints import hf_config
from rlt.checkpoints.state_maps import LAYOUTS, LayoutName, PatchSize, to_theirs
from rlt.errors import CheckpointError
from rlt.files import replacing
from rlt.network.vit import MODEL_TYPE, VisionTransformer, ViTConfig

Target = Literal["rlt", "videomae", "hf"]
"""Layouts that `rlt.checkpoints.convert` writes."""
NUM_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"""Width -> attention heads of the published models. No tensor tells the number, and a wrong one fits silently."""


def check_destination(target: Path, to: Target, source: Path) -> None:
    """Raise before any work where writing would destroy something that is no older result.

    Raises:
        CheckpointError: naming the destination.
    """
    if to == "videomae":
        if target.is_dir() or not target.suffix:
            raise CheckpointError(f"{target} is no name of a file; give one that ends in .pth")
        if target.exists() and source.exists() and target.samefile(source):
            raise CheckpointError(f"{target} is the source itself; give another destination")
        return
    weights.refuse_other_model(target, MODEL_TYPE if to == "rlt" else hf_config.MODEL_TYPE)
    if target.is_dir() and any(target.iterdir()) and weights.read_config(target) is None:
        raise CheckpointError(f"{target} is a folder with other files; give a new or an empty one")


def export(model: VisionTransformer, target: Path, to: Target) -> list[str]:
    """Write a model: a folder for "rlt" and "hf", a file for "videomae", each replaced only once all is written.

    Returns:
        Notes on what the layout does not hold.

    Raises:
        CheckpointError: if the layout cannot hold the model, or the target cannot be written.
    """
    if to == "videomae":
        return _write_videomae(model, target)
    if to == "hf":
        return _write_hf(model, target)
    model.save_pretrained(target)
    return []


def _exported(model: VisionTransformer, name: LayoutName) -> dict[str, Tensor]:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    size = PatchSize(model.config.tubelet_size, model.config.patch_size)
    return to_theirs(layout.rules, model.state_dict(), model.config.depth, size)


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

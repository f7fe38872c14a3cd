"""Named model configurations, and `create_model`."""

from __future__ import annotations

from pathlib import Path

from rlt.checkpoints.read import load_checkpoint
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.network.vit import VisionTransformer, ViTConfig

MODELS: dict[str, ViTConfig] = {
    "vit_tiny": ViTConfig(width=192, depth=12, num_heads=3, mlp_width=768),
    "vit_small": ViTConfig(width=384, depth=12, num_heads=6, mlp_width=1536),
    "vit_base": ViTConfig(width=768, depth=12, num_heads=12, mlp_width=3072),
    "vit_large": ViTConfig(width=1024, depth=24, num_heads=16, mlp_width=4096),
    "vit_huge": ViTConfig(width=1280, depth=32, num_heads=16, mlp_width=5120),
    "vit_giant": ViTConfig(width=1408, depth=40, num_heads=16, mlp_width=6144, patch_size=14),
}
"""Sizes of VideoMAE and VideoMAEv2 at 16 frames of 224x224 pixels."""


def list_models() -> list[str]:
    """Names that `create_model` takes, from small to large."""
    return list(MODELS)


def model_config(name: str, num_heads: int | None = None) -> ViTConfig:
    """The configuration of a named model, with another number of attention heads if one is given.

    Raises:
        InvalidArgumentError: for an unknown name, listing the known ones.
    """
    if name not in MODELS:
        raise InvalidArgumentError(f"model is {name!r}; allowed are {', '.join(MODELS)}")
    return MODELS[name] if num_heads is None else MODELS[name].replace(num_heads=num_heads)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    new_head: bool = False,
    num_heads: int | None = None,
) -> VisionTransformer:
    """Build a model, with random weights or those of a checkpoint, in evaluation mode.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head; 0 for none. None takes the checkpoint's, or 400 without a checkpoint.
        checkpoint: a file, a folder or a hub id in any layout that `rlt.checkpoints` knows; None for random weights.
        new_head: take a new random head instead of the checkpoint's, or where it has none (after pretraining). With
            num_classes=None it has as many outputs as the checkpoint's, or 400.
        num_heads: attention heads where they are not those of the named size.

    Returns:
        The model; `model.config.labels` holds class names where the checkpoint has them.

    Raises:
        InvalidArgumentError: for an unknown name.
        CheckpointError: if the checkpoint cannot be read, or its weights are not those of the named model.
    """
    config = model_config(name, num_heads)
    if checkpoint is None:
        return VisionTransformer(config.replace(num_classes=400 if num_classes is None else num_classes)).eval()
    model = load_checkpoint(checkpoint, num_classes=num_classes, new_head=new_head, num_heads=num_heads)
    for field in ("width", "depth", "num_heads", "mlp_width", "patch_size", "tubelet_size"):
        ours, theirs = getattr(config, field), getattr(model.config, field)
        if ours != theirs:
            raise CheckpointError(
                f"{checkpoint} has {field}={theirs}, {name} has {ours}; {_matching_model(model.config)}"
            )
    return model


def _matching_model(config: ViTConfig) -> str:
    sizes = ("width", "depth", "num_heads", "mlp_width", "patch_size", "tubelet_size")
    for name, known in MODELS.items():
        if all(getattr(known, field) == getattr(config, field) for field in sizes):
            return f"ask for {name}"
    return "load it with rlt.VisionTransformer.from_pretrained, which takes any size"

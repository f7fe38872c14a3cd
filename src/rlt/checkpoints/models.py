"""Named model configurations."""

from __future__ import annotations

from rlt.checks import one_of
from rlt.network.vit import ViTConfig

MODELS: dict[str, ViTConfig] = {
    "vit_micro": ViTConfig(width=192, depth=6, num_heads=3, mlp_width=768),
    "vit_tiny": ViTConfig(width=192, depth=12, num_heads=3, mlp_width=768),
    "vit_small": ViTConfig(width=384, depth=12, num_heads=6, mlp_width=1536),
    "vit_base": ViTConfig(width=768, depth=12, num_heads=12, mlp_width=3072),
    "vit_large": ViTConfig(width=1024, depth=24, num_heads=16, mlp_width=4096),
    "vit_huge": ViTConfig(width=1280, depth=32, num_heads=16, mlp_width=5120),
    "vit_giant": ViTConfig(width=1408, depth=40, num_heads=16, mlp_width=6144, patch_size=14),
}
"""Sizes of VideoMAE and VideoMAEv2 at 16 frames of 224x224 pixels, and vit_micro, which a CPU trains."""
_SIZES = ("width", "depth", "num_heads", "mlp_width", "patch_size", "tubelet_size")
NUM_HEADS = {config.width: config.num_heads for config in MODELS.values()}
"""Width -> attention heads of the published models. No tensor tells the number, and a wrong one fits silently."""


def list_models() -> list[str]:
    """Names that `create_model` takes, from small to large."""
    return list(MODELS)


def misfit(config: ViTConfig, other: ViTConfig) -> str | None:
    """The first of the sizes that make a named model in which two configurations differ; None if none does."""
    return next((size for size in _SIZES if getattr(config, size) != getattr(other, size)), None)


def size_name(config: ViTConfig) -> str | None:
    """The name of a model of this size; None if it has none."""
    return next((name for name, known in MODELS.items() if misfit(config, known) is None), None)


def model_config(name: str, num_heads: int | None = None) -> ViTConfig:
    """The configuration of a named model, with another number of attention heads if one is given.

    Raises:
        InvalidArgumentError: for an unknown name, listing the known ones.
    """
    one_of(MODELS, model=name)
    return MODELS[name] if num_heads is None else MODELS[name].replace(num_heads=num_heads)

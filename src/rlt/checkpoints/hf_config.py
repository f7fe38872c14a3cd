"""The configuration of Hugging Face's VideoMAE, both ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlt.errors import CheckpointError
from rlt.network.vit import ViTConfig

MODEL_TYPE = "videomae"
HEAD_NORM_EPS = 1e-5
"""Hugging Face builds the LayerNorm before the head without the epsilon of its configuration."""
_SIZES = {
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
    "num_frames": ("num_frames", 16),
    "image_size": ("image_size", 224),
    "tubelet_size": ("tubelet_size", 2),
    "patch_size": ("patch_size", 16),
}
"""Our field -> theirs, and what it is where the file leaves it out."""


def config_from_hf(
    hf: Mapping[str, object],
    preprocessor: Mapping[str, object] | None,
    *,
    num_classes: int,
    source: str | Path,
    blocks_only: bool = False,
) -> ViTConfig:
    """Our configuration from the content of config.json and preprocessor_config.json (pixel mean and deviation).

    `num_classes` are outputs of the stored head, 0 for none. With `blocks_only` the part after the blocks is not used,
    so that it may be one that is not supported here; any other value that is not is a CheckpointError.
    """
    for field, supported in (("hidden_act", "gelu"), ("num_channels", 3), ("use_mean_pooling", True)):
        value = hf.get(field, supported)
        if value != supported and not (field == "use_mean_pooling" and blocks_only):
            remedy = "; new_head=True keeps its blocks only" if field == "use_mean_pooling" else ""
            raise CheckpointError(f"{source} has {field}={value!r}; only {supported!r} is supported{remedy}")
    sizes = {ours: _size(hf.get(theirs, default), theirs, source) for ours, (theirs, default) in _SIZES.items()}
    pixels = {}
    for ours, theirs in (("pixel_mean", "image_mean"), ("pixel_std", "image_std")):
        values = (preprocessor or {}).get(theirs)
        if isinstance(values, list) and len(values) == 3:
            pixels[ours] = tuple(map(float, values))
    eps = hf.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, int | float):
        raise CheckpointError(f"{source} has layer_norm_eps={eps!r}; a number is needed")
    return ViTConfig(
        num_classes=num_classes,
        qkv_bias=bool(hf.get("qv_bias", hf.get("qkv_bias", True))),
        layer_norm_eps=float(eps),
        head_norm_eps=HEAD_NORM_EPS,
        labels=labels_of(hf.get("id2label"), num_classes),
    ).replace(**sizes, **pixels)


def _size(value: object, name: str, source: str | Path) -> int:
    if isinstance(value, list) and len(value) == 2 and (value[0] == value[1] or name == "image_size"):
        value = value[0]  # positions are by coordinates, so the image size is only a hint
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{source} has {name}={value!r}; one whole number above 0 is supported")
    return value


def labels_of(id2label: object, num_classes: int) -> tuple[str, ...]:
    """Class names in order; none if they are incomplete or the library's placeholders."""
    if not isinstance(id2label, Mapping):
        return ()
    names = [id2label.get(str(i)) for i in range(num_classes)]
    if None in names or names == _placeholders(num_classes):
        return ()
    return tuple(map(str, names))


def _placeholders(num_classes: int) -> list[str]:
    return [f"LABEL_{i}" for i in range(num_classes)]


def config_to_hf(config: ViTConfig) -> dict[str, object]:
    """Content of config.json, from which transformers builds a `VideoMAEForVideoClassification`."""
    labels = config.labels or _placeholders(config.num_classes)
    return {
        "architectures": ["VideoMAEForVideoClassification"],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(config, ours) for ours, (theirs, _) in _SIZES.items()},
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "qkv_bias": config.qkv_bias,  # version 5 renamed it and still reads the old name
        "use_mean_pooling": True,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def preprocessor_to_hf(config: ViTConfig) -> dict[str, object]:
    """Content of preprocessor_config.json: the pixel normalisation that the weights expect."""
    size = config.image_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.pixel_mean),
        "image_std": list(config.pixel_std),
    }

"""Small models with random weights of the families that `rlt.patch` knows: for examples, benchmarks and tests.

What they answer means nothing; how many tokens they see, and how long that takes, does. The only importer of timm.

Shape legend: B clips, L columns of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlt.adapters.encoders import TOWERS, encoder_inputs
from rlt.adapters.interface import import_transformers
from rlt.checks import one_of
from rlt.errors import MissingDependencyError

VIDEO, START, END, IMAGE, VOCABULARY = 1000, 1001, 1002, 1003, 1024
"""Of the language models: what stands for a token of a video, around it and for one of an image; number of words."""


@dataclass(frozen=True)
class Size:
    """How large a model is, in all its parts."""

    width: int = 64
    depth: int = 2
    heads: int = 4
    mlp_width: int = 128
    num_frames: int = 16
    image_size: int = 224
    patch_size: int | None = None
    """None is what the family has: 16 pixels, 14 for Qwen2-VL and Qwen2.5-VL."""
    tubelet_size: int = 2


def build(family: str, size: Size | None = None, *, kind: str | None = None, seed: int = 0, **more: Any) -> Any:
    """A model in evaluation mode, the same weights for the same seed.

    Args:
        family: one of `FAMILIES`, or "timm".
        size: None for the smallest.
        kind: name of another class that the configuration of the family describes.
        seed: of the weights.
        more: further fields of the configuration, or arguments of timm's `VisionTransformer`. Dictionaries add to what
            is there.

    Raises:
        AttributeError: if the installed library has no such model.
        MissingDependencyError: if its library is not installed.
    """
    one_of([*FAMILIES, "timm"], family=family)
    chosen = size or Size()
    torch.manual_seed(seed)
    if family == "timm":
        shape = {"embed_dim": chosen.width, "depth": chosen.depth, "num_heads": chosen.heads}
        shape |= {"img_size": chosen.image_size, "patch_size": chosen.patch_size or 16}
        kinds = import_timm().models.vision_transformer
        return kinds.VisionTransformer(mlp_ratio=chosen.mlp_width / chosen.width, **shape, **more).eval()
    library, (config, model, describe) = import_transformers(), FAMILIES[family]
    fields = describe(chosen)
    for name, value in more.items():
        fields[name] = {**fields.get(name, {}), **value} if isinstance(value, dict) else value
    return getattr(library, kind or model)(getattr(library, config)(**fields)).eval()


def inputs(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Arguments of a call with clips [B, frames, 3, height, width], normalised as the model's processor does."""
    name = getattr(model, "main_input_name", None)
    if name is None:  # an image model of timm, for which frames are a batch
        return {"x": pixels.flatten(0, 1)}
    if type(model).__name__ in TOWERS:
        return encoder_inputs(model, pixels.flatten(0, 1))
    return question(model, pixels) if name == "input_ids" else {name: pixels}


def question(
    model: Any, pixels: Tensor, *, before: Sequence[int] = (1, 2), after: Sequence[int] = (3, 4, 5)
) -> dict[str, Tensor]:
    """What the processor of a Qwen-VL model gives for a video between words, the same ones for each clip.

    `pixels` are as for `inputs`; what is beyond whole merge groups is cut off.
    """
    config, vision = model.config, model.config.vision_config
    patch_size, tubelet, merge = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
    batch, frames, channels, *sides = pixels.shape
    time, height, width = frames // tubelet, *(side // (patch_size * merge) for side in sides)
    pixels = pixels[..., : height * patch_size * merge, : width * patch_size * merge]
    cut = pixels.reshape(batch, time, tubelet, channels, height, merge, patch_size, width, merge, patch_size)
    rows = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(batch * time * height * width * merge**2, -1)
    parts = time if config.model_type.startswith("qwen3") else 1  # which has a start and an end for each time step
    inner = [config.video_token_id] * (time // parts * height * width)
    video = [config.vision_start_token_id, *inner, config.vision_end_token_id] * parts
    ids_BL = torch.tensor([*before, *video, *after], device=pixels.device).expand(batch, -1)
    return {
        "input_ids": ids_BL,
        "mm_token_type_ids": 2 * (ids_BL == config.video_token_id).long(),
        "pixel_values_videos": rows,
        "video_grid_thw": torch.tensor([[time, height * merge, width * merge]] * batch, device=pixels.device),
    }


def import_timm() -> Any:
    """The package, which no other module imports."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # of torchvision beside a torch that it was not built for
        raise MissingDependencyError(f"timm cannot be imported ({error}); install it with: pip install timm") from error
    return timm


# Fields of configurations


def _layers(size: Size) -> dict[str, Any]:
    return {"hidden_size": size.width, "num_hidden_layers": size.depth, "num_attention_heads": size.heads}


def _patch(size: Size) -> dict[str, Any]:
    return {} if size.patch_size is None else {"patch_size": size.patch_size}


def _encoder(size: Size) -> dict[str, Any]:
    clip = {"num_frames": size.num_frames, "image_size": size.image_size, "intermediate_size": size.mlp_width}
    return {**_layers(size), **clip}


def _videomae(size: Size) -> dict[str, Any]:
    return {**_encoder(size), "tubelet_size": size.tubelet_size, **_patch(size)}


def _vivit(size: Size) -> dict[str, Any]:
    return {**_encoder(size), "tubelet_size": [size.tubelet_size, *[size.patch_size or 16] * 2]}


def _timesformer(size: Size) -> dict[str, Any]:
    return {**_encoder(size), **_patch(size)}


def _vjepa2(size: Size) -> dict[str, Any]:
    clip = {"frames_per_clip": size.num_frames, "crop_size": size.image_size, "tubelet_size": size.tubelet_size}
    layers = {**_layers(size), "mlp_ratio": size.mlp_width / size.width, "num_pooler_layers": 1}
    predictor = {"hidden_size": size.width // 2, "num_hidden_layers": 1, "num_attention_heads": size.heads}
    return {**layers, **clip, **_patch(size), **{f"pred_{name}": value for name, value in predictor.items()}}


def _qwen(size: Size, vision: dict[str, Any], *, share_of_sides: float) -> dict[str, Any]:
    """The language model is as large as the tower; rotary positions of rows and columns have this share of a head."""
    head = size.width // size.heads
    sides = int(share_of_sides * head / 2)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head // 2 - 2 * sides, sides, sides]}
    heads = {"num_key_value_heads": size.heads, "head_dim": head, "rope_parameters": rope}
    words = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tower = {"depth": size.depth, "num_heads": size.heads, "temporal_patch_size": size.tubelet_size, **_patch(size)}
    return {
        "text_config": {**_layers(size), "intermediate_size": size.mlp_width, **heads, **words},
        "vision_config": {**tower, "hidden_size": size.width, **vision},
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "image_token_id": IMAGE,
    }


def _qwen2(size: Size) -> dict[str, Any]:
    vision = {"embed_dim": size.width, "mlp_ratio": size.mlp_width // size.width}
    return _qwen(size, vision, share_of_sides=3 / 8)


def _qwen25(size: Size) -> dict[str, Any]:
    whole = [layer for layer in range(size.depth) if layer % 3 == 2]  # the others attend within windows
    layers = {"intermediate_size": size.mlp_width, "fullatt_block_indexes": whole or [size.depth - 1]}
    return _qwen(size, {"out_hidden_size": size.width, **layers}, share_of_sides=3 / 8)


def _qwen3(size: Size) -> dict[str, Any]:
    deep = [layer for layer in range(size.depth - 1) if layer % 3 == 2]
    layers = {"intermediate_size": size.mlp_width, "deepstack_visual_indexes": deep}
    return _qwen(size, {"out_hidden_size": size.width, **layers}, share_of_sides=1 / 3)


def _image(size: Size) -> dict[str, Any]:
    picture = {"image_size": size.image_size, "patch_size": size.patch_size or 16}
    return {**_layers(size), "intermediate_size": size.mlp_width, **picture}


def _siglip2(size: Size) -> dict[str, Any]:
    fields = _image(size)
    return {**fields, "num_patches": (fields.pop("image_size") // fields["patch_size"]) ** 2}


def _dinov2(size: Size) -> dict[str, Any]:
    return {**_image(size), "mlp_ratio": size.mlp_width // size.width}


def _internvl(size: Size) -> dict[str, Any]:
    fields = _image(size)
    return {**fields, **{name: [fields[name]] * 2 for name in ("image_size", "patch_size")}}


FAMILIES: dict[str, tuple[str, str, Callable[[Size], dict[str, Any]]]] = {
    "videomae": ("VideoMAEConfig", "VideoMAEForVideoClassification", _videomae),
    "vivit": ("VivitConfig", "VivitForVideoClassification", _vivit),
    "vjepa2": ("VJEPA2Config", "VJEPA2ForVideoClassification", _vjepa2),
    "timesformer": ("TimesformerConfig", "TimesformerForVideoClassification", _timesformer),
    "qwen2": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", _qwen2),
    "qwen2.5": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", _qwen25),
    "qwen3": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration", _qwen3),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", _image),
    "siglip2": ("Siglip2VisionConfig", "Siglip2VisionModel", _siglip2),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", _image),
    "dinov2": ("Dinov2Config", "Dinov2Model", _dinov2),
    "dinov2 registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel", _dinov2),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", _image),
    "internvl": ("InternVLVisionConfig", "InternVLVisionModel", _internvl),
    "smolvlm": ("SmolVLMVisionConfig", "SmolVLMVisionTransformer", _image),
}
ENCODERS = ("siglip", "siglip2", "clip", "dinov2", "dinov2 registers", "dinov3", "internvl", "smolvlm")
"""Families of image encoders, which take frames as a batch; so does "timm"."""
"""Of transformers: configuration, the class that is built where no other is asked for, and fields of the first."""

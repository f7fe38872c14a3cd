"""Image encoders of Hugging Face transformers on frames of a video, alone or as the tower of a bigger model.

The embeddings, the encoder's way in and its way out are hooked, so that what lies before and behind (positions, class
and register tokens, norms, pooling heads, projectors, language models) runs as it is.

Shape legend: F frames of all clips, N kept patches of all frames, R rows of the packed sequence (kept patches, and the
prefix of each frame), E tokens of the prefix, L patches of a frame before dropping, P pixel values of a patch, D model
width, K width of a head, C channels, h and w pixels, H and W patches of a frame.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.frames import FramePatch
from rlt.adapters.interface import InterfacePatch, import_transformers
from rlt.adapters.options import PatchOptions
from rlt.adapters.packed import embed_patches
from rlt.adapters.patching import Hook, Override, sides, square_side
from rlt.adapters.statistics import Statistics
from rlt.errors import InvalidArgumentError
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD
from rlt.tokens import Everything

OLDEST_ENCODERS = (5, 24)
"""Before that some of these were built in other ways."""
CLIP: Statistics = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
IMAGENET: Statistics = IMAGENET_MEAN, IMAGENET_STD
TOWERS: dict[str, Statistics] = {
    "SiglipVisionModel": HALVES,
    "Siglip2VisionModel": HALVES,
    "CLIPVisionModel": CLIP,
    "Dinov2Model": IMAGENET,
    "Dinov2WithRegistersModel": IMAGENET,
    "DINOv3ViTModel": IMAGENET,
    "InternVLVisionModel": IMAGENET,
    "Idefics3VisionTransformer": HALVES,
    "SmolVLMVisionTransformer": HALVES,
}
"""Encoders, and what the processor of each normalises by."""
AROUND = (
    "SiglipModel",
    "SiglipForImageClassification",
    "Siglip2Model",
    "Siglip2ForImageClassification",
    "CLIPModel",
    "CLIPVisionModelWithProjection",
    "CLIPForImageClassification",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
    "LlavaModel",
    "LlavaForConditionalGeneration",
    "LlavaOnevisionModel",
    "LlavaOnevisionForConditionalGeneration",
    "InternVLModel",
    "InternVLForConditionalGeneration",
    "Idefics3Model",
    "Idefics3ForConditionalGeneration",
    "SmolVLMModel",
    "SmolVLMForConditionalGeneration",
    "Gemma3Model",
    "Gemma3ForConditionalGeneration",
)
"""Models that have one of them within."""


class ImageEncoderAdapter(FramePatch, InterfacePatch):
    """Frames through one encoder of `TOWERS`: see `FramePatch`. What it gives has the shape that it had.

    A call of the encoder is what counts as a clip, or as several with `frames_per_clip`; models around it that take
    videos as [clips, frames, C, h, w] say themselves where clips end, and images that they take beside go through
    whole.
    """

    model_classes: ClassVar[tuple[str, ...]] = (*TOWERS, *AROUND)

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        self._tower_name, self._tower_kind = _find_tower(model)
        super().__init__(model, options)
        self.extra_tokens = _prefix_length(self.encoder.embeddings)

    @property
    @override
    def encoder(self) -> Any:
        return self.model.get_submodule(self._tower_name)

    @property
    def layers(self) -> Any:
        """What runs all layers of the encoder."""
        return self.encoder.encoder if "encoder" in self.encoder._modules else self.encoder.model

    @property
    def projection(self) -> Any:
        """What embeds patches: a convolution, or for patches that come cut already a linear layer."""
        kinds = (nn.Conv2d, nn.Linear)
        return next(module for module in self.encoder.embeddings.modules() if isinstance(module, kinds))

    @property
    @override
    def attention_config(self) -> Any:
        return self.encoder.config

    @property
    @override
    def last_module(self) -> nn.Module:
        layers: nn.Module = self.layers
        return layers

    @property
    @override
    def fills(self) -> bool:
        return True

    @property
    @override
    def num_rows(self) -> int:
        return super().num_rows + self.call.spare

    @override
    def default_statistics(self) -> Statistics:
        return TOWERS[self._tower_kind]

    @override
    def edits(self) -> list[Override | Hook]:
        tower = self.encoder
        paths = (module for module in tower.modules() if type(module).__name__.endswith("DropPath"))
        found: list[Override | Hook] = [
            Hook(tower, self.enter, before=True),
            Override(self.projection, "forward", self.embed),
            Hook(self.layers, self.pack, before=True),
            *(Override(module, "rlt_adapter", self) for module in self.attention_modules()),
            *(Override(module, "forward", partial(self.drop_paths, module)) for module in paths),
            *(Override(layer, "forward", partial(self.run_layer, layer)) for layer in self._each_layer()),
            Hook(self.layers, self.leave),
            Hook(tower, self.finish),
        ]
        if "rope_embeddings" in tower._modules:
            found.append(Hook(tower.rope_embeddings, self.turn))
        around: Any = self.model.get_submodule(self._tower_name.rpartition(".")[0])
        if hasattr(around, "get_video_features"):  # so images come another way, and are no frames
            found.append(Override(around, "get_video_features", partial(self.video_features, around)))
            found.append(Override(around, "get_image_features", partial(self.image_features, around)))
        return found

    @override
    def check_attachable(self) -> None:
        import_transformers(OLDEST_ENCODERS, "rlt.patch of image encoders")
        super().check_attachable()
        if any(module.config is not self.attention_config for module in self.attention_modules()):
            raise InvalidArgumentError(
                f"layers of {self._tower_kind} have other configurations than itself; rlt.patch knows encoders alone "
                "that share one"
            )

    @override
    def attention_modules(self) -> list[nn.Module]:
        return [module for module in self.layers.modules() if type(module).__name__.endswith("Attention")]

    @override
    def token_size(self) -> tuple[int, int]:
        projection = self.projection
        side = projection.kernel_size if isinstance(projection, nn.Conv2d) else self.encoder.config.patch_size
        return 1, square_side(side)

    @override
    def input_shape(self) -> tuple[int, int, int, int]:
        config, side = self.encoder.config, self.token_size()[1]
        size = getattr(config, "image_size", None) or round(config.num_patches**0.5) * side
        return self.options.frames_per_clip or 2, config.num_channels, *sides(size)

    @override
    def run_static(self) -> None:
        parameter = next(self.encoder.parameters())
        pixels = torch.zeros(self.input_shape(), dtype=parameter.dtype, device=parameter.device)
        self.encoder(**encoder_inputs(self.encoder, pixels))

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Before the encoder: choose patches, normalised float or uint8 [F, C, h, w], and begin a call with them."""
        padding = 0
        if isinstance(self.projection, nn.Linear):
            args, kwargs = (), {**dict(zip(_SIGLIP2, args, strict=False)), **kwargs}
            pixels, kwargs, padding = self._uncut(kwargs)
        else:
            pixels = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        for name in _REFUSED:
            value = kwargs.get(name)
            if value is not None and not (name in _PADDING and bool(value.all())):
                raise InvalidArgumentError(
                    f"{name} is set; frames of a patched model are of one size, and every patch of them counts: leave "
                    "it out"
                )
        patches_NP = self.begin(self.clips_of(pixels))
        self.call.patches, self.call.padding = patches_NP, padding
        self.call.spare = int(self.call.idle)
        return args, kwargs

    @override
    def embed(self, pixel_values: Tensor) -> Tensor:
        """In place of the projection: embeddings on the full grid, of which what was dropped is zero and not looked at.

        [F, C, h, w] -> [F, D, H, W] by a convolution, [F, L, P] -> [F, L, D] by a linear layer.
        """
        projection, mask_FHW = self.projection, self.call.kept.mask.flatten(0, 1)
        if isinstance(projection, nn.Linear):
            side = self.token_size()[1]
            cut_NP = self.call.patches.unflatten(1, (-1, side, side)).permute(0, 2, 3, 1).flatten(1)  # channels last
            x_ND = F.linear(cut_NP.to(projection.weight.dtype), projection.weight, projection.bias)
            return _scatter(x_ND, mask_FHW.flatten(1))
        return _scatter(embed_patches(self.call.patches, projection), mask_FHW).permute(0, 3, 1, 2)

    def turn(self, _module: nn.Module, _inputs: object, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotary positions of the places of a frame, two [L, K] -> those of all rows [R, K]; a prefix is not turned."""
        cos_LK, sin_LK = output
        if self.call.idle:
            return output
        column_R = self._taken() % (self.extra_tokens + len(cos_LK))
        still_EK = cos_LK.new_ones(self.extra_tokens, cos_LK.shape[1])
        cos, sin = torch.cat([still_EK, cos_LK]), torch.cat([torch.zeros_like(still_EK), sin_LK])
        return cos[column_R], sin[column_R]

    def pack(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """On the way into the layers: frames [F, E + L, D] -> packed rows [1, R, D]."""
        name = next((name for name in ("inputs_embeds", "hidden_states") if name in kwargs), None)
        x_FLD = args[0] if name is None else kwargs[name]
        packed = x_FLD.flatten(0, 1).index_select(0, self._taken())[None]
        return ((packed, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: packed})

    def video_features(self, around: Any, pixel_values_videos: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of a model around the encoder that takes videos [clips, frames, C, h, w]: a clip ends where a video does."""
        per_clip = self.options.frames_per_clip or pixel_values_videos.shape[1]
        with self.override(frames_per_clip=per_clip):
            return type(around).get_video_features(around, pixel_values_videos, *args, **kwargs)

    def image_features(self, around: Any, *args: Any, **kwargs: Any) -> Any:
        """Of a model around the encoder: images, which it cuts into tiles, go through whole."""
        stream, self.stream_now = self.stream_now, None
        try:
            with self.override(rule=Everything(), refresh_around=None, refresh_share=None):
                return type(around).get_image_features(around, *args, **kwargs)
        finally:
            self.stream_now = stream

    def run_layer(self, layer: Any, x_1RD: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A layer as it is, or nothing, where nothing has changed since an earlier call."""
        return x_1RD if self.call.idle else type(layer).forward(layer, x_1RD, *args, **kwargs)

    @override
    def finish(self, module: nn.Module, inputs: object, output: Any) -> Any:
        output = super().finish(module, inputs, output)
        if self.call.padding and isinstance(output, tuple):
            output = self._pad(output)
        elif self.call.padding:
            for name, value in output.items():
                output[name] = self._pad(value)
        self.commit()
        return output

    def drop_paths(self, module: Any, x_1RD: Tensor) -> Tensor:
        """Stochastic depth on packed frames [1, R, D]: frame by frame, not all of them at once."""
        if not module.training or module.drop_prob == 0:
            return x_1RD
        lengths_F = self.call.segments.cu_seqlens.diff()
        share_kept = 1 - module.drop_prob
        # One number per frame that has tokens, as in the unpatched model: equal seeds drop equal paths.
        kept_F = torch.rand(len(lengths_F), dtype=x_1RD.dtype, device=x_1RD.device).add(share_kept).floor()
        return x_1RD / share_kept * kept_F.repeat_interleave(lengths_F, output_size=x_1RD.shape[1])[:, None]

    @override
    def _check_shape(self, pixel_values: Tensor) -> None:
        # Of other sizes than the model's own it says itself whether it takes them.
        channels = self.encoder.config.num_channels
        if pixel_values.ndim != 5 or pixel_values.shape[2] != channels:
            raise InvalidArgumentError(
                f"pixel_values has shape {list(pixel_values.shape[1:])}; [frames, {channels}, height, width] is needed"
            )

    def _each_layer(self) -> nn.ModuleList:
        return next(module for module in self.layers.children() if isinstance(module, nn.ModuleList))

    def _taken(self) -> Tensor:
        """int64 [R]: which tokens of unpatched frames [F * (E + L)] are in the packed sequence."""
        if self.call.idle:  # any one, which stands for nothing
            return self.call.counts.new_zeros(self.call.spare)
        mask_FL = self.call.kept.mask.flatten(0, 1).flatten(1)
        taken = F.pad(mask_FL, (self.extra_tokens, 0), value=True).flatten()
        return torch.nonzero_static(taken, size=self.call.segments.num_tokens)[:, 0]  # nothing waits for the device

    def _uncut(self, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any], int]:
        """What SigLIP 2's processor gives: frames [F, C, h, w], the arguments without padding, and how much that was.

        Patches are cut there, channels last, see `encoder_inputs`; behind those of a frame lies padding.
        """
        patches_FLP, mask, spatial_shapes = (kwargs[name] for name in _SIGLIP2)
        shapes = {tuple(shape) for shape in spatial_shapes.tolist()}
        height, width = next(iter(shapes))
        places = height * width
        if len(shapes) != 1 or patches_FLP.ndim != 3 or places > patches_FLP.shape[1]:
            raise InvalidArgumentError(
                f"spatial_shapes are {sorted(shapes)} for pixel_values of shape {list(patches_FLP.shape)}; frames of a "
                "patched model have one shape, of no more patches than there are"
            )
        if mask is not None and bool(mask[:, places:].any()):
            raise InvalidArgumentError(f"pixel_attention_mask has more patches than spatial_shapes say, {places}")
        padding = patches_FLP.shape[1] - places
        patches_FLP, mask = patches_FLP[:, :places], None if mask is None else mask[:, :places]
        side = self.token_size()[1]
        cut = patches_FLP.unflatten(2, (side, side, -1)).unflatten(1, (height, width))
        frames = cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        return frames, {**kwargs, "pixel_values": patches_FLP, "pixel_attention_mask": mask}, padding

    def _pad(self, value: Any) -> Any:
        """Tokens [F, L, D] -> with zeros where padding was, which the unpatched encoder gives some value."""
        if isinstance(value, tuple):
            return tuple(self._pad(part) for part in value)
        whole = isinstance(value, Tensor) and value.ndim == 3
        return F.pad(value, (0, 0, 0, self.call.padding)) if whole else value


_SIGLIP2 = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
_PADDING = ("pixel_attention_mask", "patch_attention_mask")
_REFUSED = ("attention_mask", "bool_masked_pos", *_PADDING)


def encoder_inputs(tower: Any, pixels_FChw: Tensor) -> dict[str, Tensor]:
    """What an encoder of `TOWERS` takes for frames of one size [F, C, h, w], as its processor gives it."""
    if type(tower).__name__ != "Siglip2VisionModel":
        return {"pixel_values": pixels_FChw}
    side = tower.config.patch_size
    cut = pixels_FChw.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 3, 5, 1)
    patches_FLP = cut.flatten(3).flatten(1, 2)
    return {
        "pixel_values": patches_FLP,
        "pixel_attention_mask": patches_FLP.new_ones(patches_FLP.shape[:2], dtype=torch.int64),
        "spatial_shapes": torch.tensor([cut.shape[1:3]] * len(cut), device=cut.device),
    }


def _find_tower(model: nn.Module) -> tuple[str, str]:
    """Where the one encoder of a model is, and which."""
    found = [
        (name, base.__name__)
        for name, module in model.named_modules()
        for base in type(module).__mro__
        if base.__name__ in TOWERS and base.__module__.partition(".")[0] == "transformers"
    ]
    if len(found) != 1:
        raise InvalidArgumentError(
            f"{type(model).__name__} has {len(found)} encoders that rlt.patch knows, and needs one: {', '.join(TOWERS)}"
        )
    return found[0]


def _prefix_length(embeddings: Any) -> int:
    """Class and register tokens."""
    registers = getattr(embeddings, "register_tokens", None)
    has_class = any(hasattr(embeddings, name) for name in ("cls_token", "class_embedding"))
    return int(has_class) + (0 if registers is None else registers.shape[1])


def _scatter(x_ND: Tensor, mask: Tensor) -> Tensor:
    """Kept rows -> [*mask, D] with zeros elsewhere."""
    rows_N = torch.nonzero_static(mask.flatten(), size=len(x_ND))[:, 0]
    return x_ND.new_zeros(mask.numel(), x_ND.shape[1]).index_copy(0, rows_N, x_ND).view(*mask.shape, -1)

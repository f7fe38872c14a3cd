"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL of Hugging Face transformers: video tokens go before the vision tower.

Shape legend: P patches of all videos, G merge groups of all videos (a group of 2 x 2 patches is one token of the
language model), B rows of text, K columns of text that are left.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.options import PatchOptions
from rlt.adapters.patching import Hook, Override, Patch
from rlt.adapters.qwen.calls import Arguments
from rlt.adapters.qwen.positions import (
    GroupView,
    KeptPast,
    LastVideos,
    cache_of,
    flat_mask,
    full_features,
    group_grids,
    kept_features,
    tower_arguments,
    vision_tools,
    with_features,
)
from rlt.adapters.statistics import Statistics, warn_unless_normalised
from rlt.errors import InvalidArgumentError
from rlt.tokens.rules import apply_rule

CLIP: Statistics = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES: Statistics = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
"""Of Qwen3-VL; the others have those of CLIP."""


class QwenVLAdapter(Patch):
    """Drops merge groups in which no patch changes, before the vision tower, and their placeholders from the text.

    Calls stay as they are: `model(**inputs)` and `model.generate(**inputs)` take what the processor gives. What is left
    keeps the rotary position that it has in the unpatched model, in the tower and in the text, and so does what is
    generated. Images and calls without a video go through untouched.

    Outputs per token (logits, hidden states) are [B, K, ...], K being the most columns left in a row; shorter rows are
    padded on the left, or on the right where `attention_mask` ends with padding. `labels` lose the same columns.
    `generate` returns full prompts. A key-value cache that lost columns is used as any other: attention masks
    count the columns of the unpatched model.

    A token of a rule is a group, which differs as much as the patch in it that differs most.
    """

    library: ClassVar[str] = "transformers"
    model_classes: ClassVar[tuple[str, ...]] = (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLModel",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLModel",
    )

    counts_once: ClassVar[str] = (
        "its tower attends within time steps, where every token stands once, and its text reads each kept group once"
    )

    @override
    def settle(self, options: PatchOptions) -> PatchOptions:
        if options.expand is not None:
            raise InvalidArgumentError(f"expand is {options.expand!r}; a Qwen-VL model takes None only, leave it out")
        return super().settle(options)

    @override
    def default_statistics(self) -> Statistics:
        return HALVES if "Qwen3" in type(self.model).__name__ else CLIP

    @override
    def token_size(self) -> tuple[int, int]:
        embed = self.inner.visual.patch_embed
        return embed.temporal_patch_size, embed.patch_size

    @property
    def inner(self) -> Any:
        """The bare model with tower and language model."""
        return self.model if "visual" in self.model._modules else self.model.model

    @override
    def edits(self) -> list[Override | Hook]:
        found = [Hook(self.model, self.before, before=True), Hook(self.model, self.note_past)]
        if self.model is self.inner:
            return [*found]
        return [
            *found,
            Override(self.model, "prepare_inputs_for_generation", self.prepare_inputs),
            Override(self.model, "_prepare_position_ids_for_generation", self.generation_positions),
            Override(self.model, "_prepare_multimodal_encoder_kwargs_for_generation", self.encode_for_generation),
        ]

    @override
    def check_attachable(self) -> None:
        vision_tools()
        super().check_attachable()
        if "rlt" in self.inner.__dict__:
            raise InvalidArgumentError("the bare model within is patched already; rlt.unpatch it, or use that alone")

    @override
    def run_static(self) -> None:
        parameter, merge = next(self.model.parameters()), self.inner.visual.spatial_merge_size
        grid, groups = (4, 2 * merge, 2 * merge), 16
        rows = groups * merge**2
        zeros = torch.zeros(rows, self.spec.values_per_token, dtype=parameter.dtype, device=parameter.device)
        self.model(
            input_ids=torch.full((1, groups), self.model.config.video_token_id, device=parameter.device),
            position_ids=torch.arange(groups, device=parameter.device).expand(3, 1, -1),
            pixel_values_videos=zeros,
            video_grid_thw=torch.tensor([grid], device=parameter.device),
            use_cache=False,
        )

    # What happens around `forward`

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the arguments of a call with a video, or with a cache whose video lost tokens, by shorter ones."""
        self._call = None
        call = Arguments(self.model, self.inner, args, kwargs)
        past = KeptPast.of(call.cache)
        found = self._video(call)
        if found is not None:
            shorter, self._call = call.shorten(*found, past)
            return (), shorter
        if past is not None:
            return (), call.go_on(past)
        return None

    def note_past(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        """Note on the cache what it lost: what `before` has left for this call."""
        self.check_runner()
        past, self._call = self._call, None
        if past is not None:
            for cache in output if isinstance(output, tuple) else output.values():
                if hasattr(cache, "get_seq_length"):
                    cache.rlt_kept = past

    def encode(self, pixels: Tensor, grid_thw: Tensor, masks: list[Tensor]) -> Any:
        """The tower's output for the kept groups of all patches; `pooler_output` is float [groups, D] of each video."""
        visual, kept_G = self.inner.visual, flat_mask(masks)
        rows = pixels[kept_G.repeat_interleave(visual.spatial_merge_size**2)].type(visual.dtype)
        output = visual(rows, grid_thw=grid_thw, return_dict=True, **tower_arguments(visual, grid_thw, kept_G))
        counts = [int(mask.sum()) for mask in masks]
        return with_features(output, lambda features: features.split(counts))

    def choose(self, pixels: Tensor, grid_thw: Tensor | None) -> list[Tensor]:
        """Which groups to keep, bool [T', H', W'] of each video; also the record of the call."""
        spec, merge = self.spec, self.inner.visual.spatial_merge_size
        if pixels.ndim != 2 or pixels.shape[1] != spec.values_per_token:
            raise InvalidArgumentError(
                f"pixel_values_videos has shape {list(pixels.shape)}; the model needs [patches, "
                f"{spec.values_per_token}], as its processor gives it"
            )
        grids = group_grids(grid_thw, pixels.shape[0], merge)
        warn_unless_normalised(pixels, spec)
        videos = pixels.split([grid.num_tokens * merge**2 for grid in grids])
        views = [GroupView(rows, grid, merge, spec) for rows, grid in zip(videos, grids, strict=True)]
        masks = [apply_rule(self.options.rule, view, [number])[0] for number, view in enumerate(views)]
        self.last = LastVideos.of(masks)
        return masks

    def _video(self, call: Arguments) -> tuple[Any, list[Tensor]] | None:
        """The tower's output for kept groups, and the masks; None if there is no video or nothing is dropped."""
        pixels = call.get("pixel_values_videos")
        if pixels is not None:
            masks = self.choose(pixels, call.get("video_grid_thw"))
            call.check_placeholders(masks)
            if all(bool(mask.all()) for mask in masks):
                return None
            return self.encode(pixels, call["video_grid_thw"], masks), masks
        encoded = (call.get("mm_encoder_outputs") or {}).get("video")
        found = None if encoded is None else kept_features(encoded)
        if found is not None:
            call.check_placeholders(found[1])
        return found

    # What happens around `generate`

    def encode_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What `generate` does before the first step: features of all placeholders, here with dropped ones marked."""
        original = type(self.model)._prepare_multimodal_encoder_kwargs_for_generation
        rest = dict(model_kwargs)
        pixels, grid_thw = (rest.pop(name, None) for name in ("pixel_values_videos", "video_grid_thw"))
        masks = [] if pixels is None else self.choose(pixels, grid_thw)
        if all(bool(mask.all()) for mask in masks):
            return dict(original(self.model, model_kwargs))
        video = full_features(self.encode(pixels, grid_thw, masks), masks)
        found = dict(original(self.model, rest))
        found["mm_encoder_outputs"] = {**found["mm_encoder_outputs"], "video": video}
        return found

    def prepare_inputs(self, input_ids: Tensor, *, inputs_embeds: Tensor | None = None, **kwargs: Any) -> Any:
        """What `generate` does before each step; prompts that go on from a cache are cut by full columns.

        `generate` takes embeddings only where this names them.
        """
        cache = cache_of(kwargs)
        length = kwargs.get("next_sequence_length")
        past = KeptPast.of(cache)
        if past is not None and kwargs.get("is_first_iteration") and length is not None:
            kwargs["next_sequence_length"] = length - past.full(cache) + int(cache.get_seq_length())
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        return type(self.model).prepare_inputs_for_generation(self.model, input_ids, **kwargs)

    def generation_positions(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """What `generate` does once; a video in the cache is no new one, though the cache is shorter than its text."""
        cache = cache_of(model_kwargs)
        past = KeptPast.of(cache)
        types = model_kwargs.get("mm_token_type_ids")
        if past is not None and types is not None and not bool(types[:, past.full(cache) :].any()):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "mm_token_type_ids"}
        return type(self.model)._prepare_position_ids_for_generation(self.model, inputs_tensor, model_kwargs)

"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL of Hugging Face transformers: video tokens go before the vision tower.

Shape legend: P patches of all videos, G merge groups of all videos (a group of 2 x 2 patches is one token of the
language model), B rows of text, K columns of text that are left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlt.adapters.base import Adapter
from rlt.adapters.options import PatchOptions
from rlt.adapters.qwen.calls import Call
from rlt.adapters.qwen.positions import (
    KeptPast,
    LastVideos,
    cache_of,
    choose_groups,
    flat_mask,
    full_features,
    group_grids,
    kept_features,
    tower_arguments,
    vision_tools,
)
from rlt.errors import InvalidArgumentError


class QwenVLAdapter(Adapter):
    """Drops merge groups in which no patch changes, before the vision tower, and their placeholders from the text.

    Calls stay as they are: `model(**inputs)` and `model.generate(**inputs)` take what the processor gives. What is left
    keeps the rotary position that it has in the unpatched model, in the tower and in the text, and so does what is
    generated. Images and calls without a video go through untouched.

    Outputs per token (logits, hidden states) are [B, K, ...], K being the most columns left in a row; shorter rows are
    padded on the left, or on the right where `attention_mask` ends with padding. `labels` lose the same columns.
    `generate` returns full prompts. A key-value cache that lost columns is used as any other: attention masks
    count the columns of the unpatched model.

    `threshold` is in units of the processor's normalisation: 0.1 is 6.8 grey levels for Qwen2-VL and Qwen2.5-VL and
    12.75 for Qwen3-VL. `max_tokens` and `keep_ratio` count groups of each video.
    """

    model_classes: ClassVar[tuple[str, ...]] = (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLModel",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLModel",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLModel",
    )

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        """Prepare for a model; `attach` begins.

        Raises:
            InvalidArgumentError: for options that make no sense here.
        """
        super().__init__(model, options)
        if options.expand is not None:
            raise InvalidArgumentError(f"expand is {options.expand!r}; a Qwen-VL model takes None only, leave it out")
        self._hooks: list[int] = []
        self._pending: KeptPast | None = None

    @property
    def inner(self) -> Any:
        """The bare model with tower and language model."""
        return self.model if "visual" in self.model._modules else self.model.model

    def attach(self) -> None:
        """Begin: from now on the model drops tokens.

        Raises:
            InvalidArgumentError: if a part of the model is patched or overridden already.
            MissingDependencyError: if the installed transformers is too old.
        """
        vision_tools()
        self._check_untouched()
        if "rlt" in self.inner.__dict__:
            raise InvalidArgumentError("the bare model within is patched already; rlt.unpatch it, or use that alone")
        # Hooks and not an overridden forward: they work beside that of accelerate, and the signature stays readable.
        self._hooks = [
            self.model.register_forward_pre_hook(self.before, with_kwargs=True).id,
            self.model.register_forward_hook(self.finish).id,
        ]
        for module, name, function in self.overrides():
            module.__dict__[name] = function
            self._overridden.append((module, name))
        self.model.__dict__["rlt"] = self

    def detach(self) -> None:
        """End: the model is as it was."""
        for module, name in self._overridden:
            del module.__dict__[name]
        self._overridden.clear()
        for hooks in (
            self.model._forward_pre_hooks,
            self.model._forward_pre_hooks_with_kwargs,
            self.model._forward_hooks,
        ):
            for number in self._hooks:
                hooks.pop(number, None)
        self.model.__dict__.pop("rlt", None)

    def overrides(self) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
        """See `Adapter.overrides`."""
        if self.model is self.inner:
            return []
        return [
            (self.model, "prepare_inputs_for_generation", self.prepare_inputs),
            (self.model, "_prepare_position_ids_for_generation", self.generation_positions),
            (self.model, "_prepare_multimodal_encoder_kwargs_for_generation", self.encode_for_generation),
        ]

    def attention_modules(self) -> list[nn.Module]:
        """None: the tower attends within given segments by itself."""
        return []

    def input_shape(self) -> tuple[int, int, int, int]:
        """(frames, channels, height, width) of the clip that `check` runs; the model takes others as well."""
        embed, visual = self.inner.visual.patch_embed, self.inner.visual
        side = 2 * visual.spatial_merge_size * _whole(embed.patch_size)
        return 4 * _whole(embed.temporal_patch_size), embed.in_channels, side, side

    def fill(self, x_TD: Tensor) -> Tensor:
        """Not offered: dropped placeholders leave the sequence."""
        raise InvalidArgumentError(
            f"outputs of {x_TD.shape[0]} tokens cannot be filled up; compare kept tokens instead"
        )

    def check(self) -> None:
        """Run a clip in which nothing changes, and see that tokens are dropped.

        Raises:
            InvalidArgumentError: if the network got as many tokens as without the patch.
        """
        frames, channels, height, width = self.input_shape()
        parameter, visual = next(self.model.parameters()), self.inner.visual
        patch = _whole(visual.patch_embed.patch_size)
        grid = (4, height // patch, width // patch)
        groups = 4 * height * width // (patch * visual.spatial_merge_size) ** 2
        values = frames // 4 * channels * patch**2
        before, deltas = self.last, self.inner.rope_deltas
        with torch.no_grad():
            self.model(
                input_ids=torch.full((1, groups), self.model.config.video_token_id, device=parameter.device),
                position_ids=torch.arange(groups, device=parameter.device).expand(3, 1, -1),
                pixel_values_videos=torch.zeros(
                    grid[0] * grid[1] * grid[2], values, dtype=parameter.dtype, device=parameter.device
                ),
                video_grid_thw=torch.tensor([grid], device=parameter.device),
                use_cache=False,
            )
        seen, self.last, self.inner.rope_deltas = self.last, before, deltas
        if seen is None or seen.share_kept >= 1:
            raise InvalidArgumentError(
                f"no token of a static clip was dropped with {self.options}; the patch does not engage"
            )

    # What happens around `forward`

    def before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the arguments of a call with a video, or with a cache whose video lost tokens, by shorter ones.

        Raises:
            InvalidArgumentError: if grid, pixels, placeholders and mask do not fit each other.
        """
        self._pending = None
        call = Call.of(self.model, self.inner, args, kwargs)
        past = KeptPast.of(call.cache)
        found = self._video(call)
        if found is not None:
            shorter, self._pending = call.shorten(*found, past)
            return (), shorter
        if past is not None:
            return (), call.go_on(past)
        return None

    def finish(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """Note on the cache what it lost."""
        pending, self._pending = self._pending, None
        if pending is not None:
            values = output if isinstance(output, tuple) else output.values()
            for cache in values:
                if hasattr(cache, "get_seq_length"):
                    pending.put_on(cache)
        return output

    def encode(self, pixels: Tensor, grid_thw: Tensor, masks: list[Tensor]) -> Any:
        """Run the tower on the kept groups.

        Args:
            pixels: float [P, values per patch], all patches.
            grid_thw: int [videos, 3] in patches.
            masks: bool [T', H', W'] of each video in groups.

        Returns:
            The tower's output; `pooler_output` has float [kept groups, D] of each video.
        """
        visual, kept_G = self.inner.visual, flat_mask(masks)
        rows = pixels[kept_G.repeat_interleave(visual.spatial_merge_size**2)].type(visual.dtype)
        output = visual(rows, grid_thw=grid_thw, return_dict=True, **tower_arguments(visual, grid_thw, kept_G))
        counts = [int(mask.sum()) for mask in masks]
        output.pooler_output = output.pooler_output.split(counts)
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [layer.split(counts) for layer in output.deepstack_features]
        return output

    def choose(self, pixels: Tensor, grid_thw: Tensor | None) -> list[Tensor]:
        """Which groups to keep, bool [T', H', W'] of each video; also the record of the call."""
        visual = self.inner.visual
        embed = visual.patch_embed
        tubelet_size, channels = _whole(embed.temporal_patch_size), embed.in_channels
        values = tubelet_size * channels * _whole(embed.patch_size) ** 2
        if pixels.ndim != 2 or pixels.shape[1] != values:
            raise InvalidArgumentError(
                f"pixel_values_videos has shape {list(pixels.shape)}; the model needs [patches, {values}], as its "
                "processor gives it"
            )
        grids = group_grids(grid_thw, pixels.shape[0], visual.spatial_merge_size)
        masks = choose_groups(pixels, grids, self.options, channels=channels, tubelet_size=tubelet_size)
        self.last = LastVideos.of(masks)
        return masks

    def _video(self, call: Call) -> tuple[Any, list[Tensor]] | None:
        """The tower's output for kept groups, and the masks; None if there is no video or nothing is dropped."""
        pixels = call.get("pixel_values_videos")
        encoded = (call.get("mm_encoder_outputs") or {}).get("video")
        if pixels is not None:
            masks = self.choose(pixels, call.get("video_grid_thw"))
            call.check_placeholders(masks)
            if all(bool(mask.all()) for mask in masks):
                return None
            return self.encode(pixels, call["video_grid_thw"], masks), masks
        found = None if encoded is None else kept_features(encoded)
        if found is not None:
            call.check_placeholders(found[1])
        return found

    # What happens around `generate`

    def encode_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What `generate` does before the first step: features of all placeholders, here with dropped ones marked."""
        pixels, grid_thw = model_kwargs.get("pixel_values_videos"), model_kwargs.get("video_grid_thw")
        original = type(self.model)._prepare_multimodal_encoder_kwargs_for_generation
        if pixels is None:
            return dict(original(self.model, model_kwargs))
        masks = self.choose(pixels, grid_thw)
        if all(bool(mask.all()) for mask in masks):
            return dict(original(self.model, model_kwargs))
        assert grid_thw is not None, "choose has looked at it"
        video = full_features(self.encode(pixels, grid_thw, masks), masks)
        rest = {
            name: value for name, value in model_kwargs.items() if name not in ("pixel_values_videos", "video_grid_thw")
        }
        found = dict(original(self.model, rest))
        found["mm_encoder_outputs"] = {**found["mm_encoder_outputs"], "video": video}
        return found

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate` does before each step; prompts that go on from a cache are cut by full columns."""
        cache = cache_of(kwargs)
        length = kwargs.get("next_sequence_length")
        past = KeptPast.of(cache)
        if past is not None and kwargs.get("is_first_iteration") and length is not None:
            kwargs["next_sequence_length"] = length - past.full(cache) + int(cache.get_seq_length())
        return type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)

    def generation_positions(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """What `generate` does once; a video in the cache is no new one, though the cache is shorter than its text."""
        cache = cache_of(model_kwargs)
        past = KeptPast.of(cache)
        types = model_kwargs.get("mm_token_type_ids")
        if past is not None and types is not None and not bool(types[:, past.full(cache) :].any()):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "mm_token_type_ids"}
        return type(self.model)._prepare_position_ids_for_generation(self.model, inputs_tensor, model_kwargs)


def _whole(size: Any) -> int:
    """Patch sizes are numbers, or lists of equal ones."""
    return int(size if isinstance(size, int) else size[0])

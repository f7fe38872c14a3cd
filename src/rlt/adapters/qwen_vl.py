"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL of Hugging Face transformers: video tokens go before the vision tower.

Shape legend: P patches of all videos, G merge groups of all videos (a group of 2 x 2 patches is one token of the
language model), B rows of text, L columns of text, K columns that are left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlt.adapters._qwen_positions import (
    Columns,
    KeptPast,
    LastVideos,
    choose_groups,
    flat_mask,
    full_features,
    group_grids,
    kept_features,
    tower_arguments,
    vision_tools,
)
from rlt.adapters.base import Adapter
from rlt.adapters.options import PatchOptions
from rlt.errors import InvalidArgumentError


class QwenVLAdapter(Adapter):
    """Drops merge groups in which no patch changes, before the vision tower, and their placeholders from the text.

    Calls stay as they are: `model(**inputs)` and `model.generate(**inputs)` take what the processor gives. What is left
    keeps the rotary position that it has in the unpatched model, in the tower and in the text, and so does what is
    generated. Images and calls without a video go through untouched.

    Outputs per token (logits, hidden states) are [B, K, ...], K being the most columns left in a row; shorter rows are
    padded on the left, or on the right where `attention_mask` ends with padding. `labels` lose the same columns.
    `generate` returns full prompts. A cache that lost columns (`past_key_values`) is used as any other: attention masks
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
        call = self._named(args, kwargs)
        past = KeptPast.of(call.get("past_key_values"))
        found = self._video(call)
        if found is not None:
            return (), self._shorten(call, *found, past)
        if past is not None:
            return (), self._continue(call, past)
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

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return dict(kwargs)
        named = inspect.signature(type(self.model).forward).bind(self.model, *args, **kwargs).arguments
        more = named.pop("kwargs", {})
        return {name: value for name, value in (named | more).items() if name != "self"}

    def _video(self, call: dict[str, Any]) -> tuple[Any, list[Tensor]] | None:
        """The tower's output for kept groups, and the masks; None if there is no video or nothing is dropped."""
        pixels = call.get("pixel_values_videos")
        encoded = (call.get("mm_encoder_outputs") or {}).get("video")
        if pixels is not None:
            masks = self.choose(pixels, call.get("video_grid_thw"))
            self._count_placeholders(call, masks)
            if all(bool(mask.all()) for mask in masks):
                return None
            return self.encode(pixels, call["video_grid_thw"], masks), masks
        found = None if encoded is None else kept_features(encoded)
        if found is not None:
            self._count_placeholders(call, found[1])
        return found

    def _count_placeholders(self, call: dict[str, Any], masks: list[Tensor]) -> None:
        _, videos_BL = self._placeholders(call)
        given, needed = int(videos_BL.sum()), sum(mask.numel() for mask in masks)
        if given != needed:
            raise InvalidArgumentError(
                f"the text has {given} video placeholders; video_grid_thw needs {needed}, one per group of patches; "
                "pass input_ids and videos from one call of the processor"
            )

    def _placeholders(self, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Where images and videos stand in the text: bool [B, L] each."""
        ids, config = call.get("input_ids"), self.model.config
        if ids is not None:
            return ids == config.image_token_id, ids == config.video_token_id
        images, videos = self.inner.get_placeholder_mask(None, inputs_embeds=call["inputs_embeds"])
        return images[..., 0], videos[..., 0]

    def _shorten(self, call: dict[str, Any], video: Any, masks: list[Tensor], past: KeptPast | None) -> dict[str, Any]:
        """Arguments without the columns of dropped groups, with positions from the full sequence."""
        images_BL, videos_BL = self._placeholders(call)
        length = images_BL.shape[1]
        cache = call.get("past_key_values")
        past_length = 0 if cache is None else past.full(cache) if past else int(cache.get_seq_length())
        given = self._text_mask(call, past_length + length)
        valid_BL = torch.ones_like(videos_BL) if given is None else given[:, past_length:].bool()
        kept_BL = valid_BL | images_BL | videos_BL  # features exist for every placeholder, whatever the mask says
        kept_BL = kept_BL.masked_scatter(videos_BL, flat_mask(masks).to(kept_BL.device))
        columns = Columns.of(kept_BL, right=not bool(valid_BL[:, -1].all()))

        shorter = self._shorter_text(call, columns)
        shorter["position_ids"] = columns.take(self._positions(call, past_length, length, given), 0)
        attention = columns.take(valid_BL, 0)
        if past is not None:
            attention = torch.cat([past.mask(cache, given), attention], dim=1)
        elif past_length:
            before = attention.new_ones(attention.shape[0], past_length) if given is None else given[:, :past_length]
            attention = torch.cat([before.bool(), attention], dim=1)
        shorter["attention_mask"] = attention.to(torch.int64 if given is None else given.dtype)
        padded = not bool(attention.all())
        if given is None and not padded:
            shorter["attention_mask"] = None  # as the caller had it, which lets attention take its faster path
        shorter["mm_encoder_outputs"] = self._features(call, video)
        self._pending = KeptPast(attention, past_length + length, padded)
        return {**call, **shorter, "pixel_values": None, "pixel_values_videos": None}

    def _shorter_text(self, call: dict[str, Any], columns: Columns) -> dict[str, Any]:
        config = self.model.config
        choices = (getattr(config.get_text_config(), "pad_token_id", None), 0, 1, 2)
        visual = (config.image_token_id, config.video_token_id)
        padding = next(token for token in choices if token is not None and token not in visual)
        shorter: dict[str, Any] = {}
        for name, value in (("input_ids", padding), ("labels", -100), ("mm_token_type_ids", 0)):
            if call.get(name) is not None:
                shorter[name] = columns.take(call[name], value)
        if call.get("inputs_embeds") is not None:
            shorter["inputs_embeds"] = columns.take_vectors(call["inputs_embeds"])
        if isinstance(call.get("logits_to_keep"), Tensor):
            raise InvalidArgumentError(
                "logits_to_keep is a tensor of columns, some of which are dropped; pass a number"
            )
        return shorter

    def _features(self, call: dict[str, Any], video: Any) -> dict[str, Any]:
        features = {**(call.get("mm_encoder_outputs") or {}), "video": video}
        if call.get("pixel_values") is not None:
            own = {
                name: value for name, value in call.items() if name.startswith("image_") and name != "image_grid_thw"
            }
            features["image"] = self.inner.get_image_features(
                call["pixel_values"], call.get("image_grid_thw"), return_dict=True, **own
            )
        return features

    def _text_mask(self, call: dict[str, Any], length: int) -> Tensor | None:
        mask = call.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != length):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InvalidArgumentError(
                f"attention_mask is {shape}; the columns of the unpatched model are needed, [rows, {length}], and no "
                "static cache"
            )
        return mask

    def _positions(self, call: dict[str, Any], past_length: int, length: int, mask: Tensor | None) -> Tensor:
        """int64 [3, B, L]: the positions that the unpatched model gives these columns."""
        text = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        given: Tensor | None = call.get("position_ids")
        if given is None:
            if mask is None and past_length:
                mask = torch.ones(text.shape[0], past_length + length, dtype=torch.int64, device=text.device)
            known = {**call, "attention_mask": mask, "inputs_embeds": text.new_empty(*text.shape[:2], 0)}
            names = inspect.signature(self.inner.compute_3d_position_ids).parameters
            given = self.inner.compute_3d_position_ids(**{name: known.get(name) for name in names})
        if given is None:
            given = torch.arange(past_length, past_length + length, device=text.device)
        if given.ndim == 3 and given.shape[0] == 4:
            steps = given[0].diff(dim=-1)
            if mask is None and call.get("past_key_values") is None and bool((steps != 1).any()):
                raise InvalidArgumentError("position_ids[0] starts anew within a row; videos in packed rows keep all")
            given = given[1:]  # the first row only tells packed sequences apart, and would have gaps now
        return given[..., -length:].expand(3, text.shape[0], -1)

    def _continue(self, call: dict[str, Any], past: KeptPast) -> dict[str, Any]:
        """Arguments for text after a video that lost tokens."""
        cache = call["past_key_values"]
        text = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        before, length = past.full(cache), text.shape[1]
        mask = self._text_mask(call, before + length)
        shorter: dict[str, Any] = {}
        if mask is not None or past.padded:
            attention = past.mask(cache, mask)
            tail = attention.new_ones(attention.shape[0], length) if mask is None else mask[:, before:].bool()
            shorter["attention_mask"] = torch.cat([attention, tail], dim=1).to(torch.int64)
        if call.get("position_ids") is None:
            shorter["position_ids"] = self._positions(call, before, length, mask)
        return {**call, **shorter}

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
        cache: Any = kwargs.get("past_key_values")
        length = kwargs.get("next_sequence_length")
        past = KeptPast.of(cache)
        if past is not None and kwargs.get("is_first_iteration") and length is not None:
            kwargs["next_sequence_length"] = length - past.full(cache) + int(cache.get_seq_length())
        return type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)

    def generation_positions(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """What `generate` does once; a video in the cache is no new one, though the cache is shorter than its text."""
        cache: Any = model_kwargs.get("past_key_values")
        past = KeptPast.of(cache)
        types = model_kwargs.get("mm_token_type_ids")
        if past is not None and types is not None and not bool(types[:, past.full(cache) :].any()):
            model_kwargs = {name: value for name, value in model_kwargs.items() if name != "mm_token_type_ids"}
        return type(self.model)._prepare_position_ids_for_generation(self.model, inputs_tensor, model_kwargs)


def _whole(size: Any) -> int:
    """Patch sizes are numbers, or lists of equal ones."""
    return int(size if isinstance(size, int) else size[0])

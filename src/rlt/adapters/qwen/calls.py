"""Arguments of one call of a Qwen-VL model: how they become shorter where groups of a video are dropped.

Shape legend: B rows of text, L columns of text, K columns that are left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlt.adapters.qwen.positions import Columns, KeptPast, cache_of, flat_mask
from rlt.errors import InvalidArgumentError


class Arguments(dict[str, Any]):
    """Those of one call of `forward`, by name, of the model with head or of the bare one."""

    def __init__(self, model: Any, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`model` is the one that is called, `inner` the bare one with tower and language model, may be the same."""
        if args:
            named = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
            more = named.pop("kwargs", {})
            kwargs = {**named, **more}
            del kwargs["self"]
        super().__init__(kwargs)
        self.model, self.inner = model, inner

    @property
    def cache(self) -> Any:
        """The key-value cache; None if none is given."""
        return cache_of(self)

    @property
    def text(self) -> Tensor:
        """int64 [B, L] ids, or float [B, L, D] embeddings."""
        found: Tensor = self["inputs_embeds"] if self.get("input_ids") is None else self["input_ids"]
        return found

    def check_placeholders(self, masks: list[Tensor]) -> None:
        """Hold that the text has a placeholder for every group, which masks are bool [T', H', W'] of each video."""
        _, videos_BL = self.placeholders()
        given, needed = int(videos_BL.sum()), sum(mask.numel() for mask in masks)
        if given != needed:
            raise InvalidArgumentError(
                f"the text has {given} video placeholders; video_grid_thw needs {needed}, one per group of patches; "
                "pass input_ids and videos from one call of the processor"
            )

    def placeholders(self) -> tuple[Tensor, Tensor]:
        """Where images and videos stand in the text: bool [B, L] each."""
        ids, config = self.get("input_ids"), self.model.config
        if ids is not None:
            return ids == config.image_token_id, ids == config.video_token_id
        images, videos = self.inner.get_placeholder_mask(None, inputs_embeds=self["inputs_embeds"])
        return images[..., 0], videos[..., 0]

    def shorten(self, video: Any, masks: list[Tensor], past: KeptPast | None) -> tuple[dict[str, Any], KeptPast]:
        """Leave out the columns of dropped groups, with positions from the full sequence.

        Args:
            video: the tower's output for the kept groups.
            masks: bool [T', H', W'] of each video in groups.
            past: what the given cache lost before; None for no cache, or a whole one.

        Returns:
            The arguments of the shorter call, and what its cache will hold.
        """
        images_BL, videos_BL = self.placeholders()
        past = past or KeptPast(videos_BL[:, :0], 0, padded=False)
        past_length, length = past.full(self.cache), videos_BL.shape[1]
        given, shown = self._text_masks(past_length + length)
        valid_BL = shown[:, past_length:]
        kept_BL = valid_BL | images_BL | videos_BL  # features exist for every placeholder, whatever the mask says
        kept_BL = kept_BL.masked_scatter(videos_BL, flat_mask(masks).to(kept_BL.device))
        columns = Columns.of(kept_BL, right=not bool(valid_BL[:, -1].all()))

        shorter = self._shorter_text(columns)
        shorter["position_ids"] = columns.take(self._positions(past_length, length, given), 0)
        attention = torch.cat([past.mask(self.cache, shown), columns.take(valid_BL, 0)], dim=1)
        shorter["attention_mask"] = attention.to(torch.int64 if given is None else given.dtype)
        padded = not bool(attention.all())
        if given is None and not padded:
            shorter["attention_mask"] = None  # as the caller had it, which lets attention take its faster path
        shorter["mm_encoder_outputs"] = self._features(video)
        shorter = {**self, **shorter, "pixel_values": None, "pixel_values_videos": None}
        # Text behind the last dropped column is as any that comes later: candidates that are refused go from there.
        whole = int((valid_BL & kept_BL).all(0).flip(0).cumprod(0).sum())
        return shorter, KeptPast(attention[:, : attention.shape[1] - whole], past_length + length - whole, padded)

    def go_on(self, past: KeptPast) -> dict[str, Any]:
        """Arguments for text after a video that lost tokens."""
        cache = self.cache
        before, length = past.full(cache), self.text.shape[1]
        mask, shown = self._text_masks(before + length)
        shorter: dict[str, Any] = {}
        if mask is not None or past.padded:
            shorter["attention_mask"] = torch.cat([past.mask(cache, shown), shown[:, before:]], dim=1).to(torch.int64)
        if self.get("position_ids") is None:
            shorter["position_ids"] = self._positions(before, length, mask)
        return {**self, **shorter}

    def _shorter_text(self, columns: Columns) -> dict[str, Any]:
        config = self.model.config
        choices = (getattr(config.get_text_config(), "pad_token_id", None), 0, 1, 2)
        visual = (config.image_token_id, config.video_token_id)
        padding = next(token for token in choices if token is not None and token not in visual)
        # Candidates of assisted generation stand behind a prompt whose types do not grow with them.
        length = self.text.shape[1]
        take: dict[str, Callable[[Tensor], Tensor]] = {
            "input_ids": lambda ids: columns.take(ids, padding),
            "labels": columns.take_labels,
            "shift_labels": columns.take_shifted_labels,
            "mm_token_type_ids": lambda kinds: columns.take(F.pad(kinds, (0, length - kinds.shape[1])), 0),
            "inputs_embeds": columns.take_vectors,
        }
        shorter = {name: change(self[name]) for name, change in take.items() if self.get(name) is not None}
        if isinstance(self.get("logits_to_keep"), Tensor):
            raise InvalidArgumentError(
                "logits_to_keep is a tensor of columns, some of which are dropped; pass a number"
            )
        return shorter

    def _features(self, video: Any) -> dict[str, Any]:
        features = {**(self.get("mm_encoder_outputs") or {}), "video": video}
        if self.get("pixel_values") is not None:
            own = {name: value for name, value in self.items() if name.startswith("image_")}
            grid = own.pop("image_grid_thw", None)
            features["image"] = self.inner.get_image_features(self["pixel_values"], grid, return_dict=True, **own)
        return features

    def _text_masks(self, length: int) -> tuple[Tensor | None, Tensor]:
        """The mask that is given, if any, and bool [B, length], True without one."""
        mask = self.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != length):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InvalidArgumentError(
                f"attention_mask is {shape}; the columns of the unpatched model are needed, [rows, {length}], and no "
                "static cache"
            )
        shown = torch.ones(len(self.text), length, device=self.text.device) if mask is None else mask
        return mask, shown.bool()

    def _positions(self, past_length: int, length: int, mask: Tensor | None) -> Tensor:
        """int64 [3, B, L]: the positions that the unpatched model gives these columns."""
        text = self.text
        given: Tensor | None = self.get("position_ids")
        if given is None:
            if mask is None and past_length:
                mask = torch.ones(text.shape[0], past_length + length, dtype=torch.int64, device=text.device)
            known = {**self, "attention_mask": mask, "inputs_embeds": text.new_empty(*text.shape[:2], 0)}
            known |= dict.fromkeys(("cache", "past_key_values"), self.cache)  # since transformers 5.24, and before
            names = inspect.signature(self.inner.compute_3d_position_ids).parameters
            given = self.inner.compute_3d_position_ids(**{name: known.get(name) for name in names})
        if given is None:
            given = torch.arange(past_length, past_length + length, device=text.device)
        if given.ndim == 3 and given.shape[0] == 4:
            steps = given[0].diff(dim=-1)
            if mask is None and self.cache is None and bool((steps != 1).any()):
                raise InvalidArgumentError("position_ids[0] starts anew within a row; videos in packed rows keep all")
            given = given[1:]  # the first row only tells packed sequences apart, and would have gaps now
        return given[..., -length:].expand(3, text.shape[0], -1)

"""V-JEPA 2 of Hugging Face transformers: encoder with predictor, and the classifier with its attentive pooler.

Shape legend: B clips, T kept tokens of all clips, L tokens of a clip before dropping, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.interface import InterfacePatch
from rlt.adapters.packed import embed_patches
from rlt.adapters.patching import Hook, Override


class VJEPA2Adapter(InterfacePatch):
    """Rotary positions follow the kept places. The predictor sees the filled grid, the pooler the kept tokens."""

    model_classes: ClassVar[tuple[str, ...]] = ("VJEPA2ForVideoClassification", "VJEPA2Model")
    any_number_of_frames: ClassVar[bool] = True

    @property
    @override
    def encoder(self) -> Any:
        return self.model.base_model.encoder

    @property
    @override
    def fills(self) -> bool:
        return True  # also for the classifier, whose pooler picks the kept tokens out again

    @override
    def edits(self) -> list[Override | Hook]:
        found = super().edits()
        found += [Override(module, "get_position_ids", self.positions) for module in self.attention_modules()]
        if hasattr(self.model, "pooler"):
            found.append(Override(self.model.pooler, "forward", self.pool))
        return found

    @override
    def attention_modules(self) -> list[nn.Module]:
        return [layer.attention for layer in self.encoder.layer]

    @override
    def input_shape(self) -> tuple[int, int, int, int]:
        config = self.model.config
        return config.frames_per_clip, config.in_chans, config.crop_size, config.crop_size

    @override
    def embed(self, pixel_values_videos: Tensor) -> Tensor:
        # Without positions, which turn queries and keys.
        tubelet_size = self.model.config.tubelet_size
        if pixel_values_videos.ndim == 5 and 0 < pixel_values_videos.shape[1] < tubelet_size:
            pixel_values_videos = pixel_values_videos.repeat(1, tubelet_size, 1, 1, 1)  # as the model does
        return embed_patches(self.begin(pixel_values_videos), self.encoder.embeddings.patch_embeddings.proj)[None]

    def positions(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Time, row and column of each kept token, int64 [T] each: what the rotary embedding turns by."""
        del x, masks
        _, time, row, column = self.call.coords.unbind(1)
        return time, row, column

    def pool(self, hidden_state: Tensor) -> Tensor:
        """Pool [B, L, D] -> [B, D], clip by clip over the kept tokens, or over the filled grid if that is asked for."""
        forward, pooler = type(self.model.pooler).forward, self.model.pooler
        if self.options.expand == "fill":
            return forward(pooler, hidden_state)
        kept_clips = zip(hidden_state, self.call.kept.mask.flatten(1), strict=True)
        return torch.cat([forward(pooler, clip[kept][None]) for clip, kept in kept_clips])

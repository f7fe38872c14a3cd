"""V-JEPA 2 of Hugging Face transformers: encoder with predictor, and the classifier with its attentive pooler.

Shape legend: B clips, T kept tokens of all clips, L tokens of a clip before dropping, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlt.adapters.interface import InterfaceAdapter
from rlt.adapters.selection import square_side


class VJEPA2Adapter(InterfaceAdapter):
    """Rotary positions follow the kept places. The predictor sees the filled grid, the pooler the kept tokens."""

    model_classes: ClassVar[tuple[str, ...]] = ("VJEPA2ForVideoClassification", "VJEPA2Model")
    any_number_of_frames: ClassVar[bool] = True

    @property
    def encoder(self) -> Any:
        """The `VJEPA2Encoder`."""
        return getattr(self.model, "vjepa2", self.model).encoder

    def overrides(self) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
        """See `Adapter.overrides`."""
        found: list[tuple[nn.Module, str, Callable[..., Any]]] = [
            (self.encoder.embeddings, "forward", self.embed),
            (self.encoder.layernorm, "forward", self.normalise),
        ]
        found += [(module, "get_position_ids", self.positions) for module in self.attention_modules()]
        if hasattr(self.model, "pooler"):
            found.append((self.model.pooler, "forward", self.pool))
        return found

    def attention_modules(self) -> list[nn.Module]:
        """See `Adapter.attention_modules`."""
        return [layer.attention for layer in self.encoder.layer]

    def input_shape(self) -> tuple[int, int, int, int]:
        """See `Adapter.input_shape`."""
        config = self.model.config
        return config.frames_per_clip, config.in_chans, config.crop_size, config.crop_size

    def embed(self, pixel_values_videos: Tensor) -> Tensor:
        """Pixels [B, frames, C, H, W] -> kept tokens of all clips, [1, T, D]. Positions come in later.

        Raises:
            InvalidArgumentError: for clips of another size than the model is made for.
        """
        config = self.model.config
        if pixel_values_videos.ndim == 5 and 0 < pixel_values_videos.shape[1] < config.tubelet_size:
            pixel_values_videos = pixel_values_videos.repeat(1, config.tubelet_size, 1, 1, 1)  # as the model does
        patch_size = square_side(config.patch_size)
        patches_TP, last = self.select(pixel_values_videos, tubelet_size=config.tubelet_size, patch_size=patch_size)
        projection = self.encoder.embeddings.patch_embeddings.proj
        self.begin(last.tokens_kept, patches_TP.device)
        return F.linear(patches_TP.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)[None]

    def positions(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Time, row and column of each kept token, int64 [T] each: what the rotary embedding turns by."""
        del x, masks
        _, time, row, column = self.kept.mask.nonzero().unbind(1)
        return time, row, column

    def normalise(self, hidden_states: Tensor) -> Tensor:
        """The last LayerNorm on [1, T, D], then the filled grid of each clip, [B, L, D]."""
        layernorm = self.encoder.layernorm
        return self.fill(type(layernorm).forward(layernorm, self.remember(hidden_states))[0])

    def fill(self, x_TD: Tensor) -> Tensor:
        """See `Adapter.fill`."""
        assert self.last is not None
        return x_TD[self.last.row_at_place()]

    def pool(self, hidden_state: Tensor) -> Tensor:
        """Pool [B, L, D] -> [B, D], clip by clip over the kept tokens, or over the filled grid if that is asked for."""
        pooler = self.model.pooler
        pooled: Tensor
        if self.options.expand == "fill":
            pooled = type(pooler).forward(pooler, hidden_state)
            return pooled
        assert self.last is not None
        clips = zip(hidden_state, self.last.mask.flatten(1), strict=True)
        pooled = torch.cat([type(pooler).forward(pooler, clip[kept][None]) for clip, kept in clips])
        return pooled

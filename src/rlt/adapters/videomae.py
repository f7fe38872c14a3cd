"""VideoMAE of Hugging Face transformers: the bare encoder and the classifier.

Shape legend: B clips, T kept tokens of all clips, L tokens of a clip before dropping, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlt.adapters.interface import InterfaceAdapter
from rlt.adapters.selection import sides, square_side
from rlt.errors import InvalidArgumentError
from rlt.network.blocks import mean_per_clip


class VideoMAEAdapter(InterfaceAdapter):
    """Positions are taken by the kept places; a classifier pools over the kept tokens of each clip."""

    model_classes: ClassVar[tuple[str, ...]] = ("VideoMAEForVideoClassification", "VideoMAEModel")

    @property
    def encoder(self) -> Any:
        """The bare `VideoMAEModel`."""
        return getattr(self.model, "videomae", self.model)

    def overrides(self) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
        """See `Adapter.overrides`."""
        return [(self.encoder.embeddings, "forward", self.embed), (self.encoder.encoder, "forward", self.encode)]

    def attention_modules(self) -> list[nn.Module]:
        """See `Adapter.attention_modules`."""
        return [layer.attention.attention for layer in self.encoder.encoder.layer]

    def input_shape(self) -> tuple[int, int, int, int]:
        """See `Adapter.input_shape`."""
        config = self.model.config
        return config.num_frames, config.num_channels, *sides(config.image_size)

    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Pixels [B, frames, C, H, W] -> kept tokens of all clips, [1, T, D].

        Raises:
            InvalidArgumentError: for `bool_masked_pos`, or clips of another size than the model is made for.
        """
        if bool_masked_pos is not None:
            raise InvalidArgumentError("bool_masked_pos is given, but a patched model chooses tokens; rlt.unpatch it")
        config, embeddings = self.model.config, self.encoder.embeddings
        patch_size = square_side(config.patch_size)
        patches_TP, last = self.select(pixel_values, tubelet_size=config.tubelet_size, patch_size=patch_size)
        projection = embeddings.patch_embeddings.projection
        x_TD = F.linear(patches_TP.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)
        positions_LD: Tensor = embeddings.position_embeddings[0].to(x_TD)
        self.begin(last.tokens_kept, x_TD.device)
        return (x_TD + positions_LD.index_select(0, last.place()))[None]

    def encode(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Run the layers on [1, T, D], and give back clips: [B, L, D] filled, or [B, 1, D] pooled for a classifier."""
        output = type(self.encoder.encoder).forward(self.encoder.encoder, hidden_states, **kwargs)
        output.last_hidden_state = self._clips(self.remember(output.last_hidden_state)[0])
        return output

    def fill(self, x_TD: Tensor) -> Tensor:
        """See `Adapter.fill`."""
        assert self.last is not None
        return x_TD[self.last.row_at_place()]

    def _clips(self, x_TD: Tensor) -> Tensor:
        if self.encoder is self.model or self.options.expand == "fill":
            return self.fill(x_TD)
        if self.model.config.use_mean_pooling:
            return mean_per_clip(x_TD, self.segments)[:, None]
        first_B = self.segments.cu_seqlens[:-1].to(torch.int64)  # such heads read a clip's first token
        return x_TD[first_B][:, None]

"""ViViT of Hugging Face transformers: the bare encoder and the classifier, which reads the CLS token.

Shape legend: B clips, T kept tokens of all clips with one CLS token in front of each clip, L tokens of a clip before
dropping, D model width.
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


class ViViTAdapter(InterfaceAdapter):
    """Every clip keeps its CLS token; positions are taken by the kept places."""

    model_classes: ClassVar[tuple[str, ...]] = ("VivitForVideoClassification", "VivitModel")
    pixel_statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

    @property
    def encoder(self) -> Any:
        """The bare `VivitModel`."""
        return getattr(self.model, "vivit", self.model)

    def overrides(self) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
        """See `Adapter.overrides`."""
        return [(self.encoder.embeddings, "forward", self.embed), (self.encoder.layernorm, "forward", self.normalise)]

    def attention_modules(self) -> list[nn.Module]:
        """See `Adapter.attention_modules`."""
        modules = list(self.encoder.modules())
        inner = [module for module in modules if type(module).__name__ == "VivitSelfAttention"]  # before 5.10 or so
        return inner or [module for module in modules if type(module).__name__ == "VivitAttention"]

    def input_shape(self) -> tuple[int, int, int, int]:
        """See `Adapter.input_shape`."""
        config = self.model.config
        return config.num_frames, config.num_channels, *sides(config.image_size)

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Pixels [B, frames, C, H, W] -> the CLS token and the kept tokens of each clip, [1, T, D].

        Raises:
            InvalidArgumentError: for `interpolate_pos_encoding`, or clips of another size than the model is made for.
        """
        if interpolate_pos_encoding:
            raise InvalidArgumentError("interpolate_pos_encoding is set; a patched ViViT takes clips of its own size")
        tubelet_size, *patch = self.model.config.tubelet_size
        patches_TP, last = self.select(pixel_values, tubelet_size=tubelet_size, patch_size=square_side(patch))
        embeddings = self.encoder.embeddings
        projection, positions_LD = embeddings.patch_embeddings.projection, embeddings.position_embeddings[0]
        x_TD = F.linear(patches_TP.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)
        # Under autocast positions and CLS token stay float32, and with them all hidden states, as in the model itself.
        x_TD = x_TD + positions_LD[1:].index_select(0, last.place())
        cls_1D = embeddings.cls_token[0] + positions_LD[:1]
        with_cls = [torch.cat([cls_1D, clip]) for clip in x_TD.split(last.tokens_kept)]
        self.begin(tuple(len(clip) for clip in with_cls), x_TD.device)
        output: Tensor = embeddings.dropout(torch.cat(with_cls))
        return output[None]

    def normalise(self, hidden_states: Tensor) -> Tensor:
        """The last LayerNorm on [1, T, D], then clips: [B, 1 + L, D] filled, or [B, 1, D] with the CLS token alone."""
        layernorm = self.encoder.layernorm
        x_TD: Tensor = type(layernorm).forward(layernorm, self.remember(hidden_states))[0]
        if self.encoder is self.model or self.options.expand == "fill":
            return self.fill(x_TD)
        return x_TD[self.segments.cu_seqlens[:-1].to(torch.int64)][:, None]

    def fill(self, x_TD: Tensor) -> Tensor:
        """See `Adapter.fill`; the CLS token comes first."""
        first_B = self.segments.cu_seqlens[:-1].to(torch.int64)
        assert self.last is not None
        # Row r of all kept tokens lies behind the CLS tokens of its own clip and of those before it.
        clip_B1 = torch.arange(len(first_B), device=x_TD.device)[:, None]
        rows_BL = self.last.row_at_place() + clip_B1 + 1
        return x_TD[torch.cat([first_B[:, None], rows_BL], dim=1)]

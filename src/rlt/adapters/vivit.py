"""ViViT of Hugging Face transformers: the bare encoder and the classifier, which reads the CLS token.

Shape legend: B clips, T kept tokens of all clips with one CLS token in front of each clip, L tokens of a clip before
dropping, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.interface import InterfacePatch
from rlt.adapters.packed import embed_patches
from rlt.adapters.patching import Hook, Override, square_side
from rlt.adapters.statistics import Statistics
from rlt.errors import InvalidArgumentError


class ViViTAdapter(InterfacePatch):
    """Every clip keeps its CLS token; positions are taken by the kept places."""

    model_classes: ClassVar[tuple[str, ...]] = ("VivitForVideoClassification", "VivitModel")
    extra_tokens: ClassVar[int] = 1

    @property
    @override
    def encoder(self) -> Any:
        return getattr(self.model, "vivit", self.model)

    @override
    def edits(self) -> list[Override | Hook]:
        embeddings, layernorm = self.encoder.embeddings, self.encoder.layernorm
        return [
            Override(embeddings, "forward", self.embed),
            Override(layernorm, "forward", self.normalise),
            *super().edits(),
        ]

    @override
    def attention_modules(self) -> list[nn.Module]:
        modules = list(self.encoder.modules())
        inner = [module for module in modules if type(module).__name__ == "VivitSelfAttention"]  # before 5.10 or so
        return inner or [module for module in modules if type(module).__name__ == "VivitAttention"]

    @override
    def token_size(self) -> tuple[int, int]:
        tubelet_size, *patch = self.model.config.tubelet_size
        return tubelet_size, square_side(patch)

    @override
    def default_statistics(self) -> Statistics:
        return (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Pixels [B, frames, C, H, W] -> the CLS token and the kept tokens of each clip, [1, T, D].

        Raises:
            InvalidArgumentError: for `interpolate_pos_encoding`, or clips of another size than the model is made for.
        """
        if interpolate_pos_encoding:
            raise InvalidArgumentError("interpolate_pos_encoding is set; a patched ViViT takes clips of its own size")
        embeddings = self.encoder.embeddings
        x_TD = embed_patches(self.begin(pixel_values), embeddings.patch_embeddings.projection)
        positions_LD, call = embeddings.position_embeddings[0], self.call
        # Under autocast positions and CLS token stay float32, and with them all hidden states, as in the model itself.
        x_TD = x_TD + positions_LD[1:].index_select(0, call.place)
        cls_1D = embeddings.cls_token[0] + positions_LD[:1]
        clips = [torch.cat([cls_1D, x_nD]) for x_nD in x_TD.split(call.num_kept)]
        return embeddings.dropout(torch.cat(clips))[None]

    def normalise(self, hidden_states: Tensor) -> Tensor:
        """The last LayerNorm on [1, T, D], then clips: [B, 1 + L, D] filled, or [B, 1, D] with the CLS token alone."""
        layernorm = self.encoder.layernorm
        x_TD = type(layernorm).forward(layernorm, self.remember(hidden_states))[0]
        return self.call.fill(x_TD) if self.fills else x_TD[self.call.first][:, None]

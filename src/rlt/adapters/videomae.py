"""VideoMAE of Hugging Face transformers: the bare encoder and the classifier.

Shape legend: B clips, T kept tokens of all clips, L tokens of a clip before dropping, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.interface import InterfacePatch
from rlt.adapters.packed import embed_patches
from rlt.adapters.patching import Hook, Override, square_side
from rlt.errors import InvalidArgumentError
from rlt.network.blocks import mean_per_clip


class VideoMAEAdapter(InterfacePatch):
    """Positions are taken by the kept places; a classifier pools over the kept tokens of each clip."""

    model_classes: ClassVar[tuple[str, ...]] = ("VideoMAEForVideoClassification", "VideoMAEModel")

    @property
    @override
    def encoder(self) -> Any:
        return getattr(self.model, "videomae", self.model)

    @override
    def edits(self) -> list[Override | Hook]:
        embeddings, layers = self.encoder.embeddings, self.encoder.encoder
        return [
            Override(embeddings, "forward", self.embed),
            Override(layers, "forward", self.encode),
            *super().edits(),
        ]

    @override
    def attention_modules(self) -> list[nn.Module]:
        return [layer.attention.attention for layer in self.encoder.encoder.layer]

    @override
    def token_size(self) -> tuple[int, int]:
        return self.model.config.tubelet_size, square_side(self.model.config.patch_size)

    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        """Pixels [B, frames, C, H, W] -> kept tokens of all clips, [1, T, D].

        Raises:
            InvalidArgumentError: for `bool_masked_pos`, or clips of another size than the model is made for.
        """
        if bool_masked_pos is not None:
            raise InvalidArgumentError("bool_masked_pos is given, but a patched model chooses tokens; rlt.unpatch it")
        embeddings = self.encoder.embeddings
        x_TD = embed_patches(self.begin(pixel_values), embeddings.patch_embeddings.projection)
        positions_LD = embeddings.position_embeddings[0].to(x_TD)
        return (x_TD + positions_LD.index_select(0, self.call.place))[None]

    def encode(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """Run the layers on [1, T, D], and give back clips: [B, L, D] filled, or [B, 1, D] pooled for a classifier."""
        output = type(self.encoder.encoder).forward(self.encoder.encoder, hidden_states, **kwargs)
        output.last_hidden_state = self._clips(self.remember(output.last_hidden_state)[0])
        return output

    def _clips(self, x_TD: Tensor) -> Tensor:
        if self.fills:
            return self.call.fill(x_TD)
        if self.model.config.use_mean_pooling:
            return mean_per_clip(x_TD, self.call.segments)[:, None]
        return x_TD[self.call.first][:, None]  # such heads read a clip's first token

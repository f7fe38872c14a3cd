"""VideoMAE of Hugging Face transformers: the bare encoder and the classifier.

Shape legend: T kept tokens of all clips, D model width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.interface import InterfacePatch
from rlt.adapters.packed import embed_patches
from rlt.errors import InvalidArgumentError
from rlt.network.run_lengths import RunLengthParts


class VideoMAEAdapter(InterfacePatch):
    """Positions are taken by the kept places; a classifier pools over the kept tokens of each clip."""

    model_classes: ClassVar[tuple[str, ...]] = ("VideoMAEForVideoClassification", "VideoMAEModel")

    @property
    @override
    def last_module(self) -> nn.Module:
        return self.encoder.encoder

    @property
    @override
    def counted(self) -> RunLengthParts:
        pools = not self.is_bare and self.model.config.use_mean_pooling
        return RunLengthParts(pooling=pools, attention=True, position=True)

    @override
    def attention_modules(self) -> list[nn.Module]:
        return [layer.attention.attention for layer in self.encoder.encoder.layer]

    @override
    def embed(self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        if bool_masked_pos is not None:
            raise InvalidArgumentError("bool_masked_pos is given, but a patched model chooses tokens; rlt.unpatch it")
        embeddings = self.encoder.embeddings
        x_TD = embed_patches(self.begin(pixel_values), embeddings.patch_embeddings.projection)
        positions_LD = embeddings.position_embeddings[0].to(x_TD.device)  # which the model does not move
        return (x_TD + self.call.positions(positions_LD).to(x_TD.dtype))[None]

    @override
    def read_by_head(self, x_TD: Tensor) -> Tensor:
        return self.call.mean(x_TD)[:, None] if self.model.config.use_mean_pooling else super().read_by_head(x_TD)

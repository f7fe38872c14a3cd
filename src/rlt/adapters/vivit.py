"""ViViT of Hugging Face transformers: the bare encoder and the classifier, which reads the CLS token.

Shape legend: N kept tokens of all clips, L tokens of a clip before dropping and its CLS token, D model width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.interface import InterfacePatch
from rlt.adapters.packed import embed_patches
from rlt.adapters.patching import square_side
from rlt.adapters.statistics import Statistics
from rlt.errors import InvalidArgumentError
from rlt.network.run_lengths import RunLengthParts


class ViViTAdapter(InterfacePatch):
    """Every clip keeps its CLS token; positions are taken by the kept places."""

    model_classes: ClassVar[tuple[str, ...]] = ("VivitForVideoClassification", "VivitModel")
    extra_tokens = 1

    @property
    @override
    def counted(self) -> RunLengthParts:
        return RunLengthParts(pooling=False, attention=True, position=True)

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

    @override
    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        if interpolate_pos_encoding:
            raise InvalidArgumentError("interpolate_pos_encoding is set; a patched ViViT takes clips of its own size")
        embeddings = self.encoder.embeddings
        x_ND = embed_patches(self.begin(pixel_values), embeddings.patch_embeddings.projection)
        # Under autocast positions and CLS token stay float32, and with them all hidden states, as in the model itself.
        positions_LD = embeddings.position_embeddings[0]
        x_ND = x_ND + self.call.positions(positions_LD[1:])
        cls_1D = embeddings.cls_token[0] + positions_LD[:1]
        return embeddings.dropout(self.call.behind(cls_1D, x_ND))[None]

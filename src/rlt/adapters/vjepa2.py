"""V-JEPA 2 of Hugging Face transformers: encoder with predictor, and the classifier with its attentive pooler.

Shape legend: B clips, T kept tokens of all clips, L tokens of a clip before dropping, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.interface import InterfacePatch
from rlt.adapters.packed import embed_patches
from rlt.adapters.patching import Hook, Override
from rlt.network.run_lengths import RunLengthParts, key_bias


class VJEPA2Adapter(InterfacePatch):
    """Rotary positions follow the kept places. The predictor sees the filled grid, the pooler the kept tokens."""

    model_classes: ClassVar[tuple[str, ...]] = ("VJEPA2ForVideoClassification", "VJEPA2Model")
    any_number_of_frames: ClassVar[bool] = True

    @property
    @override
    def encoder(self) -> Any:
        return self.model.base_model.encoder

    @override
    def edits(self) -> list[Override | Hook]:
        found = super().edits()
        found += [Override(module, "get_position_ids", self.positions) for module in self.attention_modules()]
        if hasattr(self.model, "pooler"):
            found.append(Override(self.model.pooler, "forward", self.pool))
        return found

    @property
    @override
    def counted(self) -> RunLengthParts:
        return RunLengthParts(pooling=hasattr(self.model, "pooler"), attention=True, position=True)

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
        """Time, row and column of each kept token, [T] each: what the rotary embedding turns by."""
        del x, masks
        _, _, row, column = self.call.coords.unbind(1)
        return self.call.time, row, column

    @override
    def read_by_head(self, x_TD: Tensor) -> Tensor:
        # Clips for `pool`, padded with zeros to one length, since the model counts them on the way there.
        return nn.utils.rnn.pad_sequence(x_TD.split(self.call.num_kept), batch_first=True)

    def pool(self, hidden_state: Tensor) -> Tensor:
        """Pool [B, n, D] -> [B, D], clip by clip over the kept tokens, or over the filled grid if that is asked for."""
        call, pooler = self.call, self.model.pooler
        forward = type(pooler).forward
        if self.fills:
            return forward(pooler, hidden_state)
        clips = [clip[None, :count] for clip, count in zip(hidden_state, call.num_kept, strict=True)]
        if not call.parts.pooling:
            return torch.cat([forward(pooler, clip) for clip in clips])
        biases = key_bias(call.lengths).split(call.num_kept)
        return torch.cat([forward(_with_bias(pooler, bias), clip) for clip, bias in zip(clips, biases, strict=True)])


def _with_bias(pooler: Any, key_bias_n: Tensor) -> Any:
    """What the pooler's own `forward` needs of it, with a bias of the keys [n] as the mask of its layers.

    Layers get it as an argument, so that it is still theirs when checkpointing runs them anew.
    """
    mask_111n = key_bias_n[None, None, None]
    return SimpleNamespace(
        query_tokens=pooler.query_tokens,
        self_attention_layers=[_masked(layer, mask_111n) for layer in pooler.self_attention_layers],
        cross_attention_layer=_masked(pooler.cross_attention_layer, mask_111n),
    )


def _masked(layer: Any, mask_111n: Tensor) -> Callable[..., Any]:
    """The layer with this mask in place of the None that the pooler gives it."""

    def run(*hidden_states: Tensor, attention_mask: None = None) -> Any:
        del attention_mask
        return layer(*hidden_states, attention_mask=mask_111n)

    return run

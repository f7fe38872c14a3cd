"""TimeSformer of Hugging Face transformers, with divided attention: the bare encoder and the classifier.

Shape legend: B clips, T frames of a clip, N kept patches of all clips, L places of a frame, M = B + N tokens: the class
token of each clip, then the kept patches; R rows in which each frame has its class token before its kept patches, D
model width, H heads, K width of a head, C channels, h and w pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.frames import FrameCall, FramePatch
from rlt.adapters.options import PatchOptions
from rlt.adapters.packed import Call, embed_patches
from rlt.adapters.patching import Hook, Override, sides, square_side
from rlt.adapters.statistics import Statistics
from rlt.adapters.streams import Stream
from rlt.errors import InvalidArgumentError
from rlt.network.run_lengths import RunLengthParts, key_bias


@dataclass(eq=False)
class ClipCall(FrameCall):
    """A call whose clips are looked at frame by frame, and place by place."""

    @property
    def num_clips(self) -> int:
        """B."""
        return len(self.kept.mask)

    @cached_property
    def frame_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """int64: [R] which of the M tokens each row is, [B * T] the rows of class tokens, [N] those of patches."""
        clips, time, height, width = self.kept.mask.shape
        mask_FL = self.kept.mask.view(clips * time, height * width)
        frames, patches = clips * time, len(self.coords)
        column_R = _find(F.pad(mask_FL, (1, 0), value=True).flatten(), frames + patches)
        frame_R = column_R // (1 + height * width)
        is_class_R = column_R % (1 + height * width) == 0
        token_R = torch.where(is_class_R, frame_R // time, clips - 1 + (~is_class_R).cumsum(0))
        return token_R, _find(is_class_R, frames), _find(~is_class_R, patches)

    @cached_property
    def place_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each place along time: int64 [B * L, T] the kept patch, any where there is none; what attention adds to
        its score, float32 [B * L, 1, 1, T]; and int64 [N] where in the first each kept patch is."""
        mask_PT = self.kept.mask.flatten(2).transpose(1, 2).flatten(0, 1)
        number_BTL = (self.kept.mask.flatten().cumsum(0) - 1).view(self.kept.mask.shape).flatten(2)
        number_PT = number_BTL.transpose(1, 2).flatten(0, 1).clamp(min=0)
        bias_PT = torch.zeros(mask_PT.shape, device=mask_PT.device)
        if self.parts.attention and self.runs is not None:
            bias_PT = key_bias(self.runs)[number_PT]
        bias_PT = torch.where(mask_PT, bias_PT, -torch.inf)
        clip_N, time_N, row_N, column_N = self.coords.unbind(1)
        _, time, height, width = self.kept.mask.shape
        place_N = (clip_N * height + row_N) * width + column_N
        return number_PT, bias_PT[:, None, None], place_N * time + time_N


class TimesformerAdapter(FramePatch):
    """Each layer attends twice. Along time a kept patch sees the kept ones of its place, which count as long as they
    stood where `run_lengths` says so. Along a frame it sees the whole picture, see `FramePatch`; the class token is the
    mean over what it is in each frame, as in the unpatched model.
    """

    model_classes: ClassVar[tuple[str, ...]] = ("TimesformerForVideoClassification", "TimesformerModel")
    library: ClassVar[str] = "transformers"
    takes_images: ClassVar[bool] = False
    any_number_of_frames = False
    call_kind: ClassVar[type[Call]] = ClipCall
    counts_once: ClassVar[str] = "along time; a frame sees a whole picture, in which every token stands once"

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        super().__init__(model, options)
        config = self.model.config
        self.extra_tokens = 1
        if config.attention_type != "divided_space_time":
            raise InvalidArgumentError(
                f"attention_type of the model is {config.attention_type!r}; rlt.patch knows 'divided_space_time' alone"
            )

    @property
    def encoder(self) -> Any:
        """The bare model."""
        return self.model.base_model

    @property
    def fills(self) -> bool:
        """Whether outputs go back on the full grid."""
        return self.encoder is self.model or self.options.expand == "fill"

    @property
    @override
    def counted(self) -> RunLengthParts:
        return RunLengthParts(pooling=False, attention=True, position=False)

    @override
    def default_statistics(self) -> Statistics:
        return (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)

    @override
    def edits(self) -> list[Override | Hook]:
        encoder = self.encoder
        return [
            Override(encoder.embeddings, "forward", self.embed),
            *(Override(layer, "forward", partial(self.run_layer, layer)) for layer in encoder.encoder.layer),
            Hook(encoder.encoder, self.leave),
            Hook(self.model, self.finish),
        ]

    @override
    def attention_modules(self) -> list[nn.Module]:
        return [
            module for layer in self.encoder.encoder.layer for module in (layer.temporal_attention, layer.attention)
        ]

    @override
    def input_shape(self) -> tuple[int, int, int, int]:
        config = self.model.config
        return config.num_frames, config.num_channels, *sides(config.image_size)

    @override
    def token_size(self) -> tuple[int, int]:
        return 1, square_side(self.model.config.patch_size)

    @override
    def stream(self) -> Stream:
        raise InvalidArgumentError("TimeSformer looks along time within a clip; streams are for image models")

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Pixels [B, T, C, h, w], normalised float or uint8 -> all tokens with their positions, [1, M, D]."""
        config = self.model.config
        drops = config.attention_probs_dropout_prob, config.drop_path_rate
        if self.model.training and any(drops):
            raise InvalidArgumentError(
                f"attention_probs_dropout_prob and drop_path_rate are {drops}, which a patched TimeSformer cannot do "
                "in training; set both to 0, or call model.eval()"
            )
        embeddings = self.encoder.embeddings
        x_ND = embed_patches(self.begin(pixel_values), embeddings.patch_embeddings.projection)
        positions_LD, call = embeddings.position_embeddings[0], self.call
        x_ND = embeddings.pos_drop(x_ND + positions_LD[1:].index_select(0, call.place))
        x_ND = embeddings.time_drop(x_ND + embeddings.time_embeddings[0].index_select(0, call.coords[:, 1]))
        class_1D = embeddings.pos_drop(embeddings.cls_token[0] + positions_LD[:1])
        return torch.cat([class_1D.expand(len(call.kept.mask), -1), x_ND])[None]

    def run_layer(self, layer: Any, x_1MD: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        """A layer of TimeSformer on the kept tokens."""
        if output_attentions:
            raise InvalidArgumentError(
                "output_attentions is set, but packed attention has no weights to give; leave it out, or rlt.unpatch"
            )
        call: Any = self.call
        class_BD, x_ND = x_1MD[0].split((call.num_clips, len(call.coords)))
        x_ND = x_ND + layer.temporal_dense(self._along_time(layer.temporal_attention, layer.temporal_layernorm(x_ND)))
        token_R, class_rows, patch_rows = call.frame_rows
        tokens_MD = torch.cat([class_BD, x_ND])
        q_RHK, k_RHK, v_RHK = _split(layer.attention, layer.layernorm_before(tokens_MD[token_R]))
        seen_RD = layer.attention.output(self.mix(q_RHK, k_RHK, v_RHK).flatten(1))
        seen_BD = seen_RD[class_rows].unflatten(0, (call.num_clips, -1)).mean(1)
        tokens_MD = tokens_MD + torch.cat([seen_BD, seen_RD[patch_rows]])
        return ((tokens_MD + layer.output(layer.intermediate(layer.layernorm_after(tokens_MD))))[None],)

    def _along_time(self, module: Any, x_ND: Tensor) -> Tensor:
        """Each kept patch sees the kept ones of its place: few, so that padding them costs less than packing."""
        call: Any = self.call
        call.packed_calls += 1
        number_PT, bias_P11T, place_N = call.place_rows
        q, k, v = (x_NHK[number_PT].transpose(1, 2) for x_NHK in _split(module, x_ND))
        mixed_PHTK = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_P11T.to(q.dtype))
        return module.output(mixed_PHTK.transpose(1, 2).flatten(0, 1)[place_N].flatten(1))

    def leave(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """Behind the layers: [1, M, D] -> the full grid [B, 1 + L * T, D], or for a classifier [B, 1, D]."""
        if isinstance(output, tuple):
            states, *others = output
            return (self._clips(states), *(self._states(other) for other in others))
        output.last_hidden_state = self._clips(output.last_hidden_state)
        output.hidden_states = self._states(output.hidden_states)
        return output

    def _clips(self, x_1MD: Tensor) -> Tensor:
        x_MD = self.remember(x_1MD)[0]
        return self._fill(x_MD) if self.fills else x_MD[: len(self.call.kept.mask), None]

    def _states(self, states: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        return tuple(self._fill(state[0]) for state in states) if states is not None and self.fills else states

    def _fill(self, x_MD: Tensor) -> Tensor:
        """Each place has the token that stands for it, in the order of the model: places, and along time within."""
        clips, time, height, width = self.call.kept.mask.shape
        number_BTL = self.call.kept.row_at_place().view(clips, time, height * width)
        x_BLTD = x_MD[clips + number_BTL.transpose(1, 2)]
        return torch.cat([x_MD[:clips, None], x_BLTD.flatten(1, 2)], 1)


def _find(chosen: Tensor, size: int) -> Tensor:
    """Where a row of booleans is true, int64 [size]; nothing waits for the device."""
    return torch.nonzero_static(chosen, size=size)[:, 0]


def _split(attention: Any, x_ND: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, [N, H, K] each."""
    inner = attention.attention
    return tuple(inner.qkv(x_ND).unflatten(1, (3, inner.num_heads, -1)).unbind(1))

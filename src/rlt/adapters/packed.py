"""What adapters of encoders share: tokens are chosen once, all clips go through the layers as one packed sequence.

Shape legend: B clips, S segments (clips, or frames of all clips), N kept tokens of all clips, E tokens of a segment
beside those of patches, T tokens of all clips with those, L tokens of a segment before dropping, D model width, P pixel
values of a token.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.options import LastForward
from rlt.adapters.patching import Patch
from rlt.adapters.statistics import warn_unless_normalised
from rlt.errors import InvalidArgumentError
from rlt.network.blocks import mean_per_clip
from rlt.network.positions import mean_over_runs
from rlt.network.run_lengths import NOWHERE, RunLengthParts, key_bias, pooling_weights
from rlt.structures import Segments
from rlt.tokens import PatchView
from rlt.tokens.rules import apply_rule
from rlt.tokens.tokenize import length_at_place


@dataclass(eq=False)
class Call:
    """One call of a patched encoder, from the choice of tokens to the output.

    All that depends on values is asked of the device here, once, so that no layer waits for it.
    """

    kept: LastForward
    """What `model.rlt.last` tells users."""
    coords: Tensor
    """int64 [kept tokens, 4]: (clip, t, h, w) of each."""
    counts: Tensor
    """int64 [S]: kept tokens of each clip, or of each frame where those are segments."""
    num_kept: tuple[int, ...]
    """Kept tokens of each segment."""
    segments: Segments
    """Where each clip, or each frame that has tokens, begins and ends in the packed sequence."""
    extra: int = 0
    """Tokens that each segment has in front of those of patches."""
    parts: RunLengthParts = NOWHERE
    """Where run lengths count in this call: nowhere if all are 1, so that nothing changes bit for bit."""
    runs: Tensor | None = None
    """int64 [kept tokens]: for how many time steps each stands; None where they count nowhere."""
    key_bias: Tensor | None = None
    """float32 [T]: what attention adds to the logits of each key; None where run lengths do not count in it."""
    packed_calls: int = 0
    """Layers that have run packed attention so far."""

    @classmethod
    def of(cls, mask: Tensor, extra: int = 0, *, by_frame: bool = False, parts: RunLengthParts = NOWHERE) -> Call:
        """Begin with which tokens to keep, bool [B, T', H', W']; segments are clips, or frames.

        `parts` says where run lengths shall count, for segments that are clips.
        """
        counts_S = (mask.flatten(0, 1) if by_frame else mask).flatten(1).sum(1)
        exporting = torch.compiler.is_exporting()
        length_at = length_at_place(mask) if any(parts) else None
        if length_at is None or exporting:
            counts = counts_S.tolist()
        else:
            *counts, longer = torch.cat([counts_S, ((length_at > 1) & mask).sum()[None]]).tolist()
            if not longer:
                parts, length_at = NOWHERE, None
        # Without extra tokens a frame that repeats the one before has nothing to run.
        num_kept = tuple(count for count in counts if not by_frame or count + extra)
        if exporting:  # a graph knows no lengths, and its attention asks for offsets alone
            offsets = F.pad((counts_S + extra).cumsum(0), (1, 0)).to(torch.int32)
            segments = Segments(offsets, bound=mask[0].numel() + extra)
        elif not num_kept:  # nothing changed since the call that this one goes on from
            segments = Segments(torch.zeros(1, dtype=torch.int32, device=mask.device), bound=0, host=())
        else:
            segments = Segments.from_lengths([count + extra for count in num_kept], device=mask.device)
        coords = mask.nonzero()
        runs = None if length_at is None else length_at[coords.unbind(1)]
        call = cls(LastForward(mask), coords, counts_S, num_kept, segments, extra, parts, runs)
        if parts.attention:
            call.key_bias = key_bias(call.lengths)
        return call

    @property
    def place(self) -> Tensor:
        """int64 [kept tokens]: t * H' * W' + h * W' + w of each in its own clip, or h * W' + w in its own frame."""
        _, t, h, w = self.coords.unbind(1)
        mask = self.kept.mask
        height, width = mask.shape[2:]
        return ((t * height + h) * width + w) % (mask.numel() // len(self.counts))

    @property
    def first(self) -> Tensor:
        """int64 [S]: the row of each segment's first token."""
        return self.segments.cu_seqlens[:-1].to(torch.int64)

    @cached_property
    def rows(self) -> Tensor:
        """int64 [S, E + L]: the row that stands for each token of an unpatched clip, or frame."""
        return self.grid_rows()

    def grid_rows(self) -> Tensor:
        """`rows`, computed."""
        number_S = torch.arange(len(self.counts), device=self.counts.device)
        extra_E = torch.arange(self.extra, device=self.counts.device)
        # Kept token number r lies behind the extra ones of its own segment and of those before it.
        behind_N = self.extra * (1 + number_S.repeat_interleave(self.counts, output_size=len(self.coords)))
        row_N = behind_N + torch.arange(len(behind_N), device=behind_N.device)
        first_S1 = (self.counts.cumsum(0) - self.counts + self.extra * number_S)[:, None]
        return torch.cat([first_S1 + extra_E, self.stand(row_N).view(len(number_S), -1)], dim=1)

    def stand(self, row_N: Tensor) -> Tensor:
        """The row of each kept token -> that of the token which stands for each place, int64 [B, T' * H' * W']."""
        return row_N[self.kept.row_at_place()]

    @property
    def lengths(self) -> Tensor:
        """int64 [T]: how often each token counts, 1 for extra ones, and for all where run lengths count nowhere."""
        runs_N = torch.ones_like(self.coords[:, 0]) if self.runs is None else self.runs
        return self.behind(runs_N.new_ones(self.extra), runs_N)

    @property
    def pooling_weights(self) -> Tensor | None:
        """float32 [T], 1 in the mean of each segment; None where run lengths do not count in pooling."""
        return pooling_weights(self.lengths, self.segments) if self.parts.pooling else None

    @property
    def time(self) -> Tensor:
        """[kept tokens]: the time step of each, int64, or where run lengths count in positions the middle of its run,
        float32."""
        first_N = self.coords[:, 1]
        return first_N + (self.runs - 1).float() / 2 if self.parts.position and self.runs is not None else first_N

    def positions(self, table_LD: Tensor) -> Tensor:
        """Rows of a table with one per place of a grid -> those of the kept tokens, [kept tokens, D].

        Where run lengths count in positions, they are means over the rows of each token's run.
        """
        if not self.parts.position or self.runs is None:
            return table_LD.index_select(0, self.place)
        _, time, height, width = self.kept.mask.shape
        return mean_over_runs(table_LD, self.place, self.runs, height * width, longest=time)

    def mean(self, x_TD: Tensor) -> Tensor:
        """Mean of the tokens of each segment, by `pooling_weights` if there are any: [T, D] -> [segments, D]."""
        weights_T = self.pooling_weights
        return mean_per_clip(x_TD if weights_T is None else x_TD * weights_T[:, None].to(x_TD.dtype), self.segments)

    def behind(self, extra_ED: Tensor, x_ND: Tensor) -> Tensor:
        """Put the same extra tokens in front of each segment's kept ones -> [T, D]; the same for numbers, [T]."""
        if not self.num_kept:
            return x_ND
        return torch.cat([part for x_nD in x_ND.split(self.num_kept) for part in (extra_ED, x_nD)])

    def fill(self, x_TD: Tensor, name: str = "output") -> Tensor:
        """Outputs of all tokens -> [S, E + L, D]: each place has the token that stands for it.

        `name` is that of the output, for calls that go on where another one ended.
        """
        del name
        return x_TD[self.rows]


class PackedPatch(Patch):
    """Runs the layers of an encoder on the kept tokens of all clips, in one sequence of batch size 1.

    A subclass names its `edits`. What replaces the embeddings calls `begin`, layers find their clips in `call`, and
    what comes behind the layers calls `remember`. `finish` is hooked on the model and holds that no layer was missed.
    """

    any_number_of_frames: ClassVar[bool] = False
    """Whether the model takes clips of any length that is a multiple of its tubelets."""
    by_frame: ClassVar[bool] = False
    """Whether the segments of the packed sequence are frames, not clips."""
    call_kind: ClassVar[type[Call]] = Call
    """What keeps the state of a call."""
    extra_tokens: int = 0
    """Tokens that each clip (of an image model each frame) has in front of those of patches, such as a CLS token."""
    kept_now: Tensor | None = None
    """See `keeping`."""

    @abc.abstractmethod
    def attention_modules(self) -> list[nn.Module]:
        """The modules in which tokens attend to each other."""

    @abc.abstractmethod
    def input_shape(self) -> tuple[int, int, int, int]:
        """(frames, channels, height, width) that the model is made for."""

    @property
    def call(self) -> Call:
        """The call whose layers run: the last one, or an earlier one whose activations are computed once more."""
        if self._call is None:
            raise InvalidArgumentError("layers of a patched model run, but no clip was embedded; call the whole model")
        found: Call = self._call
        return found

    @override
    def run_static(self) -> None:
        parameter = next(self.model.parameters())
        pixels = torch.zeros(1, *self.input_shape(), dtype=parameter.dtype, device=parameter.device)
        self.model(pixels[0] if self.takes_images else pixels)

    def choose(self, frames_BTCHW: Tensor) -> Tensor:
        """Which tokens to keep: bool [B, T', H', W'] of normalised float or uint8 frames."""
        spec = self.spec
        if frames_BTCHW.dtype == torch.uint8:
            frames_BTCHW = frames_BTCHW.permute(0, 1, 3, 4, 2)
        else:
            warn_unless_normalised(frames_BTCHW, spec)
        return apply_rule(self.options.rule, PatchView(frames_BTCHW, spec))

    @contextmanager
    def keeping(self, mask: Tensor) -> Iterator[None]:
        """Within a `with` block the rule is not asked: a call keeps these tokens, bool [B, T', H', W'], chosen before.

        Pixels of the others are not looked at. Within a stream the first frame need not be kept whole.
        """
        before, self.kept_now = self.kept_now, mask
        try:
            yield
        finally:
            self.kept_now = before

    def _chosen(self, frames_BTCHW: Tensor) -> Tensor:
        if self.kept_now is None:
            return self.choose(frames_BTCHW)
        batch, frames, _, height, width = frames_BTCHW.shape
        expected = (batch, *self.spec.grid((frames, height, width, 3)))
        if self.kept_now.dtype != torch.bool or tuple(self.kept_now.shape) != expected:
            given = f"{self.kept_now.dtype} {list(self.kept_now.shape)}"
            raise InvalidArgumentError(f"mask is {given}; torch.bool {list(expected)} is needed for these frames")
        return self.kept_now

    def begin(self, pixel_values: Tensor) -> Tensor:
        """Choose tokens, begin a call with them, and gather their pixels.

        What is left of a side that the patch does not divide is not looked at, nor frames that fill no tubelet: as in
        the unpatched model.

        Args:
            pixel_values: normalised float, or uint8, [B, frames, C, H, W].

        Returns:
            float [kept tokens, P], in the order of a Conv3d kernel.
        """
        tubelet_size, patch_size = self.token_size()
        self._check_shape(pixel_values)
        frames, _, height, width = (
            side - side % step
            for side, step in zip(pixel_values.shape[1:], (tubelet_size, 1, patch_size, patch_size), strict=True)
        )
        pixel_values = pixel_values[:, :frames, :, :height, :width]  # the convolution leaves out the rest, too
        mask, parts = self._chosen(pixel_values), self.options.parts
        self._call = call = self.call_kind.of(mask, self.extra_tokens, by_frame=self.by_frame, parts=parts)
        self.last = call.kept
        places = pixel_values.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
        places = places.unflatten(1, (-1, tubelet_size)).permute(0, 1, 4, 6, 3, 2, 5, 7)
        patches_TC = places[call.coords.unbind(1)].flatten(2)
        return (self._normalise(patches_TC) if patches_TC.dtype == torch.uint8 else patches_TC).flatten(1)

    def remember(self, hidden_states: Tensor) -> Tensor:
        """Pass on what the layers give, and let the backward pass find this call again.

        Gradient checkpointing runs layers anew in the backward pass. By then another call may have come, and they would
        take its clips for theirs.
        """
        if not (self.model.training and hidden_states.requires_grad):
            return hidden_states
        flags = ("gradient_checkpointing", "grad_checkpointing")  # as transformers and timm call it
        if not any(module.__dict__.get(flag) for module in self.model.modules() for flag in flags):
            return hidden_states
        return _Remember.apply(hidden_states, self, self.call)  # type: ignore[no-untyped-call]

    def check_packed(self) -> None:
        """Hold that every layer went through packed attention; otherwise clips saw each other."""
        self.check_runner()
        expected, found = len(self.attention_modules()), self._call.packed_calls if self._call else 0
        if found != expected or expected == 0:
            raise InvalidArgumentError(
                f"{found} of {expected} layers used packed attention; {self.library} {_version(self.library)} computes "
                "this model in another way than rlt.patch knows: upgrade rlt, or rlt.unpatch the model"
            )

    def finish(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """Pass on what a call gave, after `check_packed`."""
        self.check_packed()
        return output

    def _check_shape(self, pixel_values: Tensor) -> None:
        expected, given = self.input_shape(), tuple(pixel_values.shape[1:])
        if self.any_number_of_frames and given and given[0] and given[0] % self.spec.tubelet_size == 0:
            expected = (given[0], *expected[1:])
        if pixel_values.ndim != 5 or given != expected:
            raise InvalidArgumentError(
                f"pixel_values has shape {list(pixel_values.shape)}; the model needs [clips, frames, channels, height, "
                f"width] = [B, {', '.join(map(str, expected))}]"
            )

    def _normalise(self, patches_TCP: Tensor) -> Tensor:
        """uint8 [kept tokens, C, values] -> float of the same shape."""
        spec = self.spec
        mean_C1, std_C1 = (torch.tensor(row, device=patches_TCP.device)[:, None] for row in (spec.mean, spec.std))
        return ((patches_TCP.float() / 255 - mean_C1) / std_C1).to(next(self.model.parameters()).dtype)


def embed_patches(patches_TP: Tensor, convolution: Any) -> Tensor:
    """Patches [T, P] -> [T, D], by a Conv2d or Conv3d whose kernel is as large as its stride."""
    weight: Tensor = convolution.weight
    return F.linear(patches_TP.to(weight.dtype), weight.flatten(1), convolution.bias)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:  # a module of the user
        return "as it is here"


class _Remember(torch.autograd.Function):
    """The identity; on the way back it tells the adapter whose layers come next."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, adapter: PackedPatch, call: Call) -> Tensor:
        ctx.adapter, ctx.call = adapter, call
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.adapter._call = ctx.call
        return gradients[0], None, None

"""What image models on frames share: a patch that stands goes through no layer, and each frame sees a whole picture.

Shape legend: B clips, T frames of a clip, F frames of all clips, N kept patches of all frames, R rows of the packed
sequence (kept patches, and the prefix of each frame: class token, registers), E tokens of the prefix, L patches of a
frame before dropping, D model width, H heads, K width of a head. C channels, h and w pixels of a frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.options import PatchOptions
from rlt.adapters.packed import Call, PackedPatch
from rlt.adapters.streams import CameraState, Stream
from rlt.errors import InvalidArgumentError
from rlt.network.attention import packed_cross_attention
from rlt.structures import Segments
from rlt.tokens import Everything, Threshold


@dataclass(eq=False)
class FrameCall(Call):
    """A call whose segments are frames. In a stream, rows of places as earlier calls left them lie behind its own."""

    cameras: tuple[CameraState, ...] = ()
    """In a stream, one for each clip, as earlier calls left it."""
    idle: bool = False
    """Whether nothing has changed since an earlier call, so that no layer has anything to do."""
    spare: int = 0
    """Rows of zeros that nobody sees, for modules that cannot run on nothing."""
    padding: int = 0
    """Patches of each frame that are none, and are left out."""
    fresh: dict[str, Tensor] = field(default_factory=dict)
    """[B, E + L, ...] by name: what stands when this call ends."""
    patches: Any = None
    """[N, pixel values]: those of the kept patches, until they are embedded."""
    pictures: Tensor | None = None
    """[B, C, h, w]: what the next frame of each camera is compared with."""

    @override
    def stand(self, row_N: Tensor) -> Tensor:
        if not self.cameras:
            return super().stand(row_N)
        mask_BTL = self.kept.mask.flatten(2)
        count_BTL = mask_BTL.flatten().cumsum(0).view(mask_BTL.shape) - 1
        newest_BTL = torch.where(mask_BTL, count_BTL, -1).cummax(dim=1).values
        earlier_BL = self._earlier_rows[:, self.extra :]
        behind_BL = len(row_N) + torch.arange(earlier_BL.numel(), device=row_N.device).view(earlier_BL.shape)
        return torch.cat([row_N, earlier_BL.flatten()])[torch.where(newest_BTL >= 0, newest_BTL, behind_BL[:, None])]

    @cached_property
    def rows(self) -> Tensor:
        """int64 [F, E + L]: the row that stands for each token of each frame."""
        if self.idle:
            return self._earlier_rows.repeat_interleave(self.kept.mask.shape[1], dim=0)
        return self.grid_rows()

    @property
    def _earlier_rows(self) -> Tensor:
        """int64 [B, E + L]: where what earlier calls left lies, behind the rows of this one."""
        clips, _, height, width = self.kept.mask.shape
        own, tokens = self.segments.num_tokens + self.spare, self.extra + height * width
        return own + torch.arange(clips * tokens, device=self.counts.device).view(clips, tokens)

    @cached_property
    def keys(self) -> Tensor:
        """int64 [keys]: the rows that frames with tokens see one after the other, where each sees its whole grid."""
        return self.rows[self.counts + self.extra > 0].flatten()

    @cached_property
    def seen(self) -> Segments:
        """E + L keys of each frame that has tokens."""
        return Segments.from_lengths([self.rows.shape[1]] * len(self.segments), device=self.rows.device)

    @cached_property
    def last_rows(self) -> Tensor:
        """int64 [B, E + L]: the rows that stand for the last frame of each clip."""
        return self.rows.unflatten(0, (len(self.kept.mask), -1))[:, -1]

    def rest(self) -> None:
        """Nothing has changed: not even a prefix has anything to do."""
        self.idle, self.num_kept = True, ()
        self.segments = Segments(self.segments.cu_seqlens[:1], bound=0, host=())

    def whole_keys(self, x_RHK: Tensor, name: str) -> Tensor:
        """Keys or values of the tokens -> those that frames see, [keys, H, K]."""
        if not self.cameras and len(self.keys) == len(x_RHK):
            return x_RHK  # nothing was dropped
        return self._with_earlier(x_RHK, name)[self.keys]

    @override
    def fill(self, x_TD: Tensor, name: str = "output") -> Tensor:
        return self._with_earlier(x_TD, name)[self.rows]

    def _with_earlier(self, x_R: Tensor, name: str) -> Tensor:
        """Behind the rows of this call those of earlier ones, [R + B * (E + L), ...]."""
        if not self.cameras:
            return x_R
        tokens = self.last_rows.shape[1]
        x_R = torch.cat([x_R, *(camera.recall(name, x_R, tokens) for camera in self.cameras)])
        self.fresh[name] = x_R.detach()[self.last_rows]
        return x_R

    def leave_cameras(self) -> list[CameraState]:
        """The cameras as this call leaves them."""
        pictures: Iterable[Tensor] = [] if self.pictures is None else self.pictures
        frames = self.kept.mask.shape[1]
        # A row of a batch would keep all of it.
        return [
            CameraState(
                picture.clone(),
                camera.num_frames + frames,
                camera.kept if self.idle else {name: x[b].clone() for name, x in self.fresh.items()},
            )
            for b, (camera, picture) in enumerate(zip(self.cameras, pictures, strict=True))
        ]


class FramePatch(PackedPatch):
    """Patches that repeat those of the frame before go through no layer; what they were stands for them.

    A call takes a batch of images as before, [frames, C, h, w], for consecutive frames of one clip, or of several with
    `frames_per_clip`. A frame runs its prefix tokens and the patches that changed. In attention it sees a whole
    picture: for a place that did not change, the keys and values of the frame in which it last did. So a frame that
    repeats the one before gives the same outputs, a clip that stands still gives those of the unpatched model, and a
    dropped patch costs no linear layer; attention costs changed patches times all places. What is approximate: the
    patch that stands was computed beside the rest of its own, earlier picture. `refresh_every`, `refresh_share` and
    `refresh_around` bound that.

    Features and pooling see the full grid [frames, E + L, D] whatever `expand` is.
    """

    any_number_of_frames = True
    takes_images: ClassVar[bool] = True
    by_frame: ClassVar[bool] = True
    call_kind: ClassVar[type[Call]] = FrameCall
    counts_once: ClassVar[str] = "a frame sees a whole picture, in which every token stands once"
    attention: Any = staticmethod(packed_cross_attention)
    """What runs within; another function of the same signature to compare with."""

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        super().__init__(model, options)
        self.stream_now: Stream | None = None
        """The stream that is entered."""

    @override
    def settle(self, options: PatchOptions) -> PatchOptions:
        options.check_runs("frames see a whole picture")
        return super().settle(options)

    @property
    @override
    def call(self) -> FrameCall:
        found = super().call
        assert isinstance(found, FrameCall)
        return found

    def stream(self) -> Stream:
        """A cache for calls that go on where the last one ended, see `Stream`."""
        return Stream(self)

    @contextmanager
    @override
    def aside(self) -> Iterator[None]:
        stream, self.stream_now = self.stream_now, None
        try:
            with super().aside():
                yield
        finally:
            self.stream_now = stream

    def clips_of(self, images: Tensor) -> Tensor:
        """The images of a call [F, C, h, w] -> clips [B, T, C, h, w].

        Raises:
            InvalidArgumentError: for another shape, or a number of frames that makes no whole clips.
        """
        clips = self.stream_now.num_clips if self.stream_now else None
        per_clip = self.options.frames_per_clip or max(len(images), 1)
        what = f"frames_per_clip={self.options.frames_per_clip} frames"
        if clips is not None:
            per_clip, what = max(len(images) // clips, 1), f"{clips} frames, as many as the stream has cameras"
        if (
            images.ndim != 4
            or len(images) == 0
            or len(images) % per_clip
            or len(images) // per_clip != (clips or len(images) // per_clip)
        ):
            raise InvalidArgumentError(
                f"the images have shape {list(images.shape)}; [frames, channels, height, width] is needed, with a "
                f"multiple of {what}"
            )
        return images.unflatten(0, (-1, per_clip))

    @override
    def begin(self, pixel_values: Tensor) -> Tensor:
        cameras, side = self._cameras(len(pixel_values)), self.token_size()[1]
        height, width = (size - size % side for size in pixel_values.shape[-2:])
        cut_BTChw = pixel_values[..., :height, :width]  # what is left of a side is not looked at
        for camera, frames in zip(cameras, cut_BTChw, strict=bool(cameras)):
            camera.check(frames)
        patches_NP, call = super().begin(pixel_values), self.call
        call.cameras = cameras
        if cameras:
            if not len(call.coords):
                call.rest()
            call.pictures = self._newest(cut_BTChw, call.kept.mask, [camera.picture for camera in cameras])
        return patches_NP

    @override
    def choose(self, frames_BTCHW: Tensor) -> Tensor:
        cameras, options = self._cameras(len(frames_BTCHW)), self.options
        numbers = [camera.num_frames for camera in cameras] or [0] * len(frames_BTCHW)
        before = [camera.picture for camera in cameras] or [None] * len(frames_BTCHW)
        # What a refresh keeps beyond the rule becomes the anchor of what follows.
        refreshes = any((options.refresh_every, options.refresh_share, options.refresh_around))
        step = 1 if refreshes and _is_anchored(options) else frames_BTCHW.shape[1]
        masks = []
        for start in range(0, frames_BTCHW.shape[1], step):
            part = frames_BTCHW[:, start : start + step]
            mask = self._compare(part, before)
            masks.append(self._refresh(mask, [number + start for number in numbers]) if refreshes else mask)
            if start + step < frames_BTCHW.shape[1]:
                before = list(self._newest(part, masks[-1], before))
        return masks[0] if len(masks) == 1 else torch.cat(masks, 1)

    def mix(self, q_RHK: Tensor, k_RHK: Tensor, v_RHK: Tensor) -> Tensor:
        """Attention of one layer: tokens that go through it see the whole picture of their frame, [R, H, K]."""
        call = self.call
        call.packed_calls += 1
        if call.idle:
            return q_RHK
        k_RHK = call.whole_keys(k_RHK, f"keys {call.packed_calls}")
        v_RHK = call.whole_keys(v_RHK, f"values {call.packed_calls}")
        # Norms of queries and keys, and positions that turn them, may give float32 beside values in half precision.
        return self.attention(q_RHK.to(v_RHK), k_RHK.to(v_RHK), v_RHK, call.segments, call.seen)

    @override
    def check_packed(self) -> None:
        if self._call is None or not self.call.idle:
            super().check_packed()

    def commit(self) -> None:
        """The call has ended well: in a stream, the next one goes on from here."""
        if self.call.cameras and self.stream_now is not None:
            self.stream_now.put(self.call.leave_cameras())

    def _cameras(self, num_clips: int) -> tuple[CameraState, ...]:
        if self.stream_now is None:
            return ()
        rule = self.options.rule
        plain = isinstance(rule, Threshold) and rule.exposure == rule.motion == "none"
        if not plain and not isinstance(rule, Everything) and self.kept_now is None:
            raise InvalidArgumentError(
                f"rule is {rule}, but a stream takes rlt.Everything and rlt.Threshold without exposure and motion, "
                "which look at two pictures and at no others"
            )
        if self.model.training:
            raise InvalidArgumentError(
                "the model is in training mode, but a stream keeps what was computed before; call model.eval()"
            )
        return self.stream_now.states(num_clips)

    def _compare(self, frames_BTChw: Tensor, before: Sequence[Tensor | None]) -> Tensor:
        """Which patches to keep by the rule, where a picture came before the first frame of some clips."""
        if all(picture is None for picture in before):
            return super().choose(frames_BTChw)
        firsts = [clip[0] if picture is None else picture for clip, picture in zip(frames_BTChw, before, strict=True)]
        mask = super().choose(torch.cat([torch.stack(firsts)[:, None], frames_BTChw], 1))[:, 1:].contiguous()
        for clip, picture in zip(mask, before, strict=True):
            if picture is None:
                clip[0] = True
        return mask

    def _refresh(self, mask_BTHW: Tensor, numbers: Sequence[int]) -> Tensor:
        """A mask that keeps more; `numbers` counts the frames that each clip had before."""
        options = self.options
        moved, mask_BTHW = mask_BTHW.float(), mask_BTHW.clone()
        if options.refresh_around:
            side = 2 * options.refresh_around + 1
            mask_BTHW |= F.max_pool2d(moved, side, stride=1, padding=options.refresh_around) > 0
        if options.refresh_share is not None:
            mask_BTHW |= moved.mean((2, 3), keepdim=True) > options.refresh_share
        if options.refresh_every is not None:
            for clip, number in zip(mask_BTHW, numbers, strict=True):
                clip[-number % options.refresh_every :: options.refresh_every] = True
        return mask_BTHW

    def _newest(self, frames_BTChw: Tensor, mask_BTHW: Tensor, before: Sequence[Tensor | None]) -> Tensor:
        """What the next frame is compared with, [B, C, h, w]: the last one, or what stands for each place."""
        if not _is_anchored(self.options):
            return frames_BTChw[:, -1]
        side = self.token_size()[1]
        firsts = [clip[0] if known is None else known for clip, known in zip(frames_BTChw, before, strict=True)]
        picture_BChw = torch.stack(firsts)
        for frame_BChw, mask_BHW in zip(frames_BTChw.unbind(1), mask_BTHW.unbind(1), strict=True):
            changed = mask_BHW[:, None].repeat_interleave(side, -1).repeat_interleave(side, -2)
            picture_BChw = torch.where(changed, frame_BChw, picture_BChw)
        return picture_BChw


def _is_anchored(options: PatchOptions) -> bool:
    return getattr(options.rule, "reference", "previous") == "anchor"

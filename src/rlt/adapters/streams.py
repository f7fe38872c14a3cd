"""What a patched image model knows of the frames that went before, so that a call goes on where the last one ended.

Shape legend: B cameras, E tokens of a prefix, L patches of a frame, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from torch import Tensor

from rlt.errors import InvalidArgumentError


@dataclass(eq=False)
class CameraState:
    """One video as far as it has been seen. Its size does not depend on for how long that was."""

    picture: Tensor | None = None
    """[C, H, W]: the pixels that the next frame is compared with; None before the first one."""
    num_frames: int = 0
    """Frames that have been seen."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """[E + L, ...] by name: what layers computed for the prefix, and for each place when it last changed."""

    def recall(self, name: str, like: Tensor, tokens: int) -> Tensor:
        """What was computed for each token [E + L, ...]; zeros that nobody looks at before the first frame.

        Raises:
            InvalidArgumentError: if calls before did not compute it, or on another device or in another precision.
        """
        if not self.num_frames:
            return like.new_zeros(tokens, *like.shape[1:])
        found = self.kept.get(name)
        if found is None:
            raise InvalidArgumentError(
                f"{name} was not asked for in earlier calls of this stream; ask for it from the first one on, or reset"
            )
        if (found.dtype, found.device) != (like.dtype, like.device):
            raise InvalidArgumentError(
                f"layers give {like.dtype} on {like.device}, but in earlier calls of this stream it was {found.dtype} "
                f"on {found.device}; go on as it began, or reset"
            )
        return found

    def check(self, frames_TCHW: Tensor) -> None:
        """Hold that more frames are of the same kind."""
        if self.picture is None:
            return
        began, goes_on = (f"{x.dtype} {list(x.shape[-3:])} on {x.device}" for x in (self.picture, frames_TCHW))
        if began != goes_on:
            raise InvalidArgumentError(
                f"frames are {goes_on}, but the stream began with {began}; go on as it began, or reset"
            )


class _Streaming(Protocol):
    """What a stream needs of the patch that it belongs to."""

    stream_now: Stream | None


class Stream:
    """Calls of a patched image model within a `with` block go on where the last one ended.

        stream = model.rlt.stream()
        with stream:
            for frame in camera:
                features = model(frame[None])

    Outputs are those of one call over all frames, and a patch that stands is computed once for as long as it stands.
    The block may be left and entered again. What is kept does not grow with the number of frames: pixels of one frame,
    and keys, values and the last output of each place. It is for `model.eval()`: weights that change make it stale, and
    no gradients flow back into earlier calls.
    """

    def __init__(self, patch: _Streaming) -> None:
        self._patch = patch
        self._cameras: dict[Hashable, CameraState] = {}
        self._chosen: tuple[Hashable, ...] | None = None

    def __repr__(self) -> str:
        frames = {camera: state.num_frames for camera, state in self._cameras.items()}
        return f"Stream(frames={frames}, num_bytes={self.num_bytes})"

    def __enter__(self) -> Stream:
        if self._patch.stream_now is not None:
            raise InvalidArgumentError("a stream of this model is entered already; leave that one first")
        self._patch.stream_now = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patch.stream_now = None

    @contextmanager
    def cameras(self, *cameras: Hashable) -> Iterator[None]:
        """Say within a `with` block whose frames come: equally many of each of these cameras, one after the other.

        Without it a call brings those of cameras 0, 1, ..., of each as many as `frames_per_clip` says, or of 0 alone.

        Raises:
            InvalidArgumentError: if one is named twice.
        """
        if not cameras or len(set(cameras)) != len(cameras):
            raise InvalidArgumentError(f"cameras are {cameras}; at least one is needed, and each once")
        before, self._chosen = self._chosen, cameras
        try:
            yield
        finally:
            self._chosen = before

    def reset(self, *cameras: Hashable) -> None:
        """Forget what was seen of these cameras, or of all: their next frame is the first one of a video.

        Raises:
            InvalidArgumentError: for a camera of which nothing was seen.
        """
        for camera in cameras:
            if camera not in self._cameras:
                raise InvalidArgumentError(
                    f"nothing was seen of camera {camera!r}; known are {sorted(map(repr, self._cameras))}"
                )
        for camera in cameras or tuple(self._cameras):
            del self._cameras[camera]

    @property
    def num_bytes(self) -> int:
        """Memory that is kept of all cameras."""
        tensors = (x for state in self._cameras.values() for x in (state.picture, *state.kept.values()))
        return sum(x.numel() * x.element_size() for x in tensors if x is not None)

    @property
    def num_clips(self) -> int | None:
        """Cameras that a call brings; None if `frames_per_clip` says it."""
        return None if self._chosen is None else len(self._chosen)

    def states(self, num_clips: int) -> tuple[CameraState, ...]:
        """Those of the cameras of a call; what was never seen is new, and known once it is `put`."""
        return tuple(self._cameras.get(name, CameraState()) for name in self._names(num_clips))

    def put(self, states: Sequence[CameraState]) -> None:
        """Remember how a call left its cameras."""
        self._cameras.update(zip(self._names(len(states)), states, strict=True))

    def _names(self, num_clips: int) -> tuple[Hashable, ...]:
        return tuple(range(num_clips)) if self._chosen is None else self._chosen

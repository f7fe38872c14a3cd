"""Clips of a source that may never end, as they come: cameras, addresses, pipes and files that are still written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import count, islice

import av
import torch
from av.container import InputContainer

from rlt.errors import RltError, VideoError, one_line
from rlt.structures import Clip
from rlt.video._filters import ViewsConverter
from rlt.video._headers import best_stream, frame_rate
from rlt.video._limits import Limits, foreign_errors
from rlt.video._live_inputs import LiveInput, LiveSettings, LiveSource, live_input
from rlt.video._pyav import TimedFrame
from rlt.video.geometry import View
from rlt.video.sampling import nearest_in_time
from rlt.video.spec import ClipSpec

__all__ = ["LiveClip", "LiveSettings", "LiveSource", "is_live", "live_clips"]

_LONGEST_PAUSE_SECONDS = 60
"""A longer step in time is a cut of the source, not a picture that stands."""
_MOST_NOTES = 20
_LONGEST_WAIT_SECONDS = 8.0
"""Between two attempts to reach a source again; the first one is a sixteenth of it."""


@dataclass(frozen=True)
class LiveClip:
    """A clip and how it came."""

    clip: Clip
    """Times are those of the source, from its first frame on; after it was opened again they begin anew."""
    arrived: float
    """When its last frame was there, by `time.monotonic`."""
    goes_on: bool = True
    """Whether it follows the clip before without a gap."""
    notes: tuple[str, ...] = ()
    """What happened before it: lost connections, another resolution, packets that could not be decoded."""


@dataclass
class _Session:
    """What is known of a source while it is open."""

    view: View
    spec: ClipSpec
    convert: ViewsConverter
    notes: list[str] = field(default_factory=list)
    size: tuple[int, int] | None = None
    jumped: TimedFrame | None = None

    def note(self, text: str) -> None:
        """Tell of something with the next clip; of much only the beginning."""
        if len(self.notes) < _MOST_NOTES:
            self.notes.append(text)

    def taken(self) -> tuple[str, ...]:
        """The notes so far, which are not told again."""
        notes, self.notes = tuple(self.notes), []
        return notes


def live_clips(
    source: LiveSource, spec: ClipSpec, settings: LiveSettings | None = None, *, num_threads: int = 1
) -> Iterator[LiveClip]:
    """Consecutive clips, sampled in time as `iter_clips` does: of a file they are the same.

    A camera (rtsp, /dev) has no end: where it stops it is opened again. Then, and where times jump (by more than a
    minute, or back), a new row of clips begins; the last clip of a row repeats its last frame (`Clip.num_repeated`).
    All clips are of the size of the spec, whatever resolution the source changes to; sampling is in time, so that
    another frame rate changes nothing. Packets that cannot be decoded are passed over and noted.

    Args:
        source: a path, "-" for standard input, an address (http, https, rtsp, rtsps), a camera such as /dev/video0, or
            a binary file object. The network is used for addresses only.
        spec: frames, rate and size of the clips.
        settings: how long is waited, and how often a source is opened again.
        num_threads: of the decoder.

    Raises:
        VideoError: for what cannot be opened or holds no video, stalls, or does not come back.
        InvalidArgumentError: for an address of another kind.
    """
    settings = settings or LiveSettings()
    session = _Session(View(spec.frame_size), spec, ViewsConverter(num_threads=num_threads))
    attempts, goes_on = 0, False
    while True:
        given = live_input(source, settings)
        try:
            with foreign_errors(given.name), _open(given, settings) as container:
                for clip in _clips(container, given, session, num_threads):
                    yield replace(clip, goes_on=clip.goes_on and goes_on)
                    attempts, goes_on = 0, True
            if not given.is_live:
                return
            raise VideoError(f"{given.name}: stopped, and a camera has no end; check that it is switched on")
        except VideoError as error:
            if not given.may_return or attempts >= settings.reconnects:
                raise
            attempts, goes_on = attempts + 1, False
            session.note(f"opened again ({one_line(error)})")
            time.sleep(min(_LONGEST_WAIT_SECONDS / 16 * 2 ** (attempts - 1), _LONGEST_WAIT_SECONDS))


def is_live(source: LiveSource) -> bool:
    """Whether a source goes on without being read: a camera."""
    name = source if isinstance(source, str) else ""
    return name.lower().startswith(("rtsp://", "rtsps://", "/dev/video"))


def _open(given: LiveInput, settings: LiveSettings) -> InputContainer:
    try:
        return av.open(
            given.file,
            mode="r",
            format=given.format,
            metadata_errors="ignore",
            options=dict(given.options),
            timeout=settings.stall_seconds,
        )
    except RltError:  # a pipe that stalls says so itself
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{given.name}: cannot be opened as video ({reason}); check it with `ffprobe`") from None


def _clips(container: InputContainer, given: LiveInput, session: _Session, num_threads: int) -> Iterator[LiveClip]:
    stream = best_stream(container, given.name)
    stream.codec_context.thread_type, stream.codec_context.thread_count = "AUTO", num_threads
    stream.codec_context.options = {"max_pixels": str(Limits.current().pixels)}
    rate, tick = frame_rate(stream), stream.time_base or Fraction(1, 90_000)
    frame_ticks = 1 / (rate * tick)
    frames = _frames(container, given, session, frame_ticks)
    first, goes_on = next(frames, None), False
    if first is None:
        raise VideoError(f"{given.name}: not a single frame could be decoded; check it with `ffprobe`")
    step = session.spec.step(rate) * frame_ticks
    while first is not None:
        session.jumped = None
        run = _until_jump(first, frames, session, round(_LONGEST_PAUSE_SECONDS / tick))
        begin = first.ticks
        shown = nearest_in_time(run, (begin + index * step for index in count()), frame_ticks)
        pictures = ((timed.ticks, session.convert(timed.frame, [session.view])[session.view]) for timed in shown)
        while chunk := list(islice(pictures, session.spec.num_frames)):
            missing = session.spec.num_frames - len(chunk)
            whole = chunk + chunk[-1:] * missing
            clip = Clip(
                torch.stack([picture for _, picture in whole]),
                torch.tensor([float(ticks * tick) for ticks, _ in whole], dtype=torch.float64),
                given.name,
                missing,
            )
            yield LiveClip(clip, time.monotonic(), goes_on, session.taken())
            goes_on = True
        first, goes_on = session.jumped, False


def _frames(
    container: InputContainer, given: LiveInput, session: _Session, frame_ticks: Fraction
) -> Iterator[TimedFrame]:
    """Frames as they are decoded, with times from the first one on."""
    stream = best_stream(container, given.name)
    origin: int | None = None
    latest = round(-frame_ticks)
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError as error:
            raise VideoError(f"{given.name}: stopped in the middle ({one_line(error)})") from None
        if packet is None:
            return
        frames: list[av.VideoFrame] = []
        try:
            frames = stream.codec_context.decode(packet if packet.size else None)
        except av.error.EOFError:
            return
        except av.FFmpegError as error:
            session.note(f"a packet could not be decoded ({one_line(error)})")
        for frame in frames:
            size = frame.width, frame.height
            if session.size not in (None, size):
                session.note(f"the picture is {size[0]}x{size[1]} now")
            session.size = size
            origin = frame.pts if origin is None else origin
            latest = latest + round(frame_ticks) if frame.pts is None or origin is None else frame.pts - origin
            yield TimedFrame(latest, frame.duration or 0, frame)


def _until_jump(
    first: TimedFrame, frames: Iterator[TimedFrame], session: _Session, longest_pause: int
) -> Iterator[TimedFrame]:
    yield first
    before = first
    for timed in frames:
        if not 0 <= timed.ticks - before.ticks <= longest_pause:
            session.note("the times of the source jump")
            session.jumped = timed
            return
        yield timed
        before = timed

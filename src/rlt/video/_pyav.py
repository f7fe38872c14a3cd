"""Open a video with PyAV, measure it, and decode it from any moment on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from heapq import heappop, heappush
from itertools import chain, tee
from math import ceil
from typing import TYPE_CHECKING

from rlt.errors import VideoError
from rlt.video._headers import best_stream, declared_seconds, frame_rate
from rlt.video._limits import Limits, remedy
from rlt.video._skipping import SKIPPABLE, Judged, References, Unwanted, judge, ticks_of
from rlt.video._sources import Source, is_playlist, library_input, missing_bytes, source_name
from rlt.video.libav import av
from rlt.video.sampling import Timed, nearest_in_time

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Without these a decoder conceals damage in silence. They gave no false alarm on 500 good files of five codecs, and
# found all but a few of the damaged H.264 and MPEG-4 packets. What they cannot see is damage that still decodes: VP9
# and parts of HEVC carry no redundancy, and Matroska may lose whole blocks, which looks like a pause.
_ERROR_DETECTION = "crccheck+bitstream+buffer+explode"

# In these codecs every packet of a container shows exactly one frame, so a packet without a frame is a lost frame.
# (VP8 and MPEG-4 ASP have packets that show nothing.)
_ONE_FRAME_PER_PACKET = frozenset({"h264", "hevc", "av1"})
_DECODER_TO_CODEC = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9"}

_ROUNDED_UP = 1 << 20  # pixels
_LITTLE = 64  # frames
_REORDER_WINDOW = 4  # frames; MPEG-4 ASP reorders by one frame, B-frames packed in AVI by a few


# What a file holds decides its format, so a format that opens others by name would read any file of this machine, fetch
# addresses and listen on ports. Libraries may be built with more of these than ours.
OPEN_OTHERS = {
    *("concat", "dash", "hls", "imf", "webm_dash_manifest", "image2", "bluray", "dvdvideo"),
    *("rtp", "rtsp", "sap", "sdp"),
    *("avisynth", "lavfi", "vapoursynth"),
}


@dataclass(frozen=True)
class TimedFrame(Timed):
    """A decoded frame and when it is shown, in units of `VideoFile.tick`."""

    frame: av.VideoFrame
    """As decoded: not scaled, not rotated."""


class VideoFile:
    """An open video: its best video stream, its rate and length, and decoding from any moment on.

    Use it as a context manager; container and decoder are closed at its end, also on errors.

    Raises:
        VideoError: if no library reads it, it holds no video, or it is beyond `limits`.
    """

    num_frames: int
    """Frames of the video at a constant rate, at least 1."""
    rate: Fraction
    """Frames a second; the average if the rate varies."""
    tick: Fraction
    """Unit of its times in seconds."""
    frame_ticks: Fraction
    """How many ticks a frame is shown at a constant rate."""
    skips: bool
    """Whether frames that nobody asks for may be left undecoded."""
    skipped: bool
    """Whether any were in what was decoded last."""

    def __init__(self, source: Source, *, num_threads: int = 0) -> None:
        self.name = source_name(source)
        self.source = source
        self.num_threads = num_threads
        self.limits = Limits.current()
        self.restart_clock()
        self.missing = missing_bytes(source)
        self.skips = True
        self._scanned: list[Timed] | None = None
        self._container = self._open()
        try:
            self._start()
            self._measure()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _open(self) -> InputContainer:
        try:
            container = av.open(
                library_input(self.source),
                mode="r",
                metadata_errors="ignore",
                options=opening(),
                timeout=self.limits.seconds,
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            if self.missing:
                size, promised = self.missing
                raise VideoError(
                    f"{self.name}: cannot be opened, the file is cut off ({size:,} bytes of at least {promised:,} are "
                    "there); download or copy it again"
                ) from None
            if is_playlist(self.source):
                raise VideoError(
                    f"{self.name}: a list of other files or addresses, which are not opened; give the video itself"
                ) from None
            reason = getattr(error, "strerror", None) or str(error)
            raise VideoError(
                f"{self.name}: not a video that FFmpeg can open ({reason}); check it with `ffprobe`, or download it "
                "again"
            ) from None
        if container.format.name == "tty":  # libav draws any .txt file as a terminal
            container.close()
            raise VideoError(
                f"{self.name}: a text file, not a video; give a video file such as .mp4, .mkv, .webm or .avi"
            )
        return container

    def restart_clock(self) -> None:
        """Begin a reading: from now on it may take `limits.seconds`."""
        self._deadline = time.monotonic() + self.limits.seconds

    def check_clock(self) -> None:
        """Hold that this reading has not taken longer than it may.

        Raises:
            VideoError: after more than `limits.seconds`.
        """
        if time.monotonic() > self._deadline:
            raise VideoError(
                f"{self.name}: reading it takes more than {self.limits.seconds} s; check the file; {remedy('seconds')}"
            )

    def _start(self) -> None:
        self.stream = best_stream(self._container, self.name)
        context = self.stream.codec_context
        context.thread_type = "AUTO"
        context.thread_count = self.num_threads
        # For frames that are larger than the header says; libav counts sides that are rounded up.
        max_pixels = min(self.limits.pixels + _ROUNDED_UP, (1 << 31) - 1)
        context.options = {"err_detect": _ERROR_DETECTION, "max_pixels": str(max_pixels)}
        self._peeked: list[av.Packet[VideoStream]] = []
        self._at_beginning = True
        self._start_record()

    def _start_record(self) -> None:
        """Forget the damage seen so far."""
        self._flaws: list[int] = []
        self._pending: set[int] = set()
        self._first_ticks: int | None = None
        self._demuxer_failed = False
        self.skipped = False

    def _measure(self) -> None:
        """Rate, origin and length, from headers and the first packet only."""
        stream = self.stream
        self.has_audio = len(self._container.streams.audio) > 0
        self.codec = _DECODER_TO_CODEC.get(stream.codec_context.name, stream.codec_context.name)
        if (pixels := stream.width * stream.height) > self.limits.pixels:
            raise VideoError(
                f"{self.name}: its frames have {stream.width}x{stream.height} pixels, {pixels:,}, and "
                f"{self.limits.pixels:,} are allowed; {remedy('bytes')}"
            )
        self.rate = frame_rate(stream)
        for packet in self._packets():
            self._peeked.append(packet)
            if not packet.is_discard:
                break
        first = self._peeked[-1].pts if self._peeked else None
        # A bare H.264 or H.265 stream has no times at all: frames are counted, and there is no seeking.
        self.has_times, self.tick, self.origin = False, 1 / self.rate, 0
        if first is not None and stream.time_base:
            self.has_times, self.tick, self.origin = True, stream.time_base, first
        self.frame_ticks = 1 / (self.rate * self.tick)
        seconds = declared_seconds(stream, self._container) if self.has_times else None
        declared = None if seconds is None else max(round(seconds * self.rate), 1)
        if declared is None or declared > self.limits.frames:
            self.rescan()
        else:
            self.num_frames = declared

    def rescan(self) -> None:
        """Measure `num_frames` again from the packets instead of the headers.

        Raises:
            VideoError: if it is more than `limits.frames`.
        """
        last = (self.scan() or [Timed(0, 0)])[-1]
        end = last.ticks + max(last.duration, round(self.frame_ticks))
        self.num_frames = max(round(end / self.frame_ticks), 1)
        if self.num_frames > self.limits.frames:
            raise VideoError(
                f"{self.name}: by its times it has {self.num_frames:,} frames, {self.limits.frames:,} are allowed; "
                f"give it new times with `ffmpeg -i IN -vf setpts=N/25/TB OUT`; {remedy('frames')}"
            )

    def scan(self) -> list[Timed]:
        """Times of all frames in ascending order, from their packets; read once. Leaves the file at its beginning."""
        if self._scanned is None:
            self._reopen()
            times: list[Timed] = []
            corrupt: list[int] = []
            for packet in self._packets():
                pts = packet.pts if self.has_times else None
                ticks = len(times) if pts is None else pts - self.origin
                if packet.is_corrupt:
                    corrupt.append(ticks)
                elif not packet.is_discard:
                    times.append(Timed(ticks, 1 if pts is None else packet.duration or 0))
            self._reopen()
            self._flaws = corrupt
            self._scanned = sorted(times)
        return self._scanned

    def _reopen(self) -> None:
        self._container.close()
        self._container = self._open()
        self._start()

    def decode(self, ticks: int = 0, moments: Iterable[Fraction] | None = None) -> Iterator[TimedFrame]:
        """Frames in display order, from the key frame at or before `ticks` to the end of the stream.

        Damage does not end the iteration; `damage_until` tells of it afterwards.

        Args:
            ticks: moment to begin at.
            moments: all that is wanted, in ticks and ascending: frames that no other refers to and that are nearest to
                none of these may be missing. What is damaged in them is not seen, and reaches nothing else.
        """
        moments = iter(moments) if moments is not None and self._can_skip else None
        if ticks > 0 and self.has_times:
            one_second = max(round(1 / self.tick), 1)
            for margin in (0, 1, 4, 16, 64):
                if margin * one_second > ticks:
                    break
                try:
                    self._container.seek(
                        self.origin + ticks - margin * one_second, backward=True, any_frame=False, stream=self.stream
                    )
                except (av.FFmpegError, OSError):
                    break  # no index: a container that cannot seek is decoded from its beginning
                self._peeked = []
                attempt, moments = (None, None) if moments is None else tee(moments)
                frames = self._decode_on(attempt)
                first = next(frames, None)
                # Some demuxers seek by decoding time and land behind a moment that lies before a key frame.
                if first is not None and first.ticks <= ticks:
                    return chain([first], frames)
            self._reopen()
        elif not self._at_beginning:
            self._reopen()
        return self._decode_on(moments)

    @property
    def _can_skip(self) -> bool:
        """Whether frames may be left out: their packets say when they are shown, and that nothing refers to them."""
        # A field of an interlaced frame may have a packet for itself, and the frame needs both.
        is_progressive = self.stream.codec_context.field_order in (0, 1)
        has_times = self.has_times and self._container.format.name != "avi"
        return self.skips and has_times and is_progressive and self.codec in SKIPPABLE

    def _decode_on(self, moments: Iterator[Fraction] | None) -> Iterator[TimedFrame]:
        self._at_beginning = False
        self._start_record()
        frames = self._raw_frames(self._judged_packets(moments))
        # AVI stores no presentation times; libav guesses them, and swaps neighbours where B-frames are packed.
        return _in_time_order(frames) if self._container.format.name == "avi" else frames

    def _judged_packets(self, moments: Iterator[Fraction] | None) -> Iterator[Judged]:
        packets, self._peeked = chain(self._peeked, self._packets()), []
        if moments is None:
            return (Judged(packet, ticks_of(packet, self.origin)) for packet in packets)
        references = References(self.codec, self.stream.codec_context.extradata)
        return judge(packets, self.origin, Unwanted(moments), references)

    def _raw_frames(self, packets: Iterator[Judged]) -> Iterator[TimedFrame]:
        checks_packets = self.has_times and self.codec in _ONE_FRAME_PER_PACKET
        # A frame may stand as long as the whole video, and a little; a longer pause is a broken time.
        longest_pause = round((self.num_frames + _LITTLE) * self.frame_ticks)
        latest = before = -1
        count = 0
        refused: set[int | None] = set()
        is_interlaced = False
        for packet, ticks, is_unwanted in chain(packets, [Judged(None, None)]):
            is_left_out = is_unwanted and not is_interlaced
            self.stream.codec_context.skip_frame = "NONREF" if is_left_out else "DEFAULT"
            self.skipped |= is_left_out
            if packet is not None and ticks is not None:
                if checks_packets and not packet.is_discard and not is_left_out:
                    self._pending.add(ticks)
                if packet.is_corrupt:
                    self._flaws.append(ticks)
            try:
                frames = self.stream.codec_context.decode(packet)
            except av.error.EOFError:
                return
            except av.FFmpegError:
                # Lost frames speak for themselves where packets are checked; an error before the first frame comes
                # from pictures that lean on a frame before the key frame. HEVC gives frames whose hash is not the one
                # that the encoder wrote beside them, and an error with each.
                if self._first_ticks is None:
                    if self.num_threads == 1:  # with more of them an error comes beside a later packet
                        refused.add(ticks)
                elif self.codec == "hevc":
                    self._flaws.append(latest + 1)
                elif not checks_packets:
                    self._flaws.append(ticks if ticks is not None else latest + 1)
                continue
            for frame in frames:
                if not self.has_times:
                    latest = count
                elif frame.pts is not None:
                    latest = frame.pts - self.origin
                else:
                    latest += round(self.frame_ticks)
                count += 1
                if self._first_ticks is None:
                    self._first_ticks = latest
                elif latest - before > longest_pause:
                    self._flaws.append(before + 1)
                is_interlaced |= frame.interlaced_frame
                # Frames out of order or without times are not what their packets let expect.
                is_strange = self.skipped and (0 <= latest <= before or frame.pts is None)
                before = latest
                self._pending.discard(latest)
                if is_strange or _is_corrupt(frame) or (self.codec == "hevc" and latest in refused):
                    self._flaws.append(latest)
                if latest >= 0:
                    duration = min(frame.duration or 0, longest_pause) if self.has_times else 1
                    yield TimedFrame(latest, duration, frame)
        if self._demuxer_failed:
            self._flaws.append(latest + 1)

    def _packets(self) -> Iterator[av.Packet[VideoStream]]:
        try:
            for packet in self._container.demux(self.stream):
                self.check_clock()
                if packet.size:  # an empty one repeats a picture (AVI) or is PyAV's sign to flush
                    yield packet
        except VideoError:
            raise
        except (av.FFmpegError, OSError):
            self._demuxer_failed = True

    def damage_until(self, ticks: int | None) -> int | None:
        """First damage in what was decoded last, in ticks; only what can reach a frame shown at `ticks` if given."""
        first = self._first_ticks if self._first_ticks is not None else 0
        flaws = self._flaws + [pending for pending in self._pending if pending >= first]
        return min((flaw for flaw in flaws if ticks is None or flaw <= ticks), default=None)


def frames_at(file: VideoFile, moments: Iterable[Fraction], /) -> Iterator[TimedFrame]:
    """Frames shown at `moments`, as `rlt.video.Decoder` says; decodes from the key frame before the first one on."""
    moments = iter(moments)
    first = next(moments)
    asked, wanted = tee(chain([first], moments))
    stream = file.decode(ceil(first - Fraction(1, 2)), wanted)  # the tick that a container rounds the moment to
    return nearest_in_time(stream, asked, file.frame_ticks)


def whole_frames_at(file: VideoFile, moments: Iterable[Fraction], /) -> Iterator[TimedFrame]:
    """`frames_at` with every frame decoded, whether anybody asks for it or not."""
    file.skips = False
    return frames_at(file, moments)


def _is_corrupt(frame: av.VideoFrame) -> bool:
    flag: object = frame.is_corrupt  # a method until PyAV 17, a property since, declared as the former
    return bool(flag() if callable(flag) else flag)


def _in_time_order(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
    """Keep the frames in the order in which the decoder shows them and sort their times."""
    times: list[int] = []
    waiting: deque[TimedFrame] = deque()
    for timed in frames:
        heappush(times, timed.ticks)
        waiting.append(timed)
        if len(waiting) > _REORDER_WINDOW:
            yield replace(waiting.popleft(), ticks=heappop(times))
    while waiting:
        yield replace(waiting.popleft(), ticks=heappop(times))


@cache
def opening() -> dict[str, str]:
    """Options that a file is opened with."""
    formats = sorted(av.formats_available - OPEN_OTHERS)
    return {"protocol_whitelist": "file", "format_whitelist": ",".join(formats)}

"""Videos of somebody else: whatever they say or hold ends as a clip or as one line of ours, soon, and opens no door."""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import rlt.assets
from rlt.errors import InvalidArgumentError, RltError, VideoError
from rlt.video import iter_clips, list_videos, probe, read_clip, read_clips
from rlt.video._filters import Turn
from video_factory import numbered_picture, packets_of, read_number, write_video

SMALL = {"num_frames": 4, "frame_stride": 2, "size": 32}


def video_bytes(num_frames: int = 70, **kind: object) -> bytes:
    buffer = io.BytesIO()
    write_video(buffer, num_frames, **{"container": "matroska", **kind})  # type: ignore[arg-type]
    return buffer.getvalue()


def with_tag(data: bytes, text: bytes) -> bytes:
    """Matroska with another text as the DURATION of its stream."""
    at = data.find(b"DURATION") + len(b"DURATION") + 3  # behind the id of its value and the length of that
    length = data[at - 1] & 0x7F
    return data[:at] + text.ljust(length, b"\0") + data[at + length :]


def with_duration(data: bytes, seconds: float) -> bytes:
    """Matroska with another length of all."""
    at = data.find(b"\x44\x89\x88") + 3
    return data[:at] + struct.pack(">d", seconds * 1000) + data[at + 8 :]


def numbers(clip) -> list[int]:
    return [read_number(frame.numpy()) for frame in clip.frames]


def refused(call: Callable[[], object], *words: str, kind: type[RltError] = VideoError) -> None:
    """The call ends in one line of ours that says all of `words`."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# What a file says about itself


@pytest.mark.parametrize("tag", [b"00:00:1e999999999", b"00:00:1/0", b"0:0:9e17", b"-9:-9:-9", b"99999999999:0:0"])
def test_a_length_that_is_no_time_is_not_computed(tag):
    """Exponents hung for ever, 1/0 was a ZeroDivisionError, silly lengths refused a good file."""
    data = with_tag(video_bytes(), tag)
    assert probe(data).num_frames == 70
    assert numbers(read_clip(data, num_frames=4, frame_stride=2, size=None)) == [31, 33, 35, 37]


def test_a_length_beyond_the_frames_of_the_file_is_measured_again():
    """A length of years that is a time: the packets say how many frames there are."""
    data = with_tag(with_duration(video_bytes(), 1e9), b"999999:59:59.00")
    assert probe(data).num_frames == 70
    hours = with_tag(with_duration(video_bytes(), 3e4), b"0008:20:00.00")
    assert numbers(read_clip(hours, num_frames=4, frame_stride=2, size=None)) == [31, 33, 35, 37]


def jumping(jump: int) -> bytes:
    """70 frames whose header says 2.8 s, the last 8 so many milliseconds later."""
    times = [40 * number + (jump if number >= 62 else 0) for number in range(70)]
    options = {"bf": "0"}
    data = video_bytes(pts=times, time_base=Fraction(1, 1000), options=options)
    return with_tag(with_duration(data, 2.8), b"00:00:02.800000000")


def test_times_that_jump_end_a_walk_over_the_video():
    """2.5e10 frames that repeat one came, at 1,300 clips a second."""
    clips = iter_clips(jumping(10**12), num_frames=16, frame_stride=1, size=32)
    whole = [next(clips) for _ in range(3)]
    assert [clip.num_repeated for clip in whole] == [0, 0, 0]
    refused(lambda: sum(1 for _ in clips), "damaged at about 2.4")
    before = read_clip(jumping(10**12), num_frames=4, frame_stride=2, size=None, start=0)
    assert numbers(before) == [0, 2, 4, 6]


def test_times_that_no_header_bounds_are_bounded_by_the_limit():
    """Without a length in the headers: the packets themselves say 25,000,000,002,800 frames."""
    times = [40 * number + (10**12 if number >= 62 else 0) for number in range(70)]
    data = video_bytes(pts=times, time_base=Fraction(1, 1000), options={"bf": "0"})
    refused(lambda: probe(data), "frames", "5,000,000", "RLT_VIDEO_MAX_FRAMES")
    refused(lambda: sum(1 for _ in iter_clips(data, **SMALL)), "RLT_VIDEO_MAX_FRAMES")


def test_times_that_jump_are_seen_at_any_rate():
    """A rate of 2^31 a second in the header of an AVI made every gap an endless repetition."""
    data = bytearray(video_bytes(codec="mpeg4", container="avi"))
    at = data.find(b"strh") + 28  # scale, then rate
    data[at : at + 8] = struct.pack("<II", 1, 2**31 - 1)
    begin = time.monotonic()
    with suppress(VideoError):
        for _ in iter_clips(bytes(data), num_frames=8, frame_stride=1, size=32):
            pass
    assert time.monotonic() - begin < 20


def test_a_frame_that_stands_long_is_no_damage():
    """A video of slides: a still of 60 s among frames, as the headers say."""
    times = [40 * number + (60_000 if number >= 35 else 0) for number in range(70)]
    data = video_bytes(pts=times, time_base=Fraction(1, 1000), options={"bf": "0"})
    clips = list(iter_clips(data, num_frames=16, frame_stride=1, size=32))
    assert sum(16 - clip.num_repeated for clip in clips) == probe(data).num_frames


@pytest.mark.parametrize("length", [2**44, 2**62, 2**63 - 1, 2**64 - 1])
def test_boxes_longer_than_any_file(length):
    """A raw OSError or ValueError of `seek`, which ended a folder and a training."""
    data = video_bytes(container="mp4") + struct.pack(">I4sQ", 1, b"free", length) + bytes(64)
    assert probe(data).truncated
    matroska = video_bytes()
    long = matroska[:4] + b"\x01\x7f" + b"\xff" * 5 + b"\xfe" + matroska[5:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_clip(data, **SMALL).num_repeated == 0
    refused(lambda: read_clip(long, **SMALL), "cut off")


# Limits


def test_more_frames_than_anybody_means_are_refused_before_work():
    """`--frames 1000000` gave no answer, `--size 1000000` a raw ArgumentError."""
    data = video_bytes(8)
    for options in ({"num_frames": 1_000_000}, {"size": 1_000_000}, {"num_frames": 10**12, "size": None}):
        refused(lambda options=options: read_clip(data, **options), "RLT_VIDEO_MAX_", kind=InvalidArgumentError)
        refused(lambda options=options: iter_clips(data, **options), "RLT_VIDEO_MAX_", kind=InvalidArgumentError)
    refused(lambda: read_clips(data, num_clips=10**9), "num_clips", kind=InvalidArgumentError)
    refused(lambda: read_clips(data, num_clips=4_000), "GB", kind=InvalidArgumentError)


def test_every_limit_can_be_set(monkeypatch):
    """The budget of a decode: a video beyond a limit is a VideoError that names its variable."""
    data = video_bytes()
    monkeypatch.setenv("RLT_VIDEO_MAX_FRAMES", "69")
    refused(lambda: probe(data), "70 frames", "69", "RLT_VIDEO_MAX_FRAMES")
    monkeypatch.setenv("RLT_VIDEO_MAX_FRAMES", "70")
    assert probe(data).num_frames == 70
    own_size = {"num_frames": 4, "frame_stride": 2, "size": None}
    monkeypatch.setenv("RLT_VIDEO_MAX_BYTES", str(4 * 160 * 96 * 3 - 1))
    refused(lambda: read_clip(data, **own_size), "RLT_VIDEO_MAX_BYTES")
    refused(lambda: list(iter_clips(data, **own_size)), "RLT_VIDEO_MAX_BYTES")
    monkeypatch.setenv("RLT_VIDEO_MAX_BYTES", str(64 * 160 * 96))
    assert read_clip(data, **own_size).frames.shape == (4, 96, 160, 3)
    monkeypatch.setenv("RLT_VIDEO_MAX_BYTES", str(64 * 160 * 96 - 1))
    refused(lambda: read_clip(data, **SMALL), "160x96", "RLT_VIDEO_MAX_BYTES")
    monkeypatch.delenv("RLT_VIDEO_MAX_BYTES")
    monkeypatch.setenv("RLT_VIDEO_MAX_SECONDS", "1")
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr("rlt.video._pyav.time.monotonic", lambda: next(clock))
    refused(lambda: read_clip(data, **SMALL), "1 s", "RLT_VIDEO_MAX_SECONDS")
    monkeypatch.setenv("RLT_VIDEO_MAX_FRAMES", "many")
    refused(lambda: probe(data), "'many'", kind=InvalidArgumentError)


def test_the_time_between_two_clips_is_not_that_of_reading(monkeypatch):
    monkeypatch.setenv("RLT_VIDEO_MAX_SECONDS", "100")
    now = [0.0]
    monkeypatch.setattr("rlt.video._pyav.time.monotonic", lambda: now[0])
    for _ in iter_clips(video_bytes(), num_frames=10, frame_stride=1, size=32):
        now[0] += 1000


def test_time_holds_with_torchcodec_too(monkeypatch):
    """Between two calls of it, which give four frames each: here a decoder of its form that takes 60 s for them."""
    now, calls = [0.0], []

    class Slow:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_frames_played_at(self, seconds: list[float]) -> object:
            calls.append(len(seconds))
            now[0] += 60
            return types.SimpleNamespace(data=torch.zeros(len(seconds), 96, 160, 3, dtype=torch.uint8))

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=Slow))
    monkeypatch.delitem(sys.modules, "rlt.video._torchcodec", raising=False)
    monkeypatch.setenv("RLT_VIDEO_MAX_SECONDS", "100")
    monkeypatch.setattr("rlt.video._pyav.time.monotonic", lambda: now[0])
    options = {"frame_stride": 2, "size": 32, "decoder": "torchcodec"}
    try:
        assert read_clip(video_bytes(), num_frames=8, **options).num_repeated == 0
        refused(lambda: read_clip(video_bytes(), num_frames=16, **options), "100 s", "RLT_VIDEO_MAX_SECONDS")
        assert calls == [4, 4, 4, 4]
    finally:
        sys.modules.pop("rlt.video._torchcodec", None)


def test_a_picture_that_covers_the_size_only_when_it_is_huge(monkeypatch):
    monkeypatch.setenv("RLT_VIDEO_MAX_BYTES", str(1 << 20))
    wide = video_bytes(4, picture=lambda _: np.zeros((16, 1024, 3), np.uint8))
    refused(lambda: read_clip(wide, num_frames=1, size=128), "1024x16", "RLT_VIDEO_MAX_BYTES")


# What is no file


def test_pipes_devices_and_folders_are_refused_before_they_are_opened(tmp_path):
    """A FIFO waited for a writer for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    refused(lambda: read_clip(tmp_path / "pipe.mp4"), "pipe.mp4", "a named pipe")
    refused(lambda: probe(tmp_path / "zero.mp4"), "a device")
    refused(lambda: iter_clips(tmp_path / "loop.mp4"), "cannot be read")
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "door.mp4"))
        refused(lambda: probe(tmp_path / "door.mp4"), "a socket")
    refused(lambda: read_clip(tmp_path), "is a folder")
    refused(lambda: list_videos(tmp_path), "no videos")


@pytest.mark.parametrize("name", ["nul\0.mp4", "n" * 300 + ".mp4", "\udcff.mp4"])
def test_names_that_no_file_can_have(tmp_path, name):
    """NUL in a path was a raw ValueError, 300 letters a raw OSError."""
    refused(lambda: read_clip(tmp_path / name), "check the path")
    refused(lambda: list_videos(tmp_path / name), "check the path")


def test_a_folder_without_permission(tmp_path, monkeypatch):
    """A raw PermissionError."""

    def stat(self: Path, **_: object) -> object:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", stat)
    refused(lambda: read_clip(tmp_path / "v.mp4"), "Permission denied")
    refused(lambda: list_videos(tmp_path / "v.mp4"), "Permission denied")


# Doors


@contextmanager
def listening() -> Iterator[tuple[int, list[str]]]:
    """A web server on this machine: its port, and what was asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_port, asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:2.8,\n{0}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile '{0}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1" width="160" height="96"><BaseURL>{0}</BaseURL></Representation></AdaptationSet></Period></MPD>',
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("way", ["path", "bytes", "object", "named object"])
def test_lists_of_other_files_and_addresses_open_nothing(tmp_path, kind, way):
    """SDP opened UDP ports and waited 60 s, a file object named x.m3u8 fetched http and read other files."""
    neighbour = tmp_path / "neighbour.ts"
    write_video(neighbour, 70, container="mpegts")
    suffix = {"hls": ".m3u8", "concat": ".ffconcat", "sdp": ".sdp", "dash": ".mpd"}[kind]
    with listening() as (port, asked):
        for target in (f"http://127.0.0.1:{port}/x.ts", str(neighbour), "neighbour.ts"):
            path = tmp_path / f"x{suffix}"
            path.write_text(PLAYLISTS[kind].format(target))
            source = {"path": path, "bytes": path.read_bytes()}.get(way) or io.BytesIO(path.read_bytes())
            if way == "named object":
                source.name = str(path)
            begin = time.monotonic()
            refused(lambda source=source: read_clip(source, **SMALL), "list of other files", "give the video itself")
            assert time.monotonic() - begin < 10
        assert asked == []


def test_an_address_is_no_path():
    with listening() as (port, asked):
        refused(lambda: read_clip(f"http://127.0.0.1:{port}/x.mp4"), "no such file")
        refused(lambda: read_clip("concat:a.mp4|b.mp4"), "no such file")
        assert asked == []


# Raw exceptions


class Broken(io.BytesIO):
    """A file object that fails in the middle."""

    def __init__(self, data: bytes, error: Exception) -> None:
        super().__init__(data)
        self.error = error

    def read(self, size: int = -1, /) -> bytes:
        if self.tell() > len(self.getvalue()) // 2:
            raise self.error
        return super().read(min(size, 512))


@pytest.mark.parametrize(
    "error",
    [
        OSError("gone"),
        ValueError("odd"),
        KeyError("name"),
        OverflowError("big"),
        UnicodeDecodeError("x", b"", 0, 1, "y"),
    ],
)
def test_what_a_library_raises_becomes_one_line(error, monkeypatch):
    """Raw exceptions of somebody else's file end at one place."""

    def fail(*_: object, **__: object) -> None:
        raise error

    data = video_bytes()
    for place in ("VideoFile._measure", "VideoFile._raw_frames", "missing_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(f"rlt.video._pyav.{place}", fail)
            for call in (
                lambda: read_clip(data, **SMALL),
                lambda: list(iter_clips(data, **SMALL)),
                lambda: probe(data),
            ):
                refused(call, "<bytes>: cannot be read", type(error).__name__)
    refused(lambda: read_clip(Broken(data, error), **SMALL), "Broken")


def test_a_mistake_in_code_is_not_hidden(monkeypatch):
    monkeypatch.setattr("rlt.video._pyav.VideoFile._measure", lambda _: None + 1)
    with pytest.raises(TypeError):
        read_clip(video_bytes(8), **SMALL)


# Damage that an encoder lets see


def flipped(data: bytes, packet: int, rng: random.Random) -> bytes:
    """One bit changed in the coded picture of a packet."""
    position, size = packets_of(data)[packet]
    at = position + rng.randrange(size // 2, size)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def noisy(number: int) -> np.ndarray:
    noise = np.random.default_rng(number).integers(-20, 20, (96, 160, 3))
    return (numbered_picture(number).astype(np.int16) + noise).clip(0, 255).astype(np.uint8)


def test_hevc_that_carries_hashes_gives_no_wrong_pixels():
    """FFmpeg compares hashes that an encoder wrote, and gave frame and error; the error was passed over."""
    options = {"x265-params": "log-level=none:keyint=40:hash=1", "preset": "ultrafast"}
    data = video_bytes(24, codec="libx265", container="mp4", options=options, picture=noisy)
    whole = {"num_frames": 24, "frame_stride": 1, "size": None, "start": 0, "num_threads": 1}
    good, rng = read_clip(data, **whole).frames, random.Random(3)
    wrong = 0
    for packet in range(24):
        try:
            clip = read_clip(flipped(data, packet, rng), **whole)
        except VideoError:
            wrong += 1
        else:
            assert torch.equal(clip.frames, good)
    assert wrong > 15


# Side data that PyAV does not know


class Unknown:
    """A frame whose side data PyAV refuses as a whole."""

    def __init__(self, frame: av.VideoFrame) -> None:
        self.rotation = frame.rotation

    @property
    def side_data(self) -> object:
        raise ValueError("31 is not a valid Type")


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_side_data_that_is_not_known_hides_no_turn(turn):
    """EXIF in frames was a bare ValueError; `frame.rotation` still says the turn."""
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write display matrices")
    with av.open(io.BytesIO(video_bytes(4, container="mp4", rotation=(turn, False, False)))) as container:
        frame = next(container.decode(video=0))
    assert Turn.of(Unknown(frame)) == Turn.of(frame)


def test_motion_jpeg_with_exif_is_read():
    """JPEGs with EXIF in a container could not be read at all."""
    image = pytest.importorskip("PIL.Image")
    exif = image.Exif()
    exif[0x010E] = "a description"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuvj420p"
        for number in range(12):
            jpeg = io.BytesIO()
            image.fromarray(numbered_picture(number)).save(jpeg, "JPEG", exif=exif, quality=95)
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 25)
            output.mux(packet)
    assert probe(buffer.getvalue()).num_frames == 12
    assert numbers(read_clip(buffer.getvalue(), num_frames=4, frame_stride=2, size=None)) == [2, 4, 6, 8]


# A small part of fuzzing


def remuxed(data: bytes, container: str, seconds: float = 1.5) -> bytes:
    """The first moments of a video in another container."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is None or packet.pts * stream.time_base > seconds:
                break
            packet.stream = copy
            target.mux(packet)
    return buffer.getvalue()


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def change_header(data: bytes, rng: random.Random) -> bytes:
    """Large and small numbers where headers have theirs: at the beginning, or at the index at the end."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3))):
        at = rng.choice((rng.randrange(1024), len(data) - 4 - rng.randrange(1024)))
        changed[at : at + 4] = rng.choice(
            (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", rng.randbytes(4))
        )
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    begin, end = sorted(rng.randrange(1, len(data)) for _ in range(2))
    return rng.choice((data[:end], data[begin:], data[:begin] + data[end:], data + data[begin:end]))


def overwrite(data: bytes, rng: random.Random) -> bytes:
    size, at = rng.choice((16, 1024, 20_000)), rng.randrange(len(data))
    return data[:at] + rng.choice((bytes(size), rng.randbytes(size))) + data[at + size :]


@pytest.fixture(scope="module")
def fuzz_seeds() -> list[bytes]:
    clips = [rlt.assets.path(name).read_bytes() for name in rlt.assets.names()]
    seeds = [remuxed(clip, container) for clip in clips for container in ("mp4", "matroska", "mpegts", "flv")]
    return [*seeds, video_bytes(codec="mpeg4", container="avi")]


def ends_well(call: Callable[[bytes], object], data: bytes) -> bool:
    """Whether the file is read; where it is not, there must be one line of ours."""
    try:
        call(data)
    except RltError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 (either end is right)
        return False
    return True


@pytest.mark.parametrize("mutate", [flip_bits, change_header, cut, overwrite])
def test_mutated_files_are_clips_or_one_line(fuzz_seeds, mutate, monkeypatch):
    """A fixed small part of a fuzzer: 64 files, each probed, read and walked over."""
    monkeypatch.setenv("RLT_VIDEO_MAX_SECONDS", "20")
    rng = random.Random(f"{mutate.__name__} 5")
    outcomes: list[bool] = []
    for number in range(16):
        data = mutate(fuzz_seeds[number % len(fuzz_seeds)], rng)
        for call in (
            probe,
            lambda data: read_clip(data, num_threads=1, **SMALL),
            lambda data: [clip.num_repeated for clip in iter_clips(data, num_threads=1, **SMALL)],
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcomes.append(ends_well(call, data))
    assert 3 < sum(outcomes) < len(outcomes)

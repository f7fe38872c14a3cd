"""Frames that nobody asks for are not decoded, and those that are asked for are the same bytes as without."""

import io
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import count
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt import assets
from rlt.errors import VideoError
from rlt.video import ClipSpec, VideoFile, iter_clips, read_spread
from rlt.video._pyav import frames_at
from rlt.video._skipping import References, Unwanted
from rlt.video.sampling import Timed, nearest_in_time
from video_factory import HEIGHT, WIDTH, Picture, damage_packet, write_video

NUM_FRAMES = 50
X264 = {"preset": "veryfast", "threads": "1"}
X265 = "log-level=none:pools=1:frame-threads=1"
UNEVEN = [0, 1, 2, 7, 8, 9, 10, 31, 32, 33, 35, 37, *range(60, 60 + NUM_FRAMES - 12)]


def moving_picture(number: int) -> Picture:
    """A gradient with a square that moves over it, so that frames between others have something to say."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    picture = np.stack([rows * 2, columns, (rows + columns) // 2 + number], -1).astype(np.uint8)
    left = number * 3 % (WIDTH - 40)
    picture[20:60, left : left + 40] = (200, 30, number * 5)
    return picture


KINDS: dict[str, Callable[[io.BytesIO], None]] = {
    "no B-frames": lambda file: write_video(file, NUM_FRAMES, container="mp4", options=X264 | {"bf": "0"}),
    "B-frames": lambda file: write_video(
        file, NUM_FRAMES, container="mp4", options=X264 | {"bf": "2", "b-pyramid": "none"}, picture=moving_picture
    ),
    "pyramid, open GOPs": lambda file: write_video(
        file,
        NUM_FRAMES,
        container="matroska",
        options=X264 | {"bf": "7", "b_strategy": "0", "b-pyramid": "normal", "g": "16", "x264-params": "open-gop=1"},
        picture=moving_picture,
    ),
    "uneven times": lambda file: write_video(
        file,
        NUM_FRAMES,
        container="matroska",
        options=X264 | {"bf": "3", "b_strategy": "0", "g": "20"},
        pts=UNEVEN,
        time_base=Fraction(1, 25),
        picture=moving_picture,
    ),
    "transport stream": lambda file: write_video(
        file, NUM_FRAMES, container="mpegts", options=X264 | {"bf": "3", "b_strategy": "0", "g": "20"}
    ),
    "interlaced": lambda file: write_video(
        file, NUM_FRAMES, container="mp4", options=X264 | {"bf": "3", "b_strategy": "0", "x264-params": "tff=1"}
    ),
    "HEVC": lambda file: write_video(
        file,
        NUM_FRAMES,
        codec="libx265",
        container="mp4",
        options={"preset": "ultrafast", "x265-params": f"{X265}:bframes=3:b-adapt=0:keyint=20:open-gop=1"},
        picture=moving_picture,
    ),
    "HEVC, temporal layers": lambda file: write_video(
        file,
        NUM_FRAMES,
        codec="libx265",
        container="mpegts",
        options={"preset": "ultrafast", "x265-params": f"{X265}:bframes=4:b-adapt=0:temporal-layers=3:keyint=25"},
        picture=moving_picture,
    ),
    "VP9": lambda file: write_video(
        file, NUM_FRAMES, codec="libvpx-vp9", container="webm", options={"deadline": "realtime", "cpu-used": "8"}
    ),
    "AV1": lambda file: write_video(
        file, NUM_FRAMES, codec="libsvtav1", container="matroska", options={"preset": "12", "svtav1-params": "lp=1"}
    ),
    "MPEG-4": lambda file: write_video(file, NUM_FRAMES, codec="mpeg4", container="avi", max_b_frames=2),
}
SKIPS = {"B-frames", "pyramid, open GOPs", "uneven times", "transport stream", "HEVC", "HEVC, temporal layers"}


@cache
def video(kind: str) -> bytes:
    file = io.BytesIO()
    KINDS[kind](file)
    return file.getvalue()


def shown(data: bytes, moments: list[Fraction], threads: int, *, skips: bool) -> tuple[list[object], bool]:
    """What is decoded for moments in frames, and whether anything was left out."""
    with VideoFile(data, num_threads=threads) as file:
        file.skips = skips
        came = frames_at(file, (moment * file.frame_ticks for moment in moments))
        frames = [(timed.ticks, timed.duration, timed.frame.to_ndarray().tobytes()) for timed in came]
        assert file.damage_until(frames[-1][0] if frames else None) is None
        return [*frames], file.skipped


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(
    start=st.fractions(0, NUM_FRAMES + 30, max_denominator=8),
    step=st.fractions(Fraction(1, 3), 12, max_denominator=8),
    number=st.integers(1, 30),
    threads=st.integers(1, 3),
)
def test_frames_asked_for_are_the_same_bytes(
    kind: str, start: Fraction, step: Fraction, number: int, threads: int
) -> None:
    moments = [start + step * index for index in range(number)]
    whole, _ = shown(video(kind), moments, threads, skips=False)
    some, _ = shown(video(kind), moments, threads, skips=True)
    assert some == whole


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_left_out_where_the_stream_allows_it(kind: str) -> None:
    frames, skipped = shown(video(kind), [Fraction(4 * index) for index in range(10)], 1, skips=True)
    assert len(frames) == 10
    assert skipped == (kind in SKIPS)


@pytest.mark.parametrize("kind", sorted(SKIPS))
def test_packets_without_references_are_those_that_libav_skips(kind: str) -> None:
    with av.open(io.BytesIO(video(kind))) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        context.thread_count, context.skip_frame = 1, "NONREF"
        is_referred_to = References(context.name, context.extradata)
        packets = [packet for packet in container.demux(stream) if packet.size]
        expected = {packet.pts for packet in packets if is_referred_to(packet)}
        decoded = {frame.pts for packet in [*packets, None] for frame in context.decode(packet)}
        assert decoded == expected
        assert 0 < len(expected) < len(packets)


def test_a_picture_that_a_higher_temporal_layer_may_refer_to_stays() -> None:
    with av.open(io.BytesIO(video("HEVC, temporal layers"))) as container:
        stream = container.streams.video[0]
        is_referred_to = References("hevc", stream.codec_context.extradata)
    packet = av.Packet(b"\0\0\1\x00\x01\x80")  # TRAIL_N of the lowest layer
    assert is_referred_to(packet)
    assert not References("hevc", b"\0\0\1\x42\x01\x01")(packet)  # parameters of one layer


@pytest.mark.parametrize("data", [b"", b"\0\0\1", b"\0\0\0\x09\x01", b"\xff" * 40, b"\0\0\1\x67\x42"])
def test_packets_that_cannot_be_read_count_as_referred_to(data: bytes) -> None:
    for extradata in (None, b"", b"\1" + b"\xff" * 30, b"\0\0\1"):
        for codec in ("h264", "hevc"):
            assert References(codec, extradata)(av.Packet(data or b"\0"))


@given(
    ticks=st.lists(st.integers(0, 400), min_size=1, max_size=60, unique=True),
    moments=st.lists(st.fractions(0, 450, max_denominator=6), min_size=1, max_size=20),
    order=st.randoms(use_true_random=False),
    durations=st.booleans(),
)
def test_what_is_nearest_stays_at_any_times_in_any_order(
    ticks: list[int], moments: list[Fraction], order: object, durations: bool
) -> None:
    ticks, moments = sorted(ticks), sorted(moments)
    frames = [Timed(tick, (later - tick) * durations) for tick, later in zip(ticks, [*ticks[1:], 500], strict=True)]
    decoded = ticks.copy()
    order.shuffle(decoded)  # type: ignore[attr-defined]
    unwanted = Unwanted(moments)
    kept = set()
    for index, tick in enumerate(decoded):
        for ahead in decoded[index : index + 3]:
            unwanted.see(ahead)
        if not unwanted(tick):
            kept.add(tick)
    some = [frame for frame in frames if frame.ticks in kept]
    assert list(nearest_in_time(some, moments, Fraction(8))) == list(nearest_in_time(frames, moments, Fraction(8)))


def test_endless_moments_take_a_bounded_memory() -> None:
    unwanted, left_out = Unwanted(Fraction(4 * index) for index in count()), 0
    unwanted.see(0)
    for tick in range(40_000):
        unwanted.see(tick + 1)
        left_out += unwanted(tick)
    assert left_out == 30_000
    assert len(unwanted._moments) < 4_000
    assert not unwanted(1)  # too long ago to tell


def test_a_time_that_lies_years_ahead_ends_skipping_and_nothing_else() -> None:
    unwanted = Unwanted(Fraction(4 * index) for index in count())
    for tick in (0, 1, 2, 3, 4, 1 << 60):
        unwanted.see(tick)
    assert unwanted(1)
    assert not unwanted(1 << 59)
    assert not unwanted(2)


@pytest.mark.parametrize("reader", ["clips", "walk"])
def test_damage_of_a_frame_left_out_is_not_seen_and_reaches_nothing(reader: str) -> None:
    data = video("B-frames")
    packet = _packet(data, wanted=False, referred_to=False)

    def read(source: bytes) -> torch.Tensor:
        if reader == "clips":
            return read_spread(source, ClipSpec(13, 4, size=64))[0].frames
        return torch.cat([clip.frames for clip in iter_clips(source, num_frames=4, frame_stride=4, size=64)])

    damaged = damage_packet(data, packet)
    assert torch.equal(read(damaged), read(data))
    with pytest.raises(VideoError, match="damaged"):  # every frame is asked for
        list(iter_clips(damaged, num_frames=4, frame_stride=1, size=64))


@pytest.mark.parametrize(("wanted", "referred_to"), [(True, False), (False, True)])
def test_damage_of_frames_that_matter_is_seen(wanted: bool, referred_to: bool) -> None:
    data = video("B-frames")
    damaged = damage_packet(data, _packet(data, wanted=wanted, referred_to=referred_to), whole=True)
    with pytest.raises(VideoError, match="damaged"):
        read_spread(damaged, ClipSpec(13, 4, size=64))
    with pytest.raises(VideoError, match="damaged"):
        list(iter_clips(damaged, num_frames=4, frame_stride=4, size=64))


def test_what_seems_damaged_only_because_frames_were_left_out_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    data, honest = video("B-frames"), VideoFile.damage_until
    expected = [clip.frames for clip in iter_clips(data, num_frames=4, frame_stride=4, size=64)]
    monkeypatch.setattr(VideoFile, "damage_until", lambda file, ticks: 0 if file.skipped else honest(file, ticks))
    walked = [clip.frames for clip in iter_clips(data, num_frames=4, frame_stride=4, size=64)]
    assert len(walked) == len(expected)
    assert all(map(torch.equal, walked, expected))
    clip = read_spread(data, ClipSpec(8, 4, size=64))[0]
    assert len(clip.frames) == 8
    assert clip.num_repeated == 0


def _packet(data: bytes, *, wanted: bool, referred_to: bool) -> int:
    """Number of a packet in the middle whose frame is (not) taken at stride 4 from the first one on."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        references = References("h264", stream.codec_context.extradata)
        packets = [packet for packet in container.demux(stream) if packet.size]
        ticks = stream.time_base / Fraction(1, 25)
        numbers = [round((packet.pts - packets[0].pts) * ticks) for packet in packets]
    fits = [
        index
        for index, packet in enumerate(packets)
        if (numbers[index] % 4 == 0) == wanted and references(packet) == referred_to and 10 < numbers[index] < 40
    ]
    return fits[0]


def test_real_videos_are_the_same(video_data: Path) -> None:
    skipped = set()
    for path in sorted((video_data / "clips").iterdir()):
        data = path.read_bytes()
        for start, stride, threads in ((3, Fraction(4), 1), (20, Fraction(17, 2), 2)):
            moments = [start + stride * index for index in range(6)]
            some, skips = shown(data, moments, threads, skips=True)
            assert some == shown(data, moments, threads, skips=False)[0], path.name
            skipped |= {path.name} if skips else set()
    assert {"bikes.mp4", "nasa_13013.mp4", "one-by-one-person-detection.mp4", "h265_video.mp4"} <= skipped


@pytest.mark.parametrize("name", assets.names())
def test_bundled_clips_are_the_same(name: str) -> None:
    data = assets.path(name).read_bytes()
    moments = [Fraction(4 * index) for index in range(8)]
    assert shown(data, moments, 1, skips=True)[0] == shown(data, moments, 1, skips=False)[0]

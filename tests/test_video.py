"""Decoding real videos of many kinds; every picture shows its own number, so the pixels say which frame was taken."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch

import rlt.assets
from rlt.errors import InvalidArgumentError, MissingDependencyError, TruncatedVideoWarning, VideoError, VideoWarning
from rlt.video import (
    VIDEO_EXTENSIONS,
    ClipPlan,
    ClipSpec,
    iter_clips,
    list_videos,
    probe,
    read_clip,
    read_clips,
    read_spread,
    read_views,
)
from rlt.video._pyav import VideoFile
from rlt.video.geometry import View
from video_factory import (
    as_frame,
    damage_packet,
    numbered_picture,
    packets_of,
    read_number,
    write_audio,
    write_video,
    yuv_frame,
)

needs_rotation_writer = pytest.mark.skipif(
    not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write display matrices"
)

QUIET_X265 = "log-level=none"
KINDS: dict[str, dict[str, object]] = {
    "h264, one long GOP with B-frames": {"container": "mp4", "options": {"g": "250", "bf": "3"}},
    "h264, short GOPs": {"container": "mp4", "options": {"g": "10", "bf": "2"}},
    "h264, open GOPs": {"container": "mp4", "options": {"g": "10", "bf": "3", "x264-params": "open-gop=1"}},
    "h264, 29.97 fps in milliseconds": {"container": "matroska", "rate": Fraction(30000, 1001)},
    "h264, transport stream": {"container": "mpegts", "options": {"g": "12"}},
    "h264, bare stream without times": {"container": "h264"},
    "h264, 10 bit": {"container": "mp4", "pix_fmt": "yuv420p10le"},
    "h264, sound first": {"container": "mp4", "audio_seconds": 2.4},
    "h264, sound longer than video": {"container": "matroska", "audio_seconds": 6.0},
    "h264, fragmented": {
        "container": "mp4",
        "options": {"g": "20"},
        "container_options": {"movflags": "frag_keyframe+empty_moov"},
    },
    "h264, first picture at 5 s": {
        "container": "matroska",
        "pts": [5000 + 40 * number for number in range(60)],
        "time_base": Fraction(1, 1000),
    },
    "hevc, open GOPs": {
        "codec": "libx265",
        "container": "mp4",
        "options": {"x265-params": f"{QUIET_X265}:keyint=20:open-gop=1", "preset": "ultrafast"},
    },
    "hevc, 10 bit": {
        "codec": "libx265",
        "container": "mp4",
        "pix_fmt": "yuv420p10le",
        "options": {"x265-params": QUIET_X265, "preset": "ultrafast"},
    },
    "av1": {
        "codec": "libsvtav1",
        "container": "matroska",
        "options": {"preset": "8", "crf": "20", "svtav1-params": "lp=1"},
    },
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp8": {"codec": "libvpx", "container": "webm", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "mpeg4 in avi": {"codec": "mpeg4", "container": "avi"},
    "mpeg4 in avi with B-frames": {"codec": "mpeg4", "container": "avi", "max_b_frames": 2},
    "h264 in avi with B-frames, whose guessed times swap": {"container": "avi", "max_b_frames": 2},
    "msmpeg4 in avi": {"codec": "msmpeg4", "container": "avi"},
    "mpeg4 in mp4 with B-frames": {"codec": "mpeg4", "container": "mp4", "max_b_frames": 2},
    "mpeg2 with B-frames": {"codec": "mpeg2video", "container": "mpegts", "max_b_frames": 2},
    "ffv1": {"codec": "ffv1", "container": "matroska"},
    "ffv1 in RGB": {"codec": "ffv1", "container": "matroska", "pix_fmt": "bgr0"},
    "motion jpeg, full range": {"codec": "mjpeg", "container": "avi", "pix_fmt": "yuvj420p"},
}


def video_bytes(num_frames: int = 60, **kind: object) -> bytes:
    buffer = io.BytesIO()
    write_video(buffer, num_frames, **{"container": "mp4", **kind})  # type: ignore[arg-type]
    return buffer.getvalue()


def numbers(clip) -> list[int]:
    return [read_number(frame.numpy()) for frame in clip.frames]


@pytest.fixture(scope="session")
def long_video(tmp_path_factory) -> Path:
    """300 frames, key frames every 30, index before the pictures."""
    path = tmp_path_factory.mktemp("video") / "long.mp4"
    write_video(path, 300, options={"g": "30", "sc_threshold": "0"}, container_options={"movflags": "faststart"})
    return path


def one_line_error(kind, call, *words) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


# Which frames


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_takes_exactly_the_frames_asked_for(kind):
    data = video_bytes(**kind)
    middle = read_clip(data, num_frames=8, frame_stride=4, size=None)
    assert numbers(middle) == list(range(15, 44, 4))
    assert middle.num_repeated == 0
    rate = Fraction(kind.get("rate", 25))
    assert middle.times.tolist() == pytest.approx([float(number / rate) for number in range(15, 44, 4)], abs=1e-3)
    late = read_clip(data, num_frames=5, frame_stride=2, size=None, start=float(48 / rate))
    assert numbers(late) == [48, 50, 52, 54, 56]
    whole = read_clip(data, num_frames=60, frame_stride=1, size=None)
    assert numbers(whole) == list(range(60))
    streamed = [
        number for clip in iter_clips(data, num_frames=8, frame_stride=1, size=None) for number in numbers(clip)
    ]
    assert streamed == [*range(60), 59, 59, 59, 59]
    assert probe(data).num_frames == 60


@pytest.mark.parametrize("start", [0, 1, 29, 30, 31, 89, 90, 211, 239])
def test_seeking_gives_the_pixels_of_decoding_everything(long_video, start):
    everything = read_clip(long_video, num_frames=300, frame_stride=1, size=(48, 80))
    clip = read_clip(long_video, num_frames=16, frame_stride=4, size=(48, 80), start=start / 25)
    assert numbers(clip) == list(range(start, start + 61, 4))
    assert torch.equal(clip.frames, everything.frames[start : start + 61 : 4])
    assert torch.equal(clip.times, everything.times[start : start + 61 : 4])


def test_frames_of_variable_rate_are_evenly_spaced_in_time():
    # 30 pictures in the first second, 5 in each of the next four.
    times = [*range(0, 990, 33), *(1000 + 200 * step for step in range(20))]
    data = video_bytes(50, pts=times, time_base=Fraction(1, 1000))
    info = probe(data)
    assert info.fps == pytest.approx(10, rel=0.15)  # the writer leaves the length of the last picture open
    clip = read_clip(data, num_frames=20, frame_stride=2, size=None, start=0)
    moments = [2 * place / info.fps for place in range(20)]
    nearest = [min(range(50), key=lambda index: abs(times[index] / 1000 - moment)) for moment in moments]
    assert numbers(clip) == nearest
    assert clip.times.tolist() == pytest.approx([times[index] / 1000 for index in nearest])
    covered = {number for clip in iter_clips(data, frame_stride=1, size=None) for number in numbers(clip)}
    assert 49 in covered


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (25, [25, 26, 27, 28, 29, 30]),
        (12.5, [25, 27, 29, 31, 33, 35]),
        (10, [25, 27, 30, 32, 35, 37]),  # 27.5 and 32.5 are ties, which go to the earlier frame
        (50, [25, 25, 26, 26, 27, 27]),
        (1.5, [25, 42, 58, 58, 58, 58]),  # 41.7 and 58.3, then the end of the video
    ],
)
def test_a_rate_of_sampling_in_frames_per_second(fps, expected):
    data = video_bytes(60)
    clip = read_clip(data, num_frames=6, fps=fps, size=None, start=1)
    assert numbers(clip) == expected
    assert clip.num_repeated == (3 if fps == 1.5 else 0)


def test_a_rate_that_a_stride_means_takes_the_same_frames():
    data = video_bytes(60, container="matroska", rate=Fraction(30000, 1001))
    rate = Fraction(30000, 1001)
    for start in (None, 0.2):
        by_stride = read_clip(data, num_frames=8, frame_stride=4, size=32, start=start)
        by_rate = read_clip(data, num_frames=8, fps=float(rate / 4), size=32, start=start)
        assert torch.equal(by_stride.frames, by_rate.frames)
        assert torch.equal(by_stride.times, by_rate.times)
    many = [read_clips(data, num_clips=3, num_frames=4, size=None, **how) for how in ({}, {"fps": float(rate / 4)})]
    assert [numbers(clip) for clip in many[0]] == [numbers(clip) for clip in many[1]]
    streams = [iter_clips(data, num_frames=4, size=None, **how) for how in ({}, {"fps": float(rate / 4)})]
    assert [numbers(clip) for clip in streams[0]] == [numbers(clip) for clip in streams[1]]


def test_a_rate_is_evenly_spaced_in_the_time_of_a_video_of_variable_rate():
    times = [*range(0, 990, 33), *(1000 + 200 * step for step in range(20))]
    data = video_bytes(50, pts=times, time_base=Fraction(1, 1000))
    expected = [min(range(50), key=lambda index: abs(times[index] / 1000 - place / 4)) for place in range(16)]
    assert numbers(read_clip(data, num_frames=16, fps=4, size=None, start=0)) == expected
    streamed = [number for clip in iter_clips(data, num_frames=4, fps=4, size=None) for number in numbers(clip)]
    assert streamed[:16] == expected
    # Above its own rate in its slow part: each picture is shown as long as it stands.
    fast = read_clip(data, num_frames=40, fps=20, size=None, start=2.0)
    assert fast.num_repeated == 0
    assert numbers(fast)[0] == 35
    assert [numbers(fast).count(number) for number in range(36, 44)] == [4] * 8


def test_clips_of_a_rate_are_spread_over_the_whole_video(long_video):
    clips = read_clips(long_video, num_clips=3, num_frames=4, fps=10, size=None)
    # A clip spans 8.5 frames, so the starts are 0, 145 and 291, rounded down; ties go to the earlier frame.
    assert [numbers(clip) for clip in clips] == [[0, 2, 5, 7], [145, 147, 150, 152], [291, 293, 296, 298]]


def test_decodes_from_the_key_frame_to_the_last_sampled_frame(long_video, monkeypatch):
    decoded = []
    decode = VideoFile.decode

    def spy(self, *arguments):
        for timed in decode(self, *arguments):
            decoded.append(read_number(timed.frame.to_ndarray(format="rgb24")))
            yield timed

    monkeypatch.setattr(VideoFile, "decode", spy)
    clip = read_clip(long_video, num_frames=4, frame_stride=5, size=(48, 80), start=100 / 25)
    assert numbers(clip) == [100, 105, 110, 115]
    assert decoded[0] == 90
    assert decoded[-1] == 115
    assert set(numbers(clip)) < set(decoded) < set(range(90, 116))  # frames that no other refers to are left out


def test_reads_only_a_part_of_the_file():
    class CountingFile(io.BytesIO):
        bytes_read = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.bytes_read += len(data)
            return data

    def noise(number: int):
        return np.random.default_rng(number).integers(0, 256, (96, 160, 3), dtype=np.uint8)

    file = CountingFile(video_bytes(200, options={"g": "10", "crf": "20", "preset": "ultrafast"}, picture=noise))
    size = len(file.getvalue())
    read_clip(file, num_frames=4, frame_stride=2, size=32)
    assert size > 1_000_000
    assert file.bytes_read < size / 3


def test_clips_are_spread_from_the_first_to_the_last_frame(long_video):
    clips = read_clips(long_video, num_clips=3, num_frames=4, frame_stride=2, size=None)
    assert [numbers(clip) for clip in clips] == [[0, 2, 4, 6], [146, 148, 150, 152], [293, 295, 297, 299]]
    middle = read_clips(long_video, num_clips=1, num_frames=4, frame_stride=2, size=None)
    assert numbers(middle[0]) == numbers(read_clip(long_video, num_frames=4, frame_stride=2, size=None))


@pytest.mark.parametrize("container", ["mp4", "avi", "h264"])
def test_several_clips_of_a_short_video_all_start_at_its_beginning(container):
    codec = "mpeg4" if container == "avi" else "libx264"
    clips = read_clips(video_bytes(20, container=container, codec=codec), num_clips=3, num_frames=8, size=None)
    assert [numbers(clip) for clip in clips] == [[0, 4, 8, 12, 16, 16, 16, 16]] * 3


def test_short_videos_repeat_their_last_frame():
    clip = read_clip(video_bytes(10), num_frames=8, frame_stride=2, size=None)
    assert numbers(clip) == [0, 2, 4, 6, 8, 8, 8, 8]
    assert clip.num_repeated == 3
    assert clip.times[-1] == clip.times[4]
    late = read_clip(video_bytes(10), num_frames=4, frame_stride=1, size=None, start=0.32)
    assert (numbers(late), late.num_repeated) == ([8, 9, 9, 9], 2)


def test_one_frame_is_a_clip_and_a_warning():
    data = video_bytes(1)
    with pytest.warns(VideoWarning, match="the video has 1 frame") as caught:
        clip = read_clip(data, num_frames=4, size=None)
    assert (numbers(clip), clip.num_repeated) == ([0, 0, 0, 0], 3)
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    for call in (
        lambda: read_clips(data, num_clips=2, num_frames=4),
        lambda: read_spread(data, ClipSpec(4)),
        lambda: read_views(data, lambda _: [ClipPlan((0, 1))]),
        lambda: list(iter_clips(data)),
    ):
        with pytest.warns(VideoWarning) as caught:
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_iterating_strides_without_gap_or_overlap(long_video):
    clips = list(iter_clips(long_video, num_frames=7, frame_stride=6, size=(48, 80)))
    expected = list(range(0, 300, 6))
    assert [number for clip in clips for number in numbers(clip)][: len(expected)] == expected
    assert [clip.num_repeated for clip in clips] == [0] * 7 + [6]


def test_iterating_can_be_left_early(long_video):
    clips = iter_clips(long_video, size=(48, 80))
    assert numbers(next(clips))[0] == 0
    clips.close()


# Sources


def test_path_text_bytes_and_file_object_are_equal(long_video):
    clip = read_clip(long_video, size=64)
    with long_video.open("rb") as file:
        file.seek(1000)
        others = [
            read_clip(str(long_video), size=64),
            read_clip(long_video.read_bytes(), size=64),
            read_clip(file, size=64),
        ]
        assert not file.closed
    assert [other.source for other in others] == [str(long_video), "<bytes>", str(long_video)]
    assert all(torch.equal(clip.frames, other.frames) and torch.equal(clip.times, other.times) for other in others)
    assert clip.frames.dtype == torch.uint8
    assert clip.times.dtype == torch.float64


@pytest.mark.parametrize("name", ["clip.txt", "clip", "a:b.mp4", "100%05d.mp4", "clip.png", "späß und so.mkv"])
def test_the_name_of_a_file_does_not_matter(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(video_bytes(20))
    assert numbers(read_clip(path, num_frames=4, frame_stride=1, size=None)) == [8, 9, 10, 11]


def test_number_of_threads_does_not_change_a_pixel(long_video):
    frames = [read_clip(long_video, size=64, num_threads=threads).frames for threads in (0, 1, 3)]
    assert torch.equal(frames[0], frames[1])
    assert torch.equal(frames[0], frames[2])


def test_the_default_one_of_two_video_streams_is_taken(tmp_path):
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as output:
        streams = [output.add_stream("mpeg4", rate=25) for _ in range(2)]
        streams[1].disposition = av.stream.Disposition.default.value
        for stream, (width, height) in zip(streams, [(80, 48), (160, 96)], strict=True):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(10):
            for stream, offset in zip(streams, (500, 0), strict=True):
                picture = speckled(number) if offset == 0 else numbered_picture(number + offset)
                frame = as_frame(picture).reformat(stream.width, stream.height, "yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    clip = read_clip(path, num_frames=4, frame_stride=1, size=None)
    assert clip.frames.shape[1:] == (96, 160, 3)
    assert numbers(clip) == [3, 4, 5, 6]


# Pixels

MATRICES = {"bt601": (0.299, 0.114, 5), "bt709": (0.2126, 0.0722, 1)}
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 40), (0, 0, 0), (255, 255, 255), (90, 90, 90)]


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full_range", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_colours_are_those_that_were_filmed(matrix, full_range, bits):
    kr, kb, number = MATRICES[matrix]
    data = video_bytes(
        len(COLOURS),
        codec="ffv1",
        container="matroska",
        pix_fmt="yuv420p" if bits == 8 else "yuv420p10le",
        colorspace=number,
        color_range=2 if full_range else 1,
        picture=lambda index: yuv_frame(COLOURS[index], kr=kr, kb=kb, full_range=full_range, bits=bits),
    )
    clip = read_clip(data, num_frames=len(COLOURS), frame_stride=1, size=48)
    expected = torch.tensor(COLOURS)[:, None, None]
    assert (clip.frames.int() - expected).abs().max() <= 2  # 8-bit Y'CbCr cannot say it more exactly


def test_a_file_that_names_no_matrix_is_read_as_bt601():
    data = video_bytes(
        len(COLOURS),
        codec="ffv1",
        container="matroska",
        picture=lambda index: yuv_frame(COLOURS[index], kr=0.299, kb=0.114, full_range=False),
    )
    clip = read_clip(data, num_frames=len(COLOURS), frame_stride=1, size=None)
    assert (clip.frames.int() - torch.tensor(COLOURS)[:, None, None]).abs().max() <= 2


def test_scaling_is_antialiased_bilinear_with_centre_crop():
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.integers(0, 256, (1, 3, 12, 20)).astype(np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (300, 500), mode="bicubic").clamp(0, 255).round()
    picture = smooth[0].permute(1, 2, 0).byte().contiguous().numpy()
    data = video_bytes(2, codec="ffv1", container="matroska", pix_fmt="bgr0", picture=lambda _: picture)
    clip = read_clip(data, num_frames=2, frame_stride=1, size=96)
    scaled = torch.nn.functional.interpolate(smooth, (96, 160), mode="bilinear", antialias=True)
    expected = scaled[0, :, :, 32:128].permute(1, 2, 0)
    difference = (clip.frames[0].float() - expected).abs()
    assert difference.mean() < 0.5
    assert difference.max() <= 2


@pytest.mark.parametrize(
    ("size", "shape"),
    [(32, (32, 32)), ((32, 48), (32, 48)), ((48, 32), (48, 32)), (None, (96, 160)), (200, (200, 200))],
)
def test_output_sizes(size, shape):
    clip = read_clip(video_bytes(8), num_frames=3, size=size)
    assert clip.frames.shape == (3, *shape, 3)


@needs_rotation_writer
@pytest.mark.parametrize("vertical_flip", [False, True])
@pytest.mark.parametrize("horizontal_flip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotated_and_mirrored_files_are_shown_upright(degrees, horizontal_flip, vertical_flip):
    colours = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
    picture = colours.repeat(48, 0).repeat(80, 1)
    data = video_bytes(4, rotation=(degrees, horizontal_flip, vertical_flip), picture=lambda _: picture)
    shown = np.rot90(colours, degrees // 90)
    shown = shown[:, ::-1] if horizontal_flip else shown
    shown = shown[::-1] if vertical_flip else shown
    clip = read_clip(data, num_frames=2, frame_stride=1, size=None)
    height, width = clip.frames.shape[1:3]
    assert (height, width) == ((96, 160) if degrees % 180 == 0 else (160, 96))
    corners = clip.frames[0][[[16], [height - 16]], [16, width - 16]]
    assert (corners > 128).equal(torch.from_numpy(shown > 128))
    cropped = read_clip(data, num_frames=2, frame_stride=1, size=64)
    assert (cropped.frames[0][[[8], [56]], [8, 56]] > 128).equal(torch.from_numpy(shown > 128))
    info = probe(data)
    assert (info.width, info.height) == (width, height)
    if not horizontal_flip and not vertical_flip:
        assert info.rotation == (360 - degrees) % 360


# What a file holds


def test_probe():
    info = probe(video_bytes(50, rate=Fraction(30000, 1001), audio_seconds=1.0))
    assert (info.source, info.codec, info.width, info.height) == ("<bytes>", "h264", 160, 96)
    assert (info.num_frames, info.rotation, info.has_audio, info.truncated) == (50, 0, True, False)
    assert info.fps == pytest.approx(29.97, abs=1e-3)
    assert info.duration == pytest.approx(50 / 29.97, abs=1e-3)


def test_list_videos(tmp_path):
    for name in ("b.mp4", "a/c.MKV", "a/d.txt", "a/.hidden/e.mp4", "readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_videos(tmp_path) == [tmp_path / "a/c.MKV", tmp_path / "b.mp4"]
    assert list_videos([tmp_path / "readme.md", str(tmp_path / "a")]) == [tmp_path / "readme.md", tmp_path / "a/c.MKV"]
    one_line_error(VideoError, lambda: list_videos([tmp_path / "none.mp4"]), "none.mp4", "no such file")
    empty = tmp_path / "a/.hidden/empty"
    empty.mkdir()
    one_line_error(VideoError, lambda: list_videos([empty]), str(empty), *VIDEO_EXTENSIONS)


@pytest.mark.parametrize("name", rlt.assets.names())
def test_bundled_clips_are_whole_and_small(name):
    path = rlt.assets.path(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_clip(path)
        assert clip.num_repeated == 0
        assert sum(len(clip.frames) - clip.num_repeated for clip in iter_clips(path, frame_stride=1, size=32)) > 80
    assert path.stat().st_size < 1_000_000
    assert f"## {name}" in (path.parent / "ATTRIBUTION.md").read_text()


def test_an_unknown_bundled_clip_is_named():
    one_line_error(InvalidArgumentError, lambda: rlt.assets.path("cat.mp4"), "cat.mp4", "traffic.mp4")


# Bad input


def test_missing_folder_empty_text_and_noise(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "words.txt").write_text("hello\n" * 100)
    (tmp_path / "words.mp4").write_text("hello\n" * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    for name, words in {
        "none.mp4": "no such file",
        ".": "is a folder",
        "empty.mp4": "0 bytes",
        "words.txt": "a text file",
        "words.mp4": "not a video",
        "noise.mp4": "not a video",
    }.items():
        path = tmp_path / name
        for call in (read_clip, probe, lambda source: list(iter_clips(source))):
            one_line_error(VideoError, lambda call=call, path=path: call(path), str(path), words)
    one_line_error(VideoError, lambda: read_clip(b""), "<bytes>", "0 bytes")
    one_line_error(VideoError, lambda: read_clip(b"no video" * 100), "<bytes>", "not a video")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "secret.mp4"
    path.write_bytes(b"x")
    path.chmod(0)
    one_line_error(VideoError, lambda: read_clip(path), str(path), "permission")


@pytest.mark.parametrize("cover", [False, True])
def test_sound_and_cover_art_are_no_video(tmp_path, cover):
    path = tmp_path / "song.mp4"
    write_audio(path, cover=cover)
    message = one_line_error(VideoError, lambda: read_clip(path), str(path), "no video stream", "audio")
    assert ("cover art" in message) == cover


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_frames": 0}, "num_frames is 0"),
        ({"frame_stride": -2}, "frame_stride is -2"),
        ({"size": 0}, "size is 0"),
        ({"start": -0.5}, "start is -0.5"),
        ({"start": float("nan")}, "start is nan"),
        ({"start": 12.0}, "start is 12 s, behind the end of the video; 0 to below 12.000 s"),
        ({"fps": 0}, "fps is 0; sampled frames per second, more than 0, are needed"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"frame_strid": 2}, "read_clip has no option 'frame_strid'; allowed are num_frames, frame_stride, fps, size"),
        ({"frame_stride": 4, "fps": 5}, "frame_stride is 4 and fps is 5; give one of them"),
        ({"frame_strid": 2}, "did you mean 'frame_stride'?"),
        ({"decoder": "opencv"}, "decoder is 'opencv'; allowed are pyav, pyav_whole, torchcodec"),
        ({"num_threads": -1}, "num_threads is -1"),
    ],
)
def test_arguments_out_of_range(long_video, arguments, words):
    one_line_error(InvalidArgumentError, lambda: read_clip(long_video, **arguments), words)


def test_other_bad_arguments(long_video):
    one_line_error(InvalidArgumentError, lambda: read_clips(long_video, num_clips=0), "num_clips is 0")
    one_line_error(InvalidArgumentError, lambda: iter_clips(long_video, num_frames=0), "num_frames is 0")
    for read in (partial(read_clips, num_clips=1), iter_clips):
        call = partial(read, long_video, frame_stride=2, fps=5)
        one_line_error(InvalidArgumentError, call, "frame_stride is 2 and fps is 5; give one of them")
    one_line_error(InvalidArgumentError, lambda: read_clip(7), "int was given")
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        one_line_error(InvalidArgumentError, lambda: read_clip(pipe), "cannot seek")


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_file_that_is_cut_off(long_video, tmp_path, container):
    data = long_video.read_bytes()
    if container == "matroska":
        data = video_bytes(300, container="matroska", options={"g": "30"})
    elif container == "avi":
        data = video_bytes(300, container="avi", codec="mpeg4")
    path = tmp_path / "cut.video"
    path.write_bytes(data[: len(data) * 3 // 5])
    assert probe(path).truncated
    with pytest.warns(TruncatedVideoWarning, match="cut off") as caught:
        clip = read_clip(path, num_frames=8, size=None, start=0.4)
    assert numbers(clip) == list(range(10, 39, 4))
    messages = [str(warning.message) for warning in caught if warning.category is TruncatedVideoWarning]
    assert [str(path) in message and "\n" not in message for message in messages] == [True]
    if container != "avi":  # whose length libav takes from the bytes that are there
        message = one_line_error(VideoError, lambda: read_clip(path), str(path), "of 300 frames", "up to 180")
        assert 90 < int(message.split("cut off, ")[1].split(" ")[0]) < 180
        one_line_error(VideoError, lambda: read_clip(path, start=10.0), str(path), "up to 299")
    with pytest.warns(TruncatedVideoWarning):
        clips = list(iter_clips(path, num_frames=10, frame_stride=1, size=None))
    found = [number for clip in clips for number in numbers(clip)[: 10 - clip.num_repeated]]
    assert found == list(range(len(found)))
    assert 90 < len(found) < 250


def test_a_file_cut_off_before_its_index(tmp_path):
    path = tmp_path / "cut.mp4"
    write_video(path, 60)
    path.write_bytes(path.read_bytes()[:-1000])
    one_line_error(VideoError, lambda: read_clip(path), str(path), "cut off", "again")


DAMAGED = {
    "h264": {"options": {"g": "30"}},
    "hevc": {"codec": "libx265", "options": {"x265-params": f"{QUIET_X265}:keyint=30"}},
    "mpeg4": {"codec": "mpeg4", "container": "avi"},
    "av1": {
        "codec": "libsvtav1",
        "container": "matroska",
        "options": {"preset": "12", "svtav1-params": "lp=1:keyint=30"},
    },
}


def speckled(number: int):
    """A picture with enough content that a packet of it has something to damage."""
    picture = numbered_picture(number).astype(np.int16)
    return (picture + np.random.default_rng(number).integers(-20, 20, picture.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["h264", "mpeg4"])
def test_a_damaged_middle_is_no_clip(tmp_path, kind):
    path = tmp_path / "damaged.video"
    path.write_bytes(damage_packet(video_bytes(150, picture=speckled, **DAMAGED[kind]), 76))
    message = one_line_error(VideoError, lambda: read_clip(path, size=32), str(path), "damaged at about", "ffmpeg")
    assert 2.5 < float(message.split("at about ")[1].split(" ")[0]) < 3.5
    before = read_clip(path, num_frames=8, frame_stride=4, size=None, start=0)
    assert numbers(before) == list(range(0, 29, 4))
    behind = read_clip(path, num_frames=8, frame_stride=2, size=None, start=5.0)
    assert numbers(behind) == list(range(125, 140, 2))
    clips = iter_clips(path, num_frames=10, frame_stride=1, size=None)
    assert numbers(next(clips)) == list(range(10))
    one_line_error(VideoError, lambda: list(clips), str(path), "damaged")


def test_damage_between_two_clips_touches_neither():
    data = damage_packet(video_bytes(150, picture=speckled, options={"g": "20", "sc_threshold": "0"}), 30)
    planned = [ClipPlan((0, 4)), ClipPlan((60, 64))]
    clips = [clip for [clip] in read_views(data, lambda _: [replace(one, views=(View(None),)) for one in planned])]
    assert [numbers(clip) for clip in clips] == [[0, 4], [60, 64]]
    spread = read_clips(data, num_clips=4, num_frames=2, size=None)
    assert [numbers(clip) for clip in spread] == [[0, 4], [48, 52], [96, 100], [145, 149]]
    one_line_error(
        VideoError, lambda: read_views(data, lambda _: [*planned, ClipPlan((28, 34))]), "damaged at about 1."
    )


@pytest.mark.parametrize("kind", ["hevc", "av1"])
def test_lost_packets_are_no_clip(kind):
    data = video_bytes(90, picture=speckled, **DAMAGED[kind])
    sizes = [size for _, size in packets_of(data)]
    for packet in sorted(range(32, 58), key=lambda packet: -sizes[packet])[:8]:
        # Noise within a slice of HEVC decodes to nonsense without a sign; a packet that is overwritten does not.
        data = damage_packet(data, packet, whole=kind == "hevc")
    one_line_error(VideoError, lambda: read_clip(data, size=32), "<bytes>", "damaged")


def test_files_are_closed_after_errors(long_video):
    for data in (
        damage_packet(video_bytes(150, picture=speckled, options={"g": "30"}), 76),
        b"no video",
        video_bytes(5)[:-900],
    ):
        file = io.BytesIO(data)
        with pytest.raises(VideoError):
            read_clip(file)
        file.close()  # BufferError or a crash if a decoder still held on to it
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else None
    for _ in range(5):
        with pytest.raises(InvalidArgumentError):
            read_clip(long_video, start=99)
        next(iter_clips(long_video, size=16)).frames.sum()
    if before is not None:
        assert len(list(Path("/proc/self/fd").iterdir())) == before


# The second decoder


def torchcodec_runs() -> bool:
    try:
        import rlt.video._torchcodec  # noqa: F401
    except MissingDependencyError:
        return False
    return True


needs_torchcodec = pytest.mark.skipif(not torchcodec_runs(), reason="torchcodec cannot be imported")


@needs_torchcodec
@pytest.mark.parametrize(
    "name", ["h264, short GOPs", "h264, 29.97 fps in milliseconds", "h264, first picture at 5 s", "hevc, 10 bit", "vp9"]
)
def test_torchcodec_takes_the_same_frames(name):
    data = video_bytes(**KINDS[name])
    for arguments in ({"start": None}, {"start": 1.56}, {"start": 1.8}):
        ours = read_clip(data, num_frames=8, frame_stride=4, size=64, **arguments)
        theirs = read_clip(data, num_frames=8, frame_stride=4, size=64, decoder="torchcodec", **arguments)
        assert torch.equal(ours.times, theirs.times)
        assert ours.num_repeated == theirs.num_repeated
        assert (ours.frames.int() - theirs.frames.int()).abs().float().mean() < 2.5


@needs_torchcodec
def test_torchcodec_reads_every_kind_of_source(long_video):
    clips = [read_clip(long_video, size=32, decoder="torchcodec")]
    clips.append(read_clip(long_video.read_bytes(), size=32, decoder="torchcodec"))
    with long_video.open("rb") as file:
        clips.append(read_clip(file, size=32, decoder="torchcodec"))
    assert all(torch.equal(clips[0].frames, clip.frames) for clip in clips)


@needs_torchcodec
@needs_rotation_writer
def test_torchcodec_turns_pictures_upright():
    turned = video_bytes(8, rotation=(90, False, False))
    assert read_clip(turned, num_frames=2, size=None, decoder="torchcodec").frames.shape == (2, 160, 96, 3)


@needs_torchcodec
def test_torchcodec_refuses_a_cut_clip(long_video):
    data = long_video.read_bytes()
    cut = data[: len(data) * 3 // 5]
    one_line_error(VideoError, lambda: read_clip(cut, decoder="torchcodec"), "<bytes>", "cut off", "of 300 frames")
    with pytest.warns(TruncatedVideoWarning):
        read_clip(cut, decoder="torchcodec", start=0, num_frames=4, size=32)


@pytest.mark.skipif(torchcodec_runs(), reason="torchcodec can be imported")
def test_without_torchcodec_the_remedy_is_named(long_video):
    one_line_error(
        MissingDependencyError,
        lambda: read_clip(long_video, decoder="torchcodec"),
        'pip install "rlt[torchcodec]"',
    )


# Real files

CLIPS = (
    "av1_video.mkv",
    "bigbuckbunny.mp4",
    "bikes.mp4",
    "bottle-detection.mp4",
    "bt709_full_range.mp4",
    "car-detection.mp4",
    "h264_10bits.mp4",
    "h265_10bits.mp4",
    "h265_video.mp4",
    "nasa_13013.mp4",
    "one-by-one-person-detection.mp4",
    "vtest.avi",
)


@pytest.mark.parametrize("name", CLIPS)
def test_real_clips_are_read_without_complaint(video_data, name):
    path = video_data / "clips" / name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = read_clip(path, num_frames=8)
    assert clip.frames.shape == (8, 224, 224, 3)
    assert clip.frames.float().std() > 5
    seconds = clip.times.diff()[: len(clip.times) - 1 - clip.num_repeated]
    assert torch.allclose(seconds, torch.full_like(seconds, 4 / probe(path).fps), atol=2e-3)


@needs_torchcodec
@pytest.mark.parametrize("name", ["car-detection.mp4", "nasa_13013.mp4", "av1_video.mkv", "bt709_full_range.mp4"])
def test_torchcodec_agrees_on_real_clips(video_data, name):
    ours = read_clip(video_data / "clips" / name, num_frames=8)
    theirs = read_clip(video_data / "clips" / name, num_frames=8, decoder="torchcodec")
    assert torch.equal(ours.times, theirs.times)
    difference = (ours.frames.int() - theirs.frames.int()).abs().float()
    assert difference.mean() < 1.5  # torchcodec's own conversion to RGB rounds down


def test_b_frames_in_avi_come_in_the_order_of_the_pictures(video_data):
    path = video_data / "ucf6/val/Archery/v_Archery_g07_c01.avi"
    clip = read_clip(path, num_frames=40, frame_stride=1, size=64, start=0)
    small = clip.frames.float()
    neighbours = (small[1:] - small[:-1]).abs().mean()
    with av.open(str(path)) as container:
        frames = sorted(container.decode(video=0), key=lambda frame: frame.pts)[:40]
    stamped = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in frames]).float()
    ordered = [torch.from_numpy(frame) for frame in clip.frames.numpy()]
    assert len(ordered) == 40
    # libav's guessed times swap neighbours: in that order the pictures jump to and fro.
    assert neighbours < (stamped[1:] - stamped[:-1]).abs().mean()

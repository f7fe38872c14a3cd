"""Small copies of videos: the same frames at the same times, in nearly the same colours."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import rlt.assets
from rlt.errors import InvalidArgumentError, VideoError
from rlt.video import iter_clips, probe, read_clip, shrink_video
from video_factory import read_number, write_video


@pytest.mark.parametrize("rate", [25, Fraction(30000, 1001), 12])
def test_a_copy_has_the_same_frames_at_the_same_times(tmp_path: Path, rate: Fraction | int) -> None:
    write_video(tmp_path / "whole.mp4", 70, rate=rate, audio_seconds=1)
    assert shrink_video(tmp_path / "whole.mp4", tmp_path / "made" / "small.mkv", short_side=48) == (80, 48)
    small, whole = probe(tmp_path / "made" / "small.mkv"), probe(tmp_path / "whole.mp4")
    assert (small.width, small.height, small.num_frames, small.has_audio) == (80, 48, whole.num_frames, False)
    assert (small.fps, small.duration) == pytest.approx((whole.fps, whole.duration), rel=1e-3)
    [clip] = iter_clips(tmp_path / "made" / "small.mkv", num_frames=70, frame_stride=1, size=None)
    assert clip.num_repeated == 0
    assert [read_number(frame.numpy()) for frame in clip.frames] == list(range(70))
    assert clip.times.tolist() == pytest.approx([number / float(rate) for number in range(70)], abs=6e-4)
    for fps in (8, 5.5):
        numbers = [
            [
                read_number(frame.numpy())
                for frame in read_clip(tmp_path / name, num_frames=9, fps=fps, size=None).frames
            ]
            for name in ("made/small.mkv", "whole.mp4")
        ]
        assert numbers[0] == numbers[1]


def test_a_clip_of_the_copy_looks_like_one_of_the_video(tmp_path: Path) -> None:
    video = rlt.assets.path()
    shrink_video(video, tmp_path / "small.mkv", short_side=144)
    clips = [read_clip(source, size=112).frames.float() for source in (video, tmp_path / "small.mkv")]
    assert (clips[0] - clips[1]).abs().mean() < 2
    assert (clips[0] - clips[1]).mean((0, 1, 2)).abs().max() < 0.3  # no shift of colours


def test_sides_are_even_and_never_grow(tmp_path: Path) -> None:
    picture = np.full((50, 94, 3), 200, np.uint8)
    write_video(tmp_path / "whole.mp4", 3, picture=lambda _: picture)
    assert shrink_video(tmp_path / "whole.mp4", tmp_path / "a.mkv", short_side=31) == (58, 32)
    assert shrink_video(tmp_path / "whole.mp4", tmp_path / "b.mkv", short_side=200) == (94, 50)
    assert torch.allclose(
        read_clip(tmp_path / "a.mkv", num_frames=2, size=None).frames.float().mean(), torch.tensor(200.0), atol=2
    )


def test_frames_of_variable_rate_keep_their_times(tmp_path: Path) -> None:
    times = [0, 40, 80, 400, 440, 480, 900]
    write_video(tmp_path / "whole.mkv", 7, container="matroska", pts=times, time_base=Fraction(1, 1000))
    shrink_video(tmp_path / "whole.mkv", tmp_path / "small.mkv", short_side=48)
    shown = {
        round(seconds * 1000): read_number(frame)
        for clip in iter_clips(tmp_path / "small.mkv", num_frames=4, frame_stride=1, size=None)
        for seconds, frame in zip(clip.times.tolist(), clip.frames.numpy(), strict=True)
    }
    assert len(shown) >= 4
    assert all(times[number] == time for time, number in shown.items())


def test_nothing_is_left_of_a_copy_that_fails(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(VideoError):
        shrink_video(tmp_path / "broken.mp4", tmp_path / "made" / "small.mkv", short_side=48)
    with pytest.raises(InvalidArgumentError, match="short_side is 1"):
        shrink_video(tmp_path / "broken.mp4", tmp_path / "made" / "small.mkv", short_side=1)
    assert not (tmp_path / "made").exists()

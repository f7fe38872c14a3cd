"""Frame choice against its definition."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt.errors import InvalidArgumentError
from rlt.video import ClipSpec
from rlt.video.sampling import clip_starts, nearest_in_time


@dataclass(frozen=True)
class Shown:
    ticks: int
    duration: int = 0


def test_span_of_the_usual_clip():
    assert ClipSpec(16, 4).span(Fraction(25)) == 61
    assert ClipSpec(1, 100).span(Fraction(25)) == 1
    assert ClipSpec(16, fps=12.5).span(Fraction(25)) == 31


@pytest.mark.parametrize(
    ("num_video_frames", "num_clips", "span", "expected"),
    [
        (300, 1, 61, [119]),
        (61, 1, 61, [0]),
        (62, 1, 61, [0]),
        (63, 1, 61, [1]),
        (10, 1, 61, [0]),
        (10, 3, 61, [0, 0, 0]),
        (100, 2, 10, [0, 90]),
        (100, 3, 10, [0, 45, 90]),
        (300, 4, 61, [0, 79, 159, 239]),
    ],
)
def test_clip_starts(num_video_frames, num_clips, span, expected):
    assert clip_starts(num_video_frames, num_clips, span) == expected


def test_places_of_a_clip():
    rate = Fraction(25)
    assert ClipSpec(4, 5).places(3, rate) == [3, 8, 13, 18]
    assert ClipSpec(1, 9).places(0, rate) == [0]
    assert ClipSpec(4, fps=10).places(3, rate) == [3, Fraction(11, 2), 8, Fraction(21, 2)]
    assert (ClipSpec().frame_stride, ClipSpec(fps=10).frame_stride) == (4, None)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ClipSpec(0, 1), "num_frames is 0"),
        (lambda: ClipSpec(1, 0), "frame_stride is 0"),
        (lambda: ClipSpec(fps=0), "fps is 0; sampled frames per second"),
        (lambda: ClipSpec(fps=float("nan")), "fps is nan"),
        (lambda: ClipSpec(16, 4, 5), "frame_stride is 4 and fps is 5; give one of them"),
        (lambda: ClipSpec(fps=8, sampling="uniform"), "fps is 8 and sampling is 'uniform'"),
        (lambda: ClipSpec(size=(224,)), "size is"),
        (lambda: ClipSpec(size=None).frame_size, "size is None"),
        (lambda: ClipSpec().spread(1, 0, Fraction(25)), "num_video_frames is 0"),
        (lambda: ClipSpec(sampling="uniform").spread(0, 9, Fraction(25)), "num_clips is 0"),
        (lambda: clip_starts(0, 1, 1), "num_video_frames is 0"),
        (lambda: clip_starts(1, -1, 1), "num_clips is -1"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 12), st.integers(1, 400))
def test_clips_lie_inside_evenly(num_video_frames, num_clips, span):
    starts = clip_starts(num_video_frames, num_clips, span)
    assert len(starts) == num_clips
    assert starts == sorted(starts)
    if num_video_frames < span:
        assert set(starts) == {0}
        return
    assert starts[0] >= 0
    assert starts[-1] + span <= num_video_frames
    gaps = {later - earlier for earlier, later in pairwise(starts)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    if num_clips == 1:  # as much room before as behind, give or take one frame
        assert 0 <= (num_video_frames - span - starts[0]) - starts[0] <= 1
    else:
        assert (starts[0], starts[-1]) == (0, num_video_frames - span)


@settings(derandomize=True, deadline=None)
@given(
    st.integers(1, 2000),
    st.integers(1, 6),
    st.integers(1, 20),
    st.floats(0.1, 120),
    st.sampled_from([Fraction(25), Fraction(30000, 1001), Fraction(10), Fraction(60)]),
)
def test_clips_of_a_rate_lie_inside_evenly(num_video_frames, num_clips, num_frames, fps, rate):
    clip = ClipSpec(num_frames, fps=fps)
    step = clip.step(rate)
    for places in clip.spread(num_clips, num_video_frames, rate):
        seconds = [place / rate for place in places]
        assert all(late - early == 1 / Fraction(str(fps)) for early, late in pairwise(seconds))
        assert places[0] >= 0
        assert places[-1] - places[0] == (num_frames - 1) * step
        assert places[-1] < num_video_frames - Fraction(1, 2) or places[0] == 0  # nearest to a frame of the video
    uniform = ClipSpec(num_frames, sampling="uniform").spread(num_clips, num_video_frames, rate)
    assert all(0 <= place < num_video_frames for places in uniform for place in places)


@settings(derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 500), min_size=1, max_size=30, unique=True).map(sorted),
    st.lists(st.fractions(0, 500, max_denominator=30), min_size=1, max_size=20).map(sorted),
)
def test_nearest_frame_against_a_search_of_all(times, moments):
    frame_ticks = Fraction(10)
    chosen = [frame.ticks for frame in nearest_in_time(map(Shown, times), moments, frame_ticks)]
    shown = [moment for moment in moments if moment < times[-1] + frame_ticks / 2]
    assert len(chosen) >= len(shown)
    for moment, ticks in zip(shown, chosen, strict=False):
        # A frame up to half a tick before the moment is the moment itself, in a container's rounding.
        assert abs(ticks - moment) <= max(min(abs(time - moment) for time in times), Fraction(1, 2))


def test_rounded_times_still_give_every_frame_once():
    rate = Fraction(30000, 1001)
    times = [round(index * 1000 / rate) for index in range(2000)]
    moments = [index * 1000 / rate for index in range(2000)]
    chosen = [frame.ticks for frame in nearest_in_time(map(Shown, times), moments, 1000 / rate)]
    assert chosen == times


def test_last_frame_holds_for_its_duration():
    frames = [Shown(0, 10), Shown(10, 35)]
    chosen = nearest_in_time(frames, (Fraction(moment) for moment in range(0, 1000, 10)), Fraction(10))
    assert [frame.ticks for frame in chosen] == [0, 10, 10, 10]


def test_reads_no_frame_beyond_an_exact_moment():
    taken = []

    def stream():
        for ticks in range(100):
            taken.append(ticks)
            yield Shown(ticks)

    assert [frame.ticks for frame in nearest_in_time(stream(), [Fraction(3), Fraction(7)], Fraction(1))] == [3, 7]
    assert taken == list(range(8))


def test_empty_stream_gives_nothing():
    assert list(nearest_in_time(iter(()), [Fraction(0)], Fraction(1))) == []

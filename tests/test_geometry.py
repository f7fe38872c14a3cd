"""Geometry of scaling and cropping against its definition."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt.errors import InvalidArgumentError
from rlt.video.geometry import View, check_size, cover, crop_offsets

SIDES = st.integers(1, 4000)


def fit(width: int, height: int, size, position=(0.5, 0.5)) -> tuple[int, int, int, int]:
    """Height and width after scaling, rows and columns cut off before the crop."""
    target = check_size(size) or (height, width)
    scaled_height, scaled_width = cover(width, height, target)
    return scaled_height, scaled_width, *crop_offsets(scaled_height - target[0], scaled_width - target[1], position)


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (1920, 1080, 224, (224, 398, 0, 87)),
        (1080, 1920, 224, (398, 224, 87, 0)),
        (320, 240, 224, (224, 298, 0, 37)),
        (768, 432, 224, (224, 398, 0, 87)),
        (480, 270, 224, (224, 398, 0, 87)),
        # Odd remainders: 75 / 2 = 37.5 and 77 / 2 = 38.5 both go to the even 38.
        (299, 224, 224, (224, 299, 0, 38)),
        (301, 224, 224, (224, 301, 0, 38)),
        (640, 360, (96, 160), (96, 170, 0, 5)),
        (100, 400, (96, 160), (640, 160, 272, 0)),
        (640, 272, None, (272, 640, 0, 0)),
        (64, 64, 224, (224, 224, 0, 0)),
    ],
)
def test_fit(width, height, size, expected):
    assert fit(width, height, size) == expected


def test_three_crops_reach_both_edges():
    lefts = [fit(1920, 1080, 224, (0.5, place))[3] for place in (0, 0.5, 1)]
    assert lefts == [0, 87, 174]


@settings(derandomize=True, deadline=None)
@given(SIDES, SIDES, st.integers(1, 600), st.integers(1, 600), st.floats(0, 1), st.floats(0, 1))
def test_frame_covers_the_crop_and_keeps_its_shape(width, height, crop_height, crop_width, down, right):
    scaled_height, scaled_width, top, left = fit(width, height, (crop_height, crop_width), (down, right))
    assert 0 <= top <= scaled_height - crop_height
    assert 0 <= left <= scaled_width - crop_width
    # One side meets the target, the other is its exact length rounded down.
    scale = max(Fraction(crop_height, height), Fraction(crop_width, width))
    assert scaled_height == int(height * scale)
    assert scaled_width == int(width * scale)


@settings(derandomize=True, deadline=None)
@given(SIDES, SIDES, st.integers(1, 600))
def test_turning_the_frame_turns_the_geometry(width, height, size):
    scaled_height, scaled_width, top, left = fit(width, height, size)
    assert fit(height, width, size) == (scaled_width, scaled_height, left, top)


@settings(derandomize=True, deadline=None)
@given(SIDES, SIDES, st.integers(1, 600))
def test_a_number_is_a_square(width, height, size):
    assert fit(width, height, size) == fit(width, height, (size, size))


@pytest.mark.parametrize("size", [0, -1, (0, 5), (5,), (5, 5, 5), 2.5, "big", (2.5, 3)])
def test_bad_sizes_are_named(size):
    with pytest.raises(InvalidArgumentError, match="size is") as caught:
        check_size(size)
    assert "\n" not in str(caught.value)


def test_bad_position_is_named():
    with pytest.raises(InvalidArgumentError, match=r"crop position is \(0.5, 1.5\)"):
        View(5, position=(0.5, 1.5))

"""Geometry of scaling and cropping against its definition."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt.errors import InvalidArgumentError
from rlt.video.geometry import CoverCrop, check_size

SIDES = st.integers(1, 4000)


@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (1920, 1080, 224, CoverCrop(224, 398, 0, 87, 224, 224)),
        (1080, 1920, 224, CoverCrop(398, 224, 87, 0, 224, 224)),
        (320, 240, 224, CoverCrop(224, 298, 0, 37, 224, 224)),
        (768, 432, 224, CoverCrop(224, 398, 0, 87, 224, 224)),
        (480, 270, 224, CoverCrop(224, 398, 0, 87, 224, 224)),
        # Odd remainders: 75 / 2 = 37.5 and 77 / 2 = 38.5 both go to the even 38.
        (299, 224, 224, CoverCrop(224, 299, 0, 38, 224, 224)),
        (301, 224, 224, CoverCrop(224, 301, 0, 38, 224, 224)),
        (640, 360, (96, 160), CoverCrop(96, 170, 0, 5, 96, 160)),
        (100, 400, (96, 160), CoverCrop(640, 160, 272, 0, 96, 160)),
        (640, 272, None, CoverCrop(272, 640, 0, 0, 272, 640)),
        (64, 64, 224, CoverCrop(224, 224, 0, 0, 224, 224)),
    ],
)
def test_fit(width, height, size, expected):
    assert CoverCrop.fit(width, height, size) == expected


def test_three_crops_reach_both_edges():
    lefts = [CoverCrop.fit(1920, 1080, 224, position=(0.5, place)).left for place in (0, 0.5, 1)]
    assert lefts == [0, 87, 174]


@settings(derandomize=True, deadline=None)
@given(SIDES, SIDES, st.integers(1, 600), st.integers(1, 600), st.floats(0, 1), st.floats(0, 1))
def test_frame_covers_the_crop_and_keeps_its_shape(width, height, crop_height, crop_width, down, right):
    crop = CoverCrop.fit(width, height, (crop_height, crop_width), position=(down, right))
    assert (crop.height, crop.width) == (crop_height, crop_width)
    assert 0 <= crop.top <= crop.scaled_height - crop_height
    assert 0 <= crop.left <= crop.scaled_width - crop_width
    # One side meets the target, the other is its exact length rounded down.
    scale = max(Fraction(crop_height, height), Fraction(crop_width, width))
    assert crop.scaled_height == int(height * scale)
    assert crop.scaled_width == int(width * scale)


@settings(derandomize=True, deadline=None)
@given(SIDES, SIDES, st.integers(1, 600))
def test_turning_the_frame_turns_the_geometry(width, height, size):
    upright = CoverCrop.fit(width, height, size)
    turned = CoverCrop.fit(height, width, size)
    assert (upright.scaled_height, upright.top) == (turned.scaled_width, turned.left)
    assert (upright.scaled_width, upright.left) == (turned.scaled_height, turned.top)


@settings(derandomize=True, deadline=None)
@given(SIDES, SIDES, st.integers(1, 600))
def test_a_number_is_a_square(width, height, size):
    assert CoverCrop.fit(width, height, size) == CoverCrop.fit(width, height, (size, size))


@pytest.mark.parametrize("size", [0, -1, (0, 5), (5,), (5, 5, 5), 2.5, "big", (2.5, 3)])
def test_bad_sizes_are_named(size):
    with pytest.raises(InvalidArgumentError, match="size is") as caught:
        check_size(size)
    assert "\n" not in str(caught.value)


def test_bad_position_is_named():
    with pytest.raises(InvalidArgumentError, match=r"crop position is \(0.5, 1.5\)"):
        CoverCrop.fit(10, 10, 5, position=(0.5, 1.5))

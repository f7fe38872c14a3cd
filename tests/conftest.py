"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def video_data() -> Path:
    """Folder with real labelled video that is not part of the project; the test skips where it is absent."""
    folder = Path(os.environ.get("RLT_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test videos in {folder}; set RLT_TEST_DATA")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """GPU tests skip without a GPU, and fail where one is required."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if os.environ.get("RLT_REQUIRE_GPU") == "1":
            pytest.fail("RLT_REQUIRE_GPU=1, but torch sees no CUDA device")
        pytest.skip("no CUDA device")

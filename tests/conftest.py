"""What holds for all tests: threads, seeds, the folder of other videos, and which tests need a GPU.

Tests run in any order and in any number of processes (`pytest -n N`), so none may count on another one: each test and
each shared fixture starts from the same seeds, and each process computes with one thread and compiles in a folder of
its own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")

NO_DATA = "RLT_TEST_DATA is not set"


def pytest_configure(config: pytest.Config) -> None:
    """One thread for every process, and hold the folder of other videos to be one.

    Sums of floats depend on the number of threads, which so is the same on every machine and beside any number of other
    processes; and threads that wait for each other on cores that are taken cost minutes.
    """
    named = os.environ.get("RLT_TEST_DATA")
    if named is not None and not Path(named).is_dir():
        raise pytest.UsageError(f"RLT_TEST_DATA is {named!r}, which is no folder; unset it to skip what needs it")
    os.environ["OMP_NUM_THREADS"] = "1"  # of commands that tests start
    torch.set_num_threads(1)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    """What a shared fixture draws is the same whichever test asks first, and that test draws what the others draw."""
    if fixturedef.scope == "function":
        return (yield)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed()
    try:
        return (yield)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@pytest.fixture(scope="session", autouse=True)
def _own_compiler_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    if hasattr(request.config, "workerinput"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture
def video_data() -> Path:
    """Folder with real labelled video that is not part of the project; the test skips where none is named."""
    if "RLT_TEST_DATA" not in os.environ:
        pytest.skip(NO_DATA)
    return Path(os.environ["RLT_TEST_DATA"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were left out for want of other videos."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if NO_DATA in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{NO_DATA}: {len(skipped)} tests of other videos were skipped", yellow=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start from fixed seeds. GPU tests skip without a GPU, and fail where one is required."""
    _seed()
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        if os.environ.get("RLT_REQUIRE_GPU") == "1":
            pytest.fail("RLT_REQUIRE_GPU=1, but torch sees no CUDA device")
        pytest.skip("no CUDA device")

"""What every measurement shares: interleaved timing, memory, and a description of the machine."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from rlt.errors import InvalidArgumentError
from rlt.tokens import Rule, Threshold, rule_options
from rlt.video import ClipSpec


@dataclass(frozen=True)
class MeasureSettings:
    """What every measurement of a network on clips can choose; each field is an option of the commands."""

    rule: Rule = Threshold()
    """Which tokens are kept."""
    clip: ClipSpec = ClipSpec()
    """Frames and size of a clip."""
    device: str = "cpu"
    """Where the network runs."""
    dtype: torch.dtype = torch.float32
    """Precision of the network: float32, bfloat16 or float16."""

    def to_json(self) -> dict[str, object]:
        """All settings as JSON values; those of rule and clip stand beside the others."""
        own = {name: value for name, value in vars(self).items() if name not in ("rule", "clip")}
        dtype = str(self.dtype).removeprefix("torch.")
        return {**own, **vars(self.clip), **rule_options(self.rule), "dtype": dtype}


@dataclass(frozen=True)
class Timing:
    """Durations of the same work, one per round."""

    seconds: tuple[float, ...]
    """Wall-clock seconds of each round."""

    @property
    def median(self) -> float:
        """Median in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Fastest and slowest round in seconds."""
        return min(self.seconds), max(self.seconds)

    def over(self, other: Timing) -> float:
        """How many times longer than `other`: median of the ratios round by round, which outlives a noisy machine."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def __add__(self, other: Timing) -> Timing:
        return Timing(tuple(a + b for a, b in zip(self.seconds, other.seconds, strict=True)))


def check_device(device: str) -> None:
    """Hold that a device can be used here: "cpu", or "cuda" with a GPU, with or without a number."""
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device is {device!r}; cpu or cuda is needed")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(f"device is {device!r}, but torch sees no GPU; use cpu")


def stopwatch(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Seconds that `work` takes, waiting for the device before and after."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def interleave(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    on_round: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time several ways to do the same work in turn (A B A B ...), so that a slow moment hits all alike.

    Round i of every `Timing` is taken in the same turn. `warmup` more rounds come first and are not counted; `device`
    is waited for before and after each run, and `on_round` called after every round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warmup + rounds):
        for name, work in arms.items():
            elapsed = stopwatch(work, device)
            if turn >= warmup:
                seconds[name].append(elapsed)
        if on_round is not None:
            on_round()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def peak_memory_bytes(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes that the tensors made by `work` held at one moment; what lay in memory before is not counted.

    On CUDA from the allocator's own counter. On the CPU from the profiler, which sees each allocation of torch's
    allocator, scratch space inside operators too, but not what other libraries allocate by themselves.
    """
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _without_native_messages(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((int(change) for _, change in changes), initial=0))


def device_waits(work: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """How often the host stops in `work` until the device is done, by torch's own count; None where it cannot wait."""
    if torch.device(device).type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)


@contextmanager
def _without_native_messages() -> Iterator[None]:
    """Send file descriptor 2 nowhere: some builds of the profiler write two lines there on every start."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def machine_info(device: torch.device | str = "cpu") -> dict[str, str | int | float]:
    """Where a number was measured: processor, cores, memory, versions, and the accelerator with its driver."""
    info: dict[str, str | int | float] = {
        "processor": _processor_name(),
        "cores": os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rlt": _version("rlt"),
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info["device"] = properties.name
        info["device_memory_gib"] = round(properties.total_memory / 2**30, 1)
        info["cuda"] = str(torch.version.cuda)
        driver = Path("/proc/driver/nvidia/version")
        info["driver"] = driver.read_text().splitlines()[0].strip() if driver.exists() else "unknown"
    return info


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _memory_gib() -> float:
    if not hasattr(os, "sysconf"):
        return 0.0
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)

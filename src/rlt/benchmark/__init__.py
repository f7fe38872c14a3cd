"""Measurements of each stage beside its peers, in one process, on real video."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rlt.benchmark.adapted import adapters_suite
from rlt.benchmark.files import decode_suite, end_to_end_suite
from rlt.benchmark.harness import OF_SUITES, Arm, BenchmarkResult, BenchmarkSettings, Rounds
from rlt.benchmark.loader import loader_suite
from rlt.benchmark.networks import forward_suite, frames_suite, train_step_suite
from rlt.benchmark.peers.flash import flash_attention
from rlt.benchmark.stages import attention_suite, embed_suite, feed_suite, tokenize_suite
from rlt.benchmark.towers import towers_suite
from rlt.checks import at_least, one_of
from rlt.errors import InvalidArgumentError
from rlt.measure import check_device

__all__ = ["SUITES", "Arm", "BenchmarkResult", "BenchmarkSettings", "run_suite"]

SUITES: dict[str, Callable[[BenchmarkSettings, Rounds], BenchmarkResult]] = {
    "tokenize": tokenize_suite,
    "feed": feed_suite,
    "embed": embed_suite,
    "attention": attention_suite,
    "forward": forward_suite,
    "train-step": train_step_suite,
    "decode": decode_suite,
    "end-to-end": end_to_end_suite,
    "frames": frames_suite,
    "adapters": adapters_suite,
    "towers": towers_suite,
    "loader": loader_suite,
}
"""What `rlt benchmark` can measure, in the order of the data path."""


def run_suite(
    name: str, settings: BenchmarkSettings, *, on_progress: Callable[[int, int, str], None] | None = None
) -> BenchmarkResult:
    """Run one suite.

    Args:
        name: one of `SUITES`.
        settings: clips and model.
        on_progress: called with (runs done, runs in all, what comes next).

    Raises:
        InvalidArgumentError: for an unknown suite, listing the known ones, or a setting out of range.
        VideoError: if a video cannot be decoded.
    """
    one_of(SUITES, suite=name)
    one_of((torch.float32, torch.bfloat16, torch.float16), dtype=settings.dtype)
    at_least(1, clips=settings.clips, rounds=settings.rounds, batches=settings.batches)
    for option, suites in OF_SUITES.items():
        if (value := getattr(settings, option)) and name not in suites:
            raise InvalidArgumentError(
                f"{option} is {value}, which the suite {name} does not read; leave it out, or run {' or '.join(suites)}"
            )
    if not settings.videos:
        raise InvalidArgumentError("no videos to take clips from; name at least one")
    check_device(settings.device)
    if settings.flash is not None and torch.device(settings.device).type != "cuda":
        raise InvalidArgumentError(f"flash is {settings.flash!r}, but device is {settings.device!r}; use cuda")
    with flash_attention(settings.flash):
        return SUITES[name](settings, Rounds(on_progress or (lambda *_: None)))

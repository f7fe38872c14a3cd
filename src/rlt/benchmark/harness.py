"""What the suites share: settings, arms that are timed in turn, and their result as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rlt.benchmark.frame_files import SUFFIX, read_clips
from rlt.errors import InvalidArgumentError
from rlt.measure import MeasureSettings, Timing, device_waits, interleave, machine_info, peak_memory_bytes
from rlt.structures import PackedTokens, PatchSpec, pack
from rlt.tokens import Rule, Threshold, tokenize_batch
from rlt.video import read_spread

OF_SUITES = {
    "compiled": ("forward", "train-step"),
    "transformers": ("forward", "train-step"),
    "workers": ("loader",),
    "batches": ("loader",),
}
"""Settings that some suites alone read."""


@dataclass(frozen=True)
class BenchmarkSettings(MeasureSettings):
    """What a suite runs on; every field is an option of `rlt benchmark`. Weights are random."""

    model: str = "vit_base"
    """Name of the model, see `rlt.list_models()`."""
    videos: tuple[Path, ...] = ()
    """Videos that the clips come from, in turn, also `.npy` files of uint8 frames [T, H, W, 3] of the clips' size; for
    the suite `loader` one manifest."""
    clips: int = 8
    """Clips that are processed together."""
    rounds: int | None = None
    """Counted runs of each arm; None takes the suite's own."""
    compiled: bool = False
    """Whether the suites `forward` and `train-step` add arms that run through `torch.compile`, and on CUDA `forward`
    arms that are replayed as CUDA graphs."""
    transformers: bool = False
    """Whether the same suites add VideoMAE of transformers, every token, with its own attention."""
    flash: str | None = None
    """Which implementation of flash attention torch's kernels run, such as "FA3" or "FA4"; None is torch's own."""
    workers: tuple[int, ...] | None = None
    """For `loader`: numbers of processes that decode; None takes 0, 1, 2, 4, ... up to one for each core."""
    batches: int | None = None
    """For `loader`: batches that each number of workers makes in a round; None takes as many as go once through the
    manifest in all rounds."""

    def to_json(self) -> dict[str, object]:
        """As `MeasureSettings.to_json`, with the names of the videos."""
        own = {key: value for key, value in super().to_json().items() if value is not None or key not in OF_SUITES}
        return {**own, "videos": [path.name for path in self.videos]}


@dataclass(frozen=True)
class Arm:
    """One way to do the work of a suite."""

    name: str
    """"dense" every token, "rlt", "random" as many tokens as RLT, "tome" merging at RLT's FLOPs, "reference" the plain
    float32 way, "padded" padding and a mask, "ideal" the dense time times the ratio of FLOPs; others say themselves."""
    tokens_kept: float = 1.0
    """Share of the tokens that this arm keeps, 0..1."""
    flops: int | None = None
    """Counted FLOPs of one run, where they are most of the work."""
    details: dict[str, object] = field(default_factory=dict)
    """What else tells this arm from the others."""
    timing: Timing = Timing(())
    """Of its rounds; empty before they are run."""
    peak_memory_bytes: int | None = None
    """See `rlt.measure.peak_memory_bytes`; None for an arm that was not run."""
    device_waits: int | None = None
    """See `rlt.measure.device_waits`; None on the CPU and for an arm that was not run."""

    def to_json(self) -> dict[str, object]:
        """Times in seconds, spread as (fastest, slowest)."""
        return {
            "name": self.name,
            "seconds_median": self.timing.median,
            "seconds_spread": self.timing.spread,
            "tokens_kept": self.tokens_kept,
            "flops": self.flops,
            "peak_memory_bytes": self.peak_memory_bytes,
            "device_waits": self.device_waits,
            **self.details,
        }


Work = tuple[Arm, Callable[[], object]]
"""An arm that is not measured yet, and what does its work once."""


@dataclass(frozen=True)
class BenchmarkResult:
    """What a suite measured."""

    suite: str
    settings: BenchmarkSettings
    arms: list[Arm]
    compared_with: str = "dense"
    """The arm that the speed-ups of the others refer to."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """Further numbers of the suite, by name."""

    def arm(self, name: str) -> Arm:
        """The first arm of this name; an `InvalidArgumentError` if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise InvalidArgumentError(f"no arm {name!r}; there are {', '.join(arm.name for arm in self.arms)}")

    def speedup(self, arm: Arm) -> float | None:
        """How many times faster than the arm compared with: median of the ratios round by round.

        Where there are several such arms, the one of the same details counts; None if there is none.
        """
        others = [other for other in self.arms if other.name == self.compared_with]
        alike = others if len(others) == 1 else [other for other in others if other.details == arm.details]
        return alike[0].timing.over(arm.timing) if alike else None

    def to_json(self) -> dict[str, object]:
        """All numbers as JSON values."""
        return {
            "suite": self.suite,
            "compared_with": self.compared_with,
            **self.extra,
            "arms": [{**arm.to_json(), "speedup": self.speedup(arm)} for arm in self.arms],
            "settings": self.settings.to_json(),
            "machine": machine_info(self.settings.device),
        }


@dataclass
class Rounds:
    """Runs arms in turn and reports progress."""

    tell: Callable[[int, int, str], None] = lambda *_: None
    """Called with (arms run, arms to run, name of the next one)."""

    def measure(self, works: Sequence[Work], rounds: int, device: str, *, gradients: bool = False) -> list[Arm]:
        """Time all arms in turn, without `gradients` in inference mode; names may repeat.

        The first run of each is not counted and tells its peak of memory instead; on CUDA a second tells its waits.
        """
        total, done = len(works) * (rounds + 1), 0
        peaks: list[int] = []
        waits: list[int | None] = []

        def on_round() -> None:
            nonlocal done
            done += len(works)
            self.tell(done, total, "measuring")

        with torch.inference_mode(not gradients):
            for arm, run in works:
                self.tell(done, total, f"memory of {arm.name}")
                peaks.append(peak_memory_bytes(run, device))
                waits.append(device_waits(run, device))
                done += 1
            numbered = {f"{number} {arm.name}": run for number, (arm, run) in enumerate(works)}
            timings = interleave(numbered, rounds=rounds, warmup=0, device=device, on_round=on_round)
        return [
            replace(arm, timing=timing, peak_memory_bytes=peak, device_waits=waited)
            for (arm, _), timing, peak, waited in zip(works, timings.values(), peaks, waits, strict=True)
        ]


def read_frames(settings: BenchmarkSettings) -> Tensor:
    """uint8 [clips, T, H, W, 3], spread over the videos in turn."""
    frames = []
    for position, path in enumerate(settings.videos):
        share = len(range(position, settings.clips, len(settings.videos)))
        if share:
            if path.suffix == SUFFIX:
                frames += read_clips(path, settings.clip, share)
            else:
                frames += [clip.frames for clip in read_spread(path, settings.clip, share)]
    return torch.stack(frames)


def packed_by(rule: Rule, frames: Tensor, settings: BenchmarkSettings, spec: PatchSpec = PatchSpec()) -> PackedTokens:
    """The tokens of all clips that a rule keeps, on the device of the settings."""
    return pack(tokenize_batch(frames, rule, spec)).to(settings.device)


def normalised_pixels(frames: Tensor, spec: PatchSpec) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float32 [B, T, 3, H, W], as the processor of a model gives them."""
    mean_311, std_311 = (torch.tensor(channel).view(3, 1, 1) for channel in (spec.mean, spec.std))
    return (frames.permute(0, 1, 4, 2, 3) / 255 - mean_311) / std_311


def run_each(network: Callable[[PackedTokens], Tensor], packs: Iterable[PackedTokens]) -> None:
    """A forward pass over one pack after the other; no result is kept."""
    for packed in packs:
        network(packed)


def threshold_of(rule: Rule) -> float:
    """The threshold that the plain float32 way is given too, which knows no other rule."""
    if not isinstance(rule, Threshold) or rule != Threshold(rule.threshold):
        raise InvalidArgumentError(f"rule is {rule}; this suite compares with the paper's rule: use --threshold alone")
    return rule.threshold

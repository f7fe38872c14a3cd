"""The suites of `rlt benchmark`: what is timed beside what, on the same real clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rlt.benchmark.reference import reference_tokenize
from rlt.errors import InvalidArgumentError
from rlt.measure import Timing, count_forward_flops, interleave, machine_info
from rlt.models import create_model
from rlt.nn.embedding import PatchEmbedding
from rlt.packing import pack
from rlt.structures import RunLengthTokens
from rlt.tokens import IMAGENET_MEAN, IMAGENET_STD, tokenize_batch
from rlt.video import read_clips


@dataclass(frozen=True)
class BenchmarkSettings:
    """What a suite runs on; every field is an option of `rlt benchmark`."""

    videos: tuple[Path, ...]
    """Videos that the clips come from, in turn."""
    model: str = "vit_base"
    """Name of the model, see `rlt.list_models()`; its weights are random."""
    clips: int = 8
    """Clips that are processed together."""
    threshold: float = 0.1
    """See `rlt.keep_mask`."""
    num_frames: int = 16
    """Frames per clip."""
    frame_stride: int = 4
    """Distance of sampled frames in frames of the video."""
    size: int = 224
    """Height and width in pixels."""
    rounds: int | None = None
    """Counted runs of each arm; None takes the suite's own."""


@dataclass(frozen=True)
class Arm:
    """One way to do the work of a suite."""

    name: str
    """"reference" is the plain way that others are compared with, "dense" the network with every token."""
    timing: Timing
    tokens_kept: float
    """Share of the tokens that this arm keeps, 0..1."""
    flops: int | None = None
    """Counted FLOPs of one run, where they are most of the work."""

    def to_json(self) -> dict[str, object]:
        """Times in seconds, spread as (fastest, slowest)."""
        return {
            "name": self.name,
            "seconds_median": self.timing.median,
            "seconds_spread": self.timing.spread,
            "tokens_kept": self.tokens_kept,
            "flops": self.flops,
        }


@dataclass(frozen=True)
class BenchmarkResult:
    """What a suite measured."""

    suite: str
    settings: BenchmarkSettings
    arms: list[Arm]
    """The first is the one that the others are compared with."""
    extra: dict[str, float] = field(default_factory=dict)
    """Further numbers of the suite, by name."""

    @property
    def speedup(self) -> float:
        """Time of the first arm over that of "rlt": median of the ratios round by round."""
        return self.arms[0].timing.over(next(arm for arm in self.arms if arm.name == "rlt").timing)

    def to_json(self) -> dict[str, object]:
        """All numbers as JSON values."""
        settings = {**vars(self.settings), "videos": [path.name for path in self.settings.videos]}
        return {
            "suite": self.suite,
            "speedup": self.speedup,
            **self.extra,
            "arms": [arm.to_json() for arm in self.arms],
            "settings": settings,
            "machine": machine_info(),
        }


def run_suite(
    name: str, settings: BenchmarkSettings, *, on_progress: Callable[[int, int], None] | None = None
) -> BenchmarkResult:
    """Run one suite.

    Args:
        name: one of `SUITES`.
        settings: clips and model.
        on_progress: called with (rounds done, rounds in all).

    Raises:
        InvalidArgumentError: for an unknown suite, listing the known ones.
        VideoError: if a video cannot be decoded.
    """
    if name not in SUITES:
        raise InvalidArgumentError(f"suite is {name!r}; allowed are {', '.join(SUITES)}")
    for field_name in ("clips", "rounds"):
        value = getattr(settings, field_name)
        if value is not None and value < 1:
            raise InvalidArgumentError(f"{field_name} is {value}; at least 1 is needed")
    return SUITES[name](settings, _Rounds(on_progress))


@dataclass
class _Rounds:
    """Runs arms in turn and reports progress."""

    on_progress: Callable[[int, int], None] | None

    def run(self, arms: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
        done = 0
        warmup = 1

        def on_round() -> None:
            nonlocal done
            done += 1
            if self.on_progress is not None:
                self.on_progress(done, rounds + warmup)

        with torch.inference_mode():
            return interleave(arms, rounds=rounds, warmup=warmup, on_round=on_round)


def tokenize_suite(settings: BenchmarkSettings, rounds: _Rounds) -> BenchmarkResult:
    """Frames -> kept patches: the plain float32 way ("reference") beside `rlt.tokenize` ("rlt")."""
    frames = _read_frames(settings)
    _, mask = reference_tokenize(frames, threshold=settings.threshold)
    tokens = _tokens(frames, settings)
    differing = sum(int((clip.mask() != mask_clip).sum()) for clip, mask_clip in zip(tokens, mask, strict=True))
    timings = rounds.run(
        {
            "reference": lambda: reference_tokenize(frames, threshold=settings.threshold),
            "rlt": lambda: _tokens(frames, settings),
        },
        settings.rounds or 15,
    )
    kept = _kept(tokens)
    arms = [Arm("reference", timings["reference"], float(mask.float().mean())), Arm("rlt", timings["rlt"], kept)]
    return BenchmarkResult("tokenize", settings, arms, {"mask_entries_that_differ": differing})


def embed_suite(settings: BenchmarkSettings, rounds: _Rounds) -> BenchmarkResult:
    """Kept patches -> [tokens, width]: `Conv3d` on normalised patches ("reference") beside `PatchEmbedding` ("rlt")."""
    frames = _read_frames(settings)
    patches_float, _ = reference_tokenize(frames, threshold=settings.threshold)
    tokens = _tokens(frames, settings)
    packed = pack(tokens)
    width = create_model(settings.model).config.width
    embedding = PatchEmbedding(width, tubelet_size=2, patch_size=16, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    convolution = nn.Conv3d(3, width, (2, 16, 16), (2, 16, 16))
    with torch.no_grad():
        convolution.weight.copy_(embedding.weight.unflatten(1, (2, 16, 16, 3)).permute(0, 4, 1, 2, 3))
        convolution.bias.copy_(embedding.bias)  # type: ignore[union-attr]
        error = (convolution(patches_float).flatten(1) - embedding(packed.patches)).abs().max()
    timings = rounds.run(
        {
            "reference": lambda: convolution(patches_float).flatten(1),
            "rlt": lambda: embedding(packed.patches),
        },
        settings.rounds or 9,
    )
    flops = 2 * packed.num_tokens * packed.patches.shape[1] * width
    arms = [Arm(name, timing, _kept(tokens), flops) for name, timing in timings.items()]
    return BenchmarkResult("embed", settings, arms, {"largest_difference": float(error)})


def forward_suite(settings: BenchmarkSettings, rounds: _Rounds) -> BenchmarkResult:
    """Tokens -> logits: all tokens ("dense") beside the kept ones ("rlt"), packed either way.

    Packed attention runs clip by clip, so that the dense arm loses nothing to the cache as a dense batch would.
    """
    frames = _read_frames(settings)
    model = create_model(settings.model)
    packed = {
        "dense": pack(tokenize_batch(frames, policy="none", patch_size=model.config.patch_size)),
        "rlt": pack(_tokens(frames, settings, model.config.patch_size)),
    }
    timings = rounds.run({name: partial(model, tokens) for name, tokens in packed.items()}, settings.rounds or 5)
    flops = {name: count_forward_flops(model.config, tokens) for name, tokens in packed.items()}
    arms = [
        Arm(name, timings[name], tokens.num_tokens / packed["dense"].num_tokens, flops[name])
        for name, tokens in packed.items()
    ]
    flop_ratio = flops["rlt"] / flops["dense"]
    time_ratio = timings["rlt"].over(timings["dense"])
    extra = {"flop_ratio": flop_ratio, "time_ratio": time_ratio, "time_ratio_over_flop_ratio": time_ratio / flop_ratio}
    return BenchmarkResult("forward", settings, arms, extra)


SUITES: dict[str, Callable[[BenchmarkSettings, _Rounds], BenchmarkResult]] = {
    "tokenize": tokenize_suite,
    "embed": embed_suite,
    "forward": forward_suite,
}
"""What `rlt benchmark` can measure."""


def _read_frames(settings: BenchmarkSettings) -> Tensor:
    """uint8 [clips, T, H, W, 3], spread over the videos in turn."""
    if not settings.videos:
        raise InvalidArgumentError("no videos to take clips from; name at least one")
    frames = []
    for position, path in enumerate(settings.videos):
        share = len(range(position, settings.clips, len(settings.videos)))
        if share:
            clips = read_clips(
                path,
                num_clips=share,
                num_frames=settings.num_frames,
                frame_stride=settings.frame_stride,
                size=settings.size,
            )
            frames += [clip.frames for clip in clips]
    return torch.stack(frames)


def _tokens(frames: Tensor, settings: BenchmarkSettings, patch_size: int = 16) -> list[RunLengthTokens]:
    return tokenize_batch(frames, threshold=settings.threshold, patch_size=patch_size)


def _kept(tokens: list[RunLengthTokens]) -> float:
    return sum(len(clip) for clip in tokens) / sum(clip.grid.num_tokens for clip in tokens)

"""The main job: the same clips through the same network, dense and with run-length tokenization, side by side."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlt.checkpoints import create_model, model_config
from rlt.checks import at_least, one_of
from rlt.errors import TruncatedVideoWarning, VideoError
from rlt.measure import MeasureSettings, Timing, check_device, interleave, machine_info
from rlt.network.attention import choose_backend
from rlt.network.flops import count_forward_flops
from rlt.network.vit import VisionTransformer
from rlt.structures import Clip, PackedTokens
from rlt.tokens import Everything
from rlt.video import DECODERS, probe, read_spread, require_motion

Arm = Literal["dense", "rlt"]
"""The two ways that are compared: all tokens, or only those that run-length tokenization keeps."""

ARMS: tuple[Arm, ...] = ("dense", "rlt")
_RATIOS = ("tokens_kept", "speedup_forward", "speedup_end_to_end", "speedup_flops", "top1_agreement", "feature_cosine")


@dataclass(frozen=True)
class CompareSettings(MeasureSettings):
    """What is compared; every field is an option of `rlt compare`."""

    checkpoint: str | None = None
    """Weights: a file, a folder or a hub id. None takes random weights."""
    num_clips: int = 1
    """Clips per video, spread evenly."""
    decoder: str = "pyav"
    """See `rlt.read_clip`."""
    run_lengths: str | None = None
    """Where run lengths count, see `rlt.network.run_lengths`; None as the checkpoint says."""
    repeats: int | None = None
    """Counted runs of everything; None takes 5 for one clip and fewer for many, at least 2."""


@dataclass(frozen=True)
class VideoComparison:
    """What came out for one video."""

    source: str
    """Path of the video."""
    tokens: dict[Arm, int]
    """Tokens of all its clips."""
    flops: dict[Arm, int]
    """FLOPs of the forward pass over all its clips."""
    seconds: dict[str, Timing]
    """Per stage: "decode", "tokenize_dense", "tokenize_rlt", "forward_dense", "forward_rlt"."""
    probabilities: dict[Arm, Tensor]
    """float32 [clips, classes]."""
    feature_cosine: list[float]
    """Cosine of the pooled features of both arms, per clip, -1..1."""
    clip_starts: list[float]
    """Time of the first frame of each clip in seconds."""

    @property
    def num_clips(self) -> int:
        """Clips of the video."""
        return len(self.clip_starts)

    @property
    def tokens_kept(self) -> float:
        """Share of the tokens that is kept, above 0 and up to 1."""
        return self.tokens["rlt"] / self.tokens["dense"]

    @property
    def same_top1(self) -> list[bool]:
        """Per clip, whether both arms put the same class first."""
        dense, rlt = (self.probabilities[arm].argmax(1) for arm in ARMS)
        return (dense == rlt).tolist()

    def top(self, arm: Arm, count: int = 5) -> list[list[tuple[int, float]]]:
        """Per clip, the classes with the highest probabilities: (class, probability)."""
        best = self.probabilities[arm].topk(min(count, self.probabilities[arm].shape[1]))
        clips = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [list(zip(classes, values, strict=True)) for classes, values in clips]

    def to_json(self, label: Callable[[int], str | None]) -> dict[str, object]:
        """All numbers but tokens, FLOPs and seconds, which count over all videos; classes with the names of `label`."""

        def named(clip: list[tuple[int, float]]) -> list[dict[str, object]]:
            return [{"class": index, "label": label(index), "probability": value} for index, value in clip]

        own = {
            name: getattr(self, name)
            for name in ("source", "clip_starts", "tokens_kept", "same_top1", "feature_cosine")
        }
        return {**own, "top5": {arm: [named(clip) for clip in self.top(arm)] for arm in ARMS}}


@dataclass(frozen=True)
class Comparison:
    """Everything that `rlt compare` shows, over all videos."""

    settings: CompareSettings
    videos: list[VideoComparison]
    labels: tuple[str, ...]
    """Class names, empty if not known or if the weights are random."""
    repeats: int
    attention: str
    """The attention back end that ran."""
    run_lengths: str
    """Where run lengths counted."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """Videos that could not be processed: (source, error)."""

    @property
    def num_clips(self) -> int:
        """Clips of all videos."""
        return sum(video.num_clips for video in self.videos)

    def seconds(self, stage: str) -> Timing:
        """Time of one stage over all videos, round by round."""
        rounds = zip(*(video.seconds[stage].seconds for video in self.videos), strict=True)
        return Timing(tuple(sum(seconds) for seconds in rounds))

    def end_to_end(self, arm: Arm) -> Timing:
        """Time from file to logits over all videos."""
        return self.seconds("decode") + self.seconds(f"tokenize_{arm}") + self.seconds(f"forward_{arm}")

    def total_tokens(self, arm: Arm) -> int:
        """Tokens of all videos."""
        return sum(video.tokens[arm] for video in self.videos)

    def total_flops(self, arm: Arm) -> int:
        """FLOPs of the forward passes over all videos."""
        return sum(video.flops[arm] for video in self.videos)

    @property
    def tokens_kept(self) -> float:
        """Share of the tokens that is kept, above 0 and up to 1."""
        return self.total_tokens("rlt") / self.total_tokens("dense")

    @property
    def speedup_forward(self) -> float:
        """Time of the dense forward pass over that with RLT."""
        return self.seconds("forward_dense").over(self.seconds("forward_rlt"))

    @property
    def speedup_end_to_end(self) -> float:
        """Time from file to logits, dense over RLT."""
        return self.end_to_end("dense").over(self.end_to_end("rlt"))

    @property
    def speedup_flops(self) -> float:
        """The speed-up of the forward pass that the FLOPs would allow."""
        return self.total_flops("dense") / self.total_flops("rlt")

    @property
    def top1_agreement(self) -> float:
        """Share of the clips for which both arms put the same class first."""
        return statistics.fmean(same for video in self.videos for same in video.same_top1)

    @property
    def feature_cosine(self) -> float:
        """Mean cosine of the pooled features of both arms."""
        return statistics.fmean(cosine for video in self.videos for cosine in video.feature_cosine)

    def to_json(self) -> dict[str, object]:
        """All numbers as JSON values; fractions are 0..1, times in seconds."""
        timings = {stage: self.seconds(stage) for stage in self.videos[0].seconds}
        timings |= {f"end_to_end_{arm}": self.end_to_end(arm) for arm in ARMS}
        used = {name: getattr(self, name) for name in ("repeats", "attention", "run_lengths")}
        return {
            **{name: getattr(self, name) for name in _RATIOS},
            "weights": self.settings.checkpoint or "random",
            "machine": machine_info(self.settings.device),
            "settings": {**self.settings.to_json(), **used},
            "tokens": {arm: self.total_tokens(arm) for arm in ARMS},
            "flops": {arm: self.total_flops(arm) for arm in ARMS},
            "seconds": {stage: {"median": timing.median, "spread": timing.spread} for stage, timing in timings.items()},
            "videos": [video.to_json(self.label) for video in self.videos],
            "failed": [{"source": source, "error": error} for source, error in self.failed],
        }

    def label(self, index: int) -> str | None:
        """Name of a class, None where it is not known."""
        return self.labels[index] if self.labels else None


def compare(
    sources: Sequence[str | Path],
    settings: CompareSettings,
    *,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Comparison:
    """Run every video through the model, dense and with RLT in turn, and measure each stage.

    A video that cannot be processed is noted in `failed` and the others go on, unless it is the only one or none could
    be processed: then there is a VideoError. `on_progress` is called with (steps done, steps in all, name of a video).
    """
    # What cannot work is found before anything slow starts.
    at_least(1, num_clips=settings.num_clips, repeats=settings.repeats)
    one_of(DECODERS, decoder=settings.decoder)
    check_device(settings.device)
    patches = model_config(settings.model).patches
    if settings.clip.size is not None:
        patches.grid((settings.clip.num_frames, *settings.clip.frame_size, 3))
    repeats = settings.repeats or min(5, max(2, -(-8 // (len(sources) * settings.num_clips))))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # random weights are the same ones every time
        model = create_model(settings.model, checkpoint=settings.checkpoint).to(settings.device, settings.dtype)
    model.run_lengths = settings.run_lengths or model.run_lengths
    steps_per_video = 2 + repeats  # decode and count, warm-up, counted rounds
    videos: list[VideoComparison] = []
    failed: list[tuple[str, str]] = []
    for position, source in enumerate(sources):
        step = position * steps_per_video

        def advance(steps: int, step: int = step, source: str | Path = source) -> None:
            if on_progress is not None:
                on_progress(step + steps, len(sources) * steps_per_video, Path(source).name)

        advance(0)
        try:
            with warnings.catch_warnings():
                # A clip may be whole though its file is cut off; for a measurement the file is still a bad one.
                warnings.simplefilter("error", TruncatedVideoWarning)
                videos.append(_compare_video(source, model, settings, repeats, advance, warmup=int(not videos)))
        except (VideoError, TruncatedVideoWarning) as error:
            if len(sources) == 1:
                raise VideoError(str(error)) from error
            failed.append((str(source), str(error)))
        advance(steps_per_video)
    if not videos:
        raise VideoError(f"none of {len(sources)} videos could be processed; the first: {failed[0][1]}")
    attention = model.attention_backend or choose_backend(settings.device, settings.dtype)
    labels = model.config.labels if settings.checkpoint else ()
    return Comparison(settings, videos, labels, repeats, attention, model.run_lengths, failed)


def _compare_video(
    source: str | Path,
    model: VisionTransformer,
    settings: CompareSettings,
    repeats: int,
    advance: Callable[[int], None],
    *,
    warmup: int,
) -> VideoComparison:
    require_motion(probe(source))

    def decode() -> list[Clip]:
        return read_spread(source, settings.clip, settings.num_clips, decoder=settings.decoder)

    clips = decode()
    frames = torch.stack([clip.frames for clip in clips])
    packed = {arm: _tokenize(frames, arm, model, settings) for arm in ARMS}
    steps = count(1)

    def on_round() -> None:
        advance(next(steps))

    on_round()
    with torch.inference_mode():
        # The network dominates; file and tokens are quick, so that they are timed in rounds of their own.
        stages: dict[str, Callable[[], object]] = {"decode": decode}
        for arm in ARMS:
            stages[f"tokenize_{arm}"] = partial(_tokenize, frames, arm, model, settings)
        seconds = interleave(stages, rounds=repeats, device=settings.device)
        outputs: dict[Arm, tuple[Tensor, Tensor]] = {}

        def forward(arm: Arm) -> None:
            features = model.forward_features(packed[arm])
            outputs[arm] = (features, model.head(features))

        stages = {f"forward_{arm}": partial(forward, arm) for arm in ARMS}
        seconds |= interleave(stages, rounds=repeats, warmup=warmup, device=settings.device, on_round=on_round)
    cosine = torch.cosine_similarity(outputs["dense"][0].float(), outputs["rlt"][0].float(), dim=1)
    return VideoComparison(
        source=str(source),
        tokens={arm: tokens.num_tokens for arm, tokens in packed.items()},
        flops={arm: count_forward_flops(model.config, tokens) for arm, tokens in packed.items()},
        seconds=seconds,
        probabilities={arm: logits.float().softmax(1).cpu() for arm, (_, logits) in outputs.items()},
        feature_cosine=cosine.tolist(),
        clip_starts=[float(clip.times[0]) for clip in clips],
    )


def _tokenize(frames: Tensor, arm: Arm, model: VisionTransformer, settings: CompareSettings) -> PackedTokens:
    """Tokens on the device of the network, which is also where they are found."""
    return model.tokenize(frames.to(settings.device), rule=Everything() if arm == "dense" else settings.rule)

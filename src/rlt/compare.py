"""The main job: the same clips through the same network, dense and with run-length tokenization, side by side.

Further arms look at more frames of the same moments, which is what saved tokens can be spent on.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from rlt.checkpoints.models import size_name
from rlt.checks import at_least, one_of
from rlt.errors import InvalidArgumentError, TruncatedVideoWarning, VideoError
from rlt.loading import is_size, load_model, named, stored_config
from rlt.measure import MeasureSettings, Timing, check_device, interleave, machine_info
from rlt.network.attention import choose_backend
from rlt.network.flops import count_forward_flops
from rlt.network.vit import VisionTransformer, ViTConfig
from rlt.structures import Clip, PackedTokens
from rlt.tokens import Everything, Rule
from rlt.video import DECODERS, ClipSpec, probe, read_spread, require_motion

ARMS = ("dense", "rlt")
"""The two ways that are always compared: all tokens, or only those that run-length tokenization keeps. Further ones are
called after their frames, such as "rlt_32"."""
_OF_VIDEO = ("source", "clip_starts", "tokens_kept", "flops_saved", "speedup_forward", "same_top1", "feature_cosine")
_RATIOS = ("tokens_kept", "speedup_forward", "speedup_end_to_end", "speedup_flops", "top1_agreement", "feature_cosine")


class Arm(NamedTuple):
    """What goes through the network."""

    clip: ClipSpec
    rule: Rule


@dataclass(frozen=True)
class CompareSettings(MeasureSettings):
    """What is compared; every field is an option of `rlt compare`."""

    model: str | None = None
    """Size of the network, see `rlt.list_models()`; None is that of the checkpoint, and "vit_base" without one. Or, in
    the place of `checkpoint`, what that is."""
    checkpoint: str | None = None
    """Weights: the folder of a run, a file, a folder or a hub id. None takes random weights."""
    num_clips: int = 1
    """Clips per video, spread evenly."""
    decoder: str = "pyav"
    """See `rlt.read_clip`."""
    run_lengths: str | None = None
    """Where run lengths count, see `rlt.network.run_lengths`; None as the checkpoint says."""
    repeats: int | None = None
    """Counted runs of everything; None takes 5 for one clip and fewer for many, at least 2."""
    more_frames: tuple[int, ...] = ()
    """For each number an arm with so many times as many frames of the same span of time, under the same rule. With
    `Budget(max_tokens=...)` all of them cost the same."""

    @property
    def arms(self) -> dict[str, Arm]:
        """What is compared, by name: "dense", "rlt", and those with more frames.

        Raises:
            InvalidArgumentError: if frames cannot lie so much closer.
        """
        closer = [_same_span(self.clip, times) for times in self.more_frames]
        more = {f"rlt_{clip.num_frames}": Arm(clip, self.rule) for clip in closer}
        return {"dense": Arm(self.clip, Everything()), "rlt": Arm(self.clip, self.rule), **more}

    @override
    def to_json(self) -> dict[str, object]:
        found = super().to_json()
        return found if self.more_frames else {key: value for key, value in found.items() if key != "more_frames"}


def _same_span(clip: ClipSpec, times: int) -> ClipSpec:
    """The clip with so many times as many frames, as much closer to each other."""
    at_least(1, more_frames=times)
    frames = clip.num_frames * times
    if clip.sampling == "uniform":
        return replace(clip, num_frames=frames)
    if clip.fps is not None:
        return replace(clip, num_frames=frames, fps=clip.fps * times)
    assert clip.frame_stride is not None  # one of both is set
    if clip.frame_stride % times:
        raise InvalidArgumentError(
            f"frame_stride is {clip.frame_stride}; {times} times as many frames of the same span need a multiple of "
            f"{times}, or fps"
        )
    return replace(clip, num_frames=frames, frame_stride=clip.frame_stride // times)


@dataclass(frozen=True)
class VideoComparison:
    """What came out for one video."""

    source: str
    """Path of the video."""
    tokens: dict[str, int]
    """Tokens of all its clips."""
    flops: dict[str, int]
    """FLOPs of the forward pass over all its clips."""
    seconds: dict[str, Timing]
    """Per stage: "decode", "tokenize_dense", "tokenize_rlt", "forward_dense", "forward_rlt"; of an arm with more frames
    "decode_", "tokenize_" and "forward_" with its name."""
    probabilities: dict[str, Tensor]
    """float32 [clips, classes]."""
    cosines: dict[str, list[float]]
    """Cosine of the pooled features of every other arm and the dense one, per clip, -1..1."""
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
    def flops_saved(self) -> float:
        """Share of the dense forward pass's FLOPs that is not needed, 0..1."""
        return 1 - self.flops["rlt"] / self.flops["dense"]

    @property
    def speedup_forward(self) -> float:
        """Time of the dense forward pass over that with RLT."""
        return self.seconds["forward_dense"].over(self.seconds["forward_rlt"])

    @property
    def same_top1(self) -> list[bool]:
        """Per clip, whether dense and RLT put the same class first."""
        return self.same_as_dense("rlt")

    @property
    def feature_cosine(self) -> list[float]:
        """Cosine of the pooled features of dense and RLT, per clip, -1..1."""
        return self.cosines["rlt"]

    def same_as_dense(self, arm: str) -> list[bool]:
        """Per clip, whether an arm puts the class first that the dense network does."""
        dense, ours = (self.probabilities[name].argmax(1) for name in ("dense", arm))
        return (dense == ours).tolist()

    def top(self, arm: str, count: int = 5) -> list[list[tuple[int, float]]]:
        """Per clip, the classes with the highest probabilities: (class, probability)."""
        best = self.probabilities[arm].topk(min(count, self.probabilities[arm].shape[1]))
        clips = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [list(zip(classes, values, strict=True)) for classes, values in clips]

    def to_json(self, label: Callable[[int], str | None]) -> dict[str, object]:
        """What is kept, saved and answered; tokens, FLOPs and seconds count over all videos. `label` names classes."""

        def named(clip: list[tuple[int, float]]) -> list[dict[str, object]]:
            return [{"class": index, "label": label(index), "probability": value} for index, value in clip]

        own = {name: getattr(self, name) for name in _OF_VIDEO}
        return {**own, "top5": {arm: [named(clip) for clip in self.top(arm)] for arm in self.tokens}}


@dataclass(frozen=True)
class Comparison:
    """Everything that `rlt compare` shows, over all videos."""

    settings: CompareSettings
    videos: list[VideoComparison]
    network: ViTConfig
    """What ran, and where run lengths counted."""
    weights: str | None
    """The checkpoint; None for random weights."""
    repeats: int
    attention: str
    """The attention back end that ran."""
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

    def end_to_end(self, arm: str) -> Timing:
        """Time from file to logits over all videos."""
        return self.seconds(decoding(arm)) + self.seconds(f"tokenize_{arm}") + self.seconds(f"forward_{arm}")

    def total_tokens(self, arm: str) -> int:
        """Tokens of all videos."""
        return sum(video.tokens[arm] for video in self.videos)

    def total_flops(self, arm: str) -> int:
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
        """Share of the clips for which dense and RLT put the same class first."""
        return self.agreement("rlt")

    @property
    def feature_cosine(self) -> float:
        """Mean cosine of the pooled features of dense and RLT."""
        return self.cosine("rlt")

    def agreement(self, arm: str) -> float:
        """Share of the clips for which an arm puts the class first that the dense network does."""
        return statistics.fmean(same for video in self.videos for same in video.same_as_dense(arm))

    def cosine(self, arm: str) -> float:
        """Mean cosine of the pooled features of an arm and the dense one; 1 for the dense one itself."""
        return statistics.fmean(cosine for video in self.videos for cosine in video.cosines.get(arm, [1.0]))

    def arms_to_json(self) -> dict[str, object]:
        """What each arm takes, costs and answers, ready for JSON."""
        return {
            name: {
                "num_frames": arm.clip.num_frames,
                "frame_stride": arm.clip.frame_stride,
                "fps": arm.clip.fps,
                "tokens": self.total_tokens(name),
                "flops": self.total_flops(name),
                "forward_seconds": self.seconds(f"forward_{name}").median,
                "end_to_end_seconds": self.end_to_end(name).median,
                "speedup_forward": self.seconds("forward_dense").over(self.seconds(f"forward_{name}")),
                "speedup_end_to_end": self.end_to_end("dense").over(self.end_to_end(name)),
                "top1_agreement": self.agreement(name),
                "feature_cosine": self.cosine(name),
            }
            for name, arm in self.settings.arms.items()
        }

    def to_json(self) -> dict[str, object]:
        """All numbers as JSON values; fractions are 0..1, times in seconds."""
        timings = {stage: self.seconds(stage) for stage in self.videos[0].seconds}
        arms = self.settings.arms
        timings |= {f"end_to_end_{arm}": self.end_to_end(arm) for arm in arms}
        used = {"repeats": self.repeats, "attention": self.attention, "run_lengths": self.network.run_lengths}
        used["model"] = size_name(self.network)
        return {
            **{name: getattr(self, name) for name in _RATIOS},
            "weights": self.weights or "random",
            "machine": machine_info(self.settings.device),
            "settings": {**self.settings.to_json(), **used},
            "tokens": {arm: self.total_tokens(arm) for arm in arms},
            "flops": {arm: self.total_flops(arm) for arm in arms},
            **({"arms": self.arms_to_json()} if self.settings.more_frames else {}),
            "seconds": {stage: {"median": timing.median, "spread": timing.spread} for stage, timing in timings.items()},
            "videos": [video.to_json(self.label) for video in self.videos],
            "failed": [{"source": source, "error": error} for source, error in self.failed],
        }

    def label(self, index: int) -> str | None:
        """Name of a class, None where it is not known."""
        return self.network.labels[index] if self.network.labels else None


def decoding(arm: str) -> str:
    """The stage that decodes the clips of an arm: "dense" and "rlt" look at the same ones."""
    return "decode" if arm in ARMS else f"decode_{arm}"


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
    name, size = named(settings.model, settings.checkpoint)
    patches = stored_config(name, size=size).patches
    for arm in settings.arms.values():
        if arm.clip.size is not None:
            patches.grid((arm.clip.num_frames, *arm.clip.frame_size, 3))
    repeats = settings.repeats or min(5, max(2, -(-8 // (len(sources) * settings.num_clips))))
    model = load_model(name, size=size, run_lengths=settings.run_lengths).to(settings.device, settings.dtype)
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
    weights = None if is_size(name) else name
    return Comparison(settings, videos, model.config, weights, repeats, attention, failed)


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

    def decode(spec: ClipSpec) -> list[Clip]:
        return read_spread(source, spec, settings.num_clips, decoder=settings.decoder)

    arms = settings.arms
    clips = {decoding(name): decode(arm.clip) for name, arm in arms.items() if name != "dense"}
    frames = {stage: torch.stack([clip.frames for clip in found]) for stage, found in clips.items()}
    tokenize = {
        name: partial(_tokenize, frames[decoding(name)], arm.rule, model, settings) for name, arm in arms.items()
    }
    packed = {name: work() for name, work in tokenize.items()}
    steps = count(1)

    def on_round() -> None:
        advance(next(steps))

    on_round()
    with torch.inference_mode():
        # The network dominates; file and tokens are quick, so that they are timed in rounds of their own.
        stages: dict[str, Callable[[], object]] = {
            **{decoding(name): partial(decode, arm.clip) for name, arm in arms.items()},
            **{f"tokenize_{name}": work for name, work in tokenize.items()},
        }
        seconds = interleave(stages, rounds=repeats, device=settings.device)
        outputs: dict[str, tuple[Tensor, Tensor]] = {}

        def forward(arm: str) -> None:
            features = model.forward_features(packed[arm])
            outputs[arm] = (features, model.head(features))

        stages = {f"forward_{name}": partial(forward, name) for name in arms}
        seconds |= interleave(stages, rounds=repeats, warmup=warmup, device=settings.device, on_round=on_round)
    dense = outputs["dense"][0].float()
    cosines = {
        name: torch.cosine_similarity(dense, features.float(), dim=1).tolist()
        for name, (features, _) in outputs.items()
        if name != "dense"
    }
    return VideoComparison(
        source=str(source),
        tokens={arm: tokens.num_tokens for arm, tokens in packed.items()},
        flops={arm: count_forward_flops(model.config, tokens) for arm, tokens in packed.items()},
        seconds=seconds,
        probabilities={arm: logits.float().softmax(1).cpu() for arm, (_, logits) in outputs.items()},
        cosines=cosines,
        clip_starts=[float(clip.times[0]) for clip in clips["decode"]],
    )


def _tokenize(frames: Tensor, rule: Rule, model: VisionTransformer, settings: CompareSettings) -> PackedTokens:
    """Tokens on the device of the network, which is also where they are found."""
    return model.tokenize(frames.to(settings.device), rule=rule)

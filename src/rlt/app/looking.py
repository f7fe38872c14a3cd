"""What the page shows of one clip: read once, then looked at with any rule."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlt.checkpoints import list_models
from rlt.checks import at_least, one_of
from rlt.compare import CompareSettings, Comparison, compare
from rlt.errors import InvalidArgumentError, VideoError
from rlt.inspection.overlay import write_overlay
from rlt.inspection.passes import clip_views
from rlt.inspection.scan import ScanResult
from rlt.inspection.views import ClipSettings, ClipView
from rlt.loading import is_size, stored_config
from rlt.network.config import ViTConfig
from rlt.network.flops import forward_flops
from rlt.structures import Clip
from rlt.tokens import PatchView, Rule
from rlt.video import ClipPlan, VideoFile, VideoInfo, probe, read_views, require_motion

MAX_FRAMES, MAX_STRIDE = 64, 32
"""Of a clip: what a visitor can ask the machine for is bounded."""


@dataclass(frozen=True)
class AppSettings:
    """What the page offers, and what it takes from visitors."""

    checkpoints: tuple[str, ...] = ()
    """Offered beside the sizes with random weights, the first of them chosen at the beginning."""
    any_checkpoint: bool = True
    """Whether visitors may name others: paths of this machine and ids of the Hugging Face hub."""
    device: str = "cpu"
    """Where speed is measured: cpu or cuda."""
    max_seconds: float = 600.0
    """A longer video is refused."""
    max_megabytes: int = 200
    """A larger file is refused."""

    def __post_init__(self) -> None:
        if not 0 < self.max_seconds < float("inf"):
            raise InvalidArgumentError(f"max_seconds is {self.max_seconds}; a number of seconds above 0 is needed")
        at_least(1, max_megabytes=self.max_megabytes)

    @property
    def models(self) -> list[str]:
        """What a visitor can choose from."""
        return [*self.checkpoints, *list_models()]

    def config_of(self, model: str) -> ViTConfig:
        """What is stored with a model that a visitor names.

        Raises:
            InvalidArgumentError: for a model that is not offered here.
            CheckpointError: if it cannot be read.
        """
        if not model or not self.any_checkpoint:
            one_of(self.models, model=model)
        return stored_config(model)


@dataclass(frozen=True, eq=False)
class LoadedClip:
    """The clip in the middle of a video. Differences of its tokens are computed once and serve every rule."""

    source: str
    """Path of the video."""
    model: str
    """Whose tokens it is cut into."""
    info: VideoInfo
    """What the file holds."""
    settings: ClipSettings
    """Which frames, and how they are cut."""
    clips: list[Clip]
    """At the size of the tokens and, if there are two, at that for the eye."""
    patches: PatchView
    """The frames as rules see them."""
    config: ViTConfig
    """The network."""


@dataclass(frozen=True, eq=False)
class Look:
    """What one rule keeps of a clip."""

    scan: ScanResult
    """The numbers."""
    view: ClipView
    """The clip as it is shown."""
    rule: Rule
    """What was asked."""
    dense_flops: int
    """Of a forward pass over all tokens."""
    kept_flops: int
    """Of one over those that are kept."""

    @property
    def speedup(self) -> float:
        """What the FLOPs allow: those of all tokens over those of the kept ones, 1 or more."""
        return self.dense_flops / self.kept_flops


class Session:
    """What the page holds for one visitor."""

    def __init__(self) -> None:
        self.loaded: LoadedClip | None = None
        self.look: Look | None = None
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """For the overlay; made when it is asked for, gone with the session."""
        if self._folder is None or not self._folder.is_dir():
            self._folder = Path(tempfile.mkdtemp(prefix="rlt-app-"))
        return self._folder

    def close(self) -> None:
        """Remove its files."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def load_clip(source: str, model: str, num_frames: int, frame_stride: int, settings: AppSettings) -> LoadedClip:
    """Read the clip that a visitor asks for; the other fields of the clip are those of the model.

    Raises:
        VideoError: if the file is none, is damaged, or larger or longer than is taken here.
        InvalidArgumentError: for numbers out of range, or a model that is not offered.
        CheckpointError: if what is stored with the model cannot be read.
    """
    for most, name, value in ((MAX_FRAMES, "frames", num_frames), (MAX_STRIDE, "stride", frame_stride)):
        if not 1 <= value <= most:
            raise InvalidArgumentError(f"{name} is {value}; 1 to {most} is allowed here")
    config = settings.config_of(model)
    info = _checked(source, settings)
    clip = config.clip_spec.changed(num_frames=num_frames, frame_stride=frame_stride)
    spec = config.patches
    chosen = ClipSettings(**vars(clip), tubelet_size=spec.tubelet_size, patch_size=spec.patch_size)
    spec.grid((num_frames, *clip.frame_size, 3))
    views = clip_views(info, chosen)

    def plan(file: VideoFile) -> list[ClipPlan]:
        return [ClipPlan(places, views) for places in clip.spread(1, file.num_frames, file.rate)]

    [clips] = read_views(source, plan, decoder=chosen.decoder, num_threads=0)
    return LoadedClip(source, model, info, chosen, clips, chosen.patch_view(clips[0]), config)


def _checked(source: str, settings: AppSettings) -> VideoInfo:
    name, size = Path(source).name, Path(source).stat().st_size if Path(source).exists() else 0
    if size > settings.max_megabytes * 1_000_000:
        raise VideoError(f"{name} has {size / 1e6:,.0f} MB; up to {settings.max_megabytes} MB are taken here")
    info = require_motion(probe(source))
    if info.duration > settings.max_seconds:
        raise VideoError(f"{name} lasts {info.duration:,.0f} s; up to {settings.max_seconds:g} s are taken here")
    return info


def look_at(loaded: LoadedClip, rule: Rule) -> Look:
    """What a rule keeps of the clip: milliseconds, since nothing is decoded and no network runs."""
    settings = replace(loaded.settings, rule=rule)
    scan = ScanResult(settings, loaded.info)
    scan.add(loaded.clips[0], loaded.patches)
    view = ClipView.of(loaded.clips, settings, loaded.patches)
    dense, kept = (forward_flops(loaded.config, count) for count in (view.mask.numel(), int(view.mask.sum())))
    return Look(scan, view, rule, dense, kept)


def encode_overlay(loaded: LoadedClip, look: Look, folder: Path) -> Path:
    """The clip with what is dropped dimmed, as folder/overlay.mp4, at half its pace: one clip is short."""
    path = folder / "overlay.mp4"
    fps = loaded.info.fps / float(loaded.settings.pace(loaded.info))
    write_overlay([look.view], path, fps=max(fps / 2, 1.0), max_seconds=float("inf"))
    return path


def measure(
    loaded: LoadedClip, rule: Rule, device: str, on_progress: Callable[[int, int, str], None] | None = None
) -> Comparison:
    """`rlt compare` of this clip: the network dense and with the rule in turn, three times after a warm-up."""
    spec = {name: getattr(loaded.settings, name) for name in vars(loaded.config.clip_spec)}
    clip: Any = type(loaded.config.clip_spec)(**spec)
    kind = "model" if is_size(loaded.model) else "checkpoint"
    chosen = CompareSettings(**{kind: loaded.model}, rule=rule, clip=clip, device=device, repeats=3)  # type: ignore[arg-type]
    return compare([loaded.source], chosen, on_progress=on_progress)


@dataclass(frozen=True)
class Savings:
    """What a day of video costs a network, with all tokens and with those that are kept."""

    dense_hours: float
    """Hours of the GPU for all tokens."""
    kept_hours: float
    """Hours for those that are kept."""
    price: float
    """Of an hour of the GPU."""

    @property
    def saved(self) -> float:
        """Money saved a day, in the unit of the price."""
        return (self.dense_hours - self.kept_hours) * self.price


def savings(loaded: LoadedClip, look: Look, video_hours: float, price: float, teraflops: float) -> Savings:
    """Hours and money a day, if all video is as the clip, clips follow one another, and FLOPs are what costs.

    Args:
        loaded: the clip.
        look: what is kept of it.
        video_hours: hours of video a day.
        price: of an hour of the GPU, in any currency.
        teraflops: 10^12 FLOPs a second that the GPU reaches with this network.

    Raises:
        InvalidArgumentError: for a number out of range.
    """
    at_least(0, **{"hours of video": video_hours, "price": price})
    if not teraflops > 0:
        raise InvalidArgumentError(f"TFLOP/s is {teraflops}; more than 0 is needed")
    seconds_per_clip = float(loaded.settings.length(loaded.info)) / loaded.info.fps
    clips = video_hours * 3600 / seconds_per_clip
    dense, kept = (clips * flops / (teraflops * 1e12) / 3600 for flops in (look.dense_flops, look.kept_flops))
    return Savings(dense, kept, price)

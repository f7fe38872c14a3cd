"""What is calibrated, and what was found: a rule with its threshold, how sure it is, and what others would do."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import NormalDist

from rlt.checks import at_least, one_of
from rlt.evaluation.statistics import Interval
from rlt.structures import PatchSpec, TokenGrid
from rlt.tokens import Threshold, rule_options
from rlt.tokens.rule_files import write_rule_file
from rlt.video import DECODERS, ClipSpec


@dataclass(frozen=True)
class CalibrateSettings:
    """Which rule, and on which clips; every field is an option of `rlt calibrate`."""

    rule: Threshold = Threshold()
    """What tokens are compared with, and how; its own threshold plays no part."""
    clip: ClipSpec = ClipSpec()
    """Frames and size of a clip."""
    num_clips: int = 1
    """Clips per video, spread evenly."""
    decoder: str = "pyav"
    """See `rlt.read_clip`."""
    spec: PatchSpec = PatchSpec()
    """How frames are cut into tokens, where no model says it."""

    def __post_init__(self) -> None:
        at_least(1, num_clips=self.num_clips)
        one_of(DECODERS, decoder=self.decoder)
        _ = self.grid

    @property
    def grid(self) -> TokenGrid:
        """Tokens of a clip.

        Raises:
            InvalidArgumentError: if sizes do not divide, or each video is to have its own.
        """
        return self.spec.grid((self.clip.num_frames, *self.clip.frame_size, 3))

    def to_json(self) -> dict[str, object]:
        """Clips and patches as JSON values."""
        sizes = {"patch_size": self.spec.patch_size, "tubelet_size": self.spec.tubelet_size}
        return {**vars(self.clip), "clips_per_video": self.num_clips, "decoder": self.decoder, **sizes}


@dataclass(frozen=True)
class Step:
    """What one threshold does to the data set."""

    threshold: float
    """0 or more, in units of the ImageNet-normalised picture."""
    tokens_kept: Interval
    """Share of the tokens, mean over clips, 0..1; 95 % by bootstrap over videos."""
    disagreement: Interval | None = None
    """Share of the clips whose most probable class is not the dense network's; Wilson's 95 %, in which the clips of one
    video count as one observation. None if no network was asked."""

    def to_json(self) -> dict[str, object]:
        """Flat, with intervals as [low, high]."""
        found: dict[str, object] = {"threshold": self.threshold}
        for name in ("tokens_kept", "disagreement"):
            if (interval := getattr(self, name)) is not None:
                found |= {name: interval.value, f"{name}_interval": [interval.low, interval.high]}
        return found


@dataclass(frozen=True)
class Calibration:
    """A threshold, how it was found, and what others would do."""

    rule: Threshold
    """The rule with the threshold that was found."""
    found: Step
    """What it does."""
    curve: tuple[Step, ...]
    """What other thresholds do, rising."""
    asked: dict[str, float]
    """What was asked for: "target_keep" or "max_disagreement"."""
    data: tuple[str, ...]
    """Where the videos come from."""
    settings: CalibrateSettings
    num_videos: int
    """Videos that were measured."""
    failed: tuple[tuple[str, str], ...] = ()
    """(path, reason) of those that could not be."""
    network: dict[str, str | None] = field(default_factory=dict)
    """The network that was asked: "checkpoint", "run_lengths", "device", "dtype"."""

    @property
    def is_certain(self) -> bool:
        """Whether the whole interval of the disagreement is within what was asked; True if no network was asked."""
        limit = self.asked.get("max_disagreement")
        return limit is None or (self.found.disagreement is not None and self.found.disagreement.high <= limit)

    @property
    def videos_needed(self) -> int:
        """How many videos without a single disagreement would make it certain."""
        z2, limit = NormalDist().inv_cdf(0.975) ** 2, self.asked.get("max_disagreement", 1.0)
        return ceil(z2 * (1 - limit) / limit)

    def about(self) -> dict[str, object]:
        """How the rule was found, ready for JSON."""
        measured = {name: value for name, value in self.found.to_json().items() if name != "threshold"}
        certain = {} if self.found.disagreement is None else {"certain": self.is_certain}
        return {
            **self.asked,
            **measured,
            **certain,
            "videos": self.num_videos,
            "data": list(self.data),
            "clips": self.settings.to_json(),
            **({"network": self.network} if self.network else {}),
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
        }

    def to_json(self) -> dict[str, object]:
        """The rule, how it was found, and the curve."""
        return {"rule": rule_options(self.rule), **self.about(), "curve": [step.to_json() for step in self.curve]}

    def write_rule(self, path: str | Path) -> None:
        """Write the file that every place takes that takes the name of a rule; its name ends in .json."""
        write_rule_file(path, rule_options(self.rule), **self.about())

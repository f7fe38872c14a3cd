"""Rules: which tokens a network gets. A rule is a value, found in a table by its name, and the table is open to users.

The same rule goes through every door: `rlt.tokenize(..., rule=)`, `rlt.patch(model, rule=)`, `tokenizer=` of training
and evaluation, `--rule` of the commands. A claim about quality needs `Random` at the same token count and
`UniformFrames` beside `Threshold`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from typing_extensions import override

from rlt.checks import at_least, exclusive, number, one_of, share
from rlt.errors import InvalidArgumentError
from rlt.structures import TokenGrid
from rlt.tokens.aligned import Camera, ExposureName, MotionName
from rlt.tokens.differences import LARGEST_DIFFERENCE, PatchView, ReferenceName

PAPER_THRESHOLD = 0.1
"""The paper's, about 5.7 grey levels."""


class Rule(Protocol):
    """What a class needs to be a rule; `register_rule` puts it into the table."""

    @property
    def runs(self) -> bool:
        """Whether a kept token stands for what follows it at its place, until the next kept one."""
        return True

    @property
    def drops_places(self) -> bool:
        """Whether it may drop a token of the first time step though tokens stand for runs: then nothing stands for such
        a place until a later token of it, and `RunLengthTokens.expand` cannot fill it."""
        return False

    def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
        """Which tokens to keep.

        Args:
            frames: B clips.
            seeds: B numbers; what is random for a clip is a function of its number alone.

        Returns:
            bool [B, T', H', W'] on the device of the frames, True where a token is kept; at least one of each clip.
        """


RuleT = TypeVar("RuleT", bound=type)
RULES: dict[str, type[Any]] = {}
"""All rules by name."""


def register_rule(name: str) -> Callable[[RuleT], RuleT]:
    """Decorate a frozen dataclass to make it a rule of this name; its fields are what commands can set.

    A class that is no `Rule` and has no `runs` is taken for a rule whose kept tokens stand for what follows.

    Raises:
        InvalidArgumentError: for a name that is taken, or no name for a command line.
    """

    def register(cls: RuleT) -> RuleT:
        known = RULES.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InvalidArgumentError(f"rule {name!r} is {known.__qualname__} already; choose another name")
        if not name.isidentifier():
            raise InvalidArgumentError(f"rule name is {name!r}; letters, digits and underscores are needed")
        for attribute, default in (("runs", True), ("drops_places", False)):
            if not hasattr(cls, attribute):
                setattr(cls, attribute, default)
        RULES[name] = cls
        return cls

    return register


class Compared(Rule):
    """What rules that compare tokens share: their fields `reference`, `exposure` and `motion`."""

    reference: ReferenceName
    exposure: ExposureName
    motion: MotionName

    @property
    def camera(self) -> Camera:
        """What of the camera is undone before tokens are compared."""
        return Camera(self.exposure, self.motion)

    def check_names(self) -> None:
        """Hold that all are known."""
        one_of(get_args(ReferenceName), reference=self.reference)
        one_of(get_args(ExposureName), exposure=self.exposure)
        one_of(get_args(MotionName), motion=self.motion)

    def differ(self, frames: PatchView, threshold: float) -> Tensor:
        """Which tokens differ by more than `threshold`: bool [B, T', H', W']."""
        return frames.differ(threshold, reference=self.reference, camera=self.camera)


@register_rule("rlt")
@dataclass(frozen=True)
class Threshold(Compared):
    """Keep what differs from the token before it (paper, section 3.1)."""

    threshold: float = PAPER_THRESHOLD
    """Mean absolute difference of the ImageNet-normalised picture above which a token is kept, 0 or more. 0 drops exact
    repeats only."""
    reference: ReferenceName = "previous"
    """"previous" compares with the token before (paper). "anchor" compares with the token that stands for the place, so
    that what is dropped differs from that by at most the threshold, however slowly it drifts."""
    exposure: ExposureName = "none"
    """"gain" undoes one gain and offset per step and channel first, as automatic exposure, flicker and fades make
    them, and takes off what noise of the sensor makes. A step whose gain is beyond 1.5 is another scene, kept whole."""
    motion: MotionName = "none"
    """"global" undoes one shift of the whole picture per step first, as a camera that pans makes it: a patch may be
    covered by where it came from. The run of a kept token is then that of its place: what it shows has moved on, and
    stands elsewhere."""

    def __post_init__(self) -> None:
        self.check_names()
        number(threshold=self.threshold)
        if self.threshold is None or not self.threshold >= 0:
            raise InvalidArgumentError(f"threshold is {self.threshold}; 0 or more is needed (0.1 is the paper's)")

    @override
    def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
        return self.differ(frames, self.threshold)


@register_rule("budget")
@dataclass(frozen=True)
class Budget(Compared):
    """Keep those that differ most from the token before them, so many a clip; of equal ones the earlier.

    With `reference="anchor"` it is the smallest threshold that keeps no more than so many. The first time step is kept
    whole, unless the budget is smaller than that: then the flattest of its patches are dropped too, for which nothing
    stands.
    """

    keep_ratio: float | None = None
    """Share of each clip's tokens, above 0 and up to 1; or"""
    max_tokens: int | None = None
    """number of each clip's tokens at most, at least 1."""
    reference: ReferenceName = "previous"
    """See `Threshold`."""
    exposure: ExposureName = "none"
    """See `Threshold`."""
    motion: MotionName = "none"
    """See `Threshold`."""
    shared: bool = False
    """Whether the clips of a call share so many tokens a clip: what stands gives to what moves. What a clip keeps then
    depends on the others, so that it is refused where clips come one by one, as in training and evaluation."""

    @property
    @override
    def drops_places(self) -> bool:
        return True

    def __post_init__(self) -> None:
        self.check_names()
        share(keep_ratio=self.keep_ratio)
        at_least(1, max_tokens=self.max_tokens)
        exclusive(keep_ratio=self.keep_ratio, max_tokens=self.max_tokens)
        if self.keep_ratio is None and self.max_tokens is None:
            raise InvalidArgumentError("rule 'budget' has neither keep_ratio nor max_tokens; give one of them")

    def count(self, grid: TokenGrid) -> int:
        """Tokens that are kept of a clip with this grid, at least 1."""
        if self.max_tokens is not None:
            return min(self.max_tokens, grid.num_tokens)
        return max(round((self.keep_ratio or 0) * grid.num_tokens), 1)

    @override
    def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
        parts = [frames] if self.shared or len(frames) == 1 else frames.clips()
        return torch.cat([self._of_one_budget(part, self.count(frames.grid)) for part in parts])

    def _of_one_budget(self, frames: PatchView, count: int) -> Tensor:
        if count < frames.grid.height * frames.grid.width:
            return self._most_telling(frames, count)
        if self.reference == "anchor":
            return self._at_smallest_threshold(frames, count)
        return self._largest_differences(frames, count)

    def _most_telling(self, frames: PatchView, count: int) -> Tensor:
        """Less than a time step: what stands at the first step is held against a flat patch of its mean colour."""
        differences = frames.differences_under(self.camera)
        told = torch.cat([frames.detail[:, None].to(differences.dtype), differences], 1)
        mask = _largest(told, count * len(frames))
        mask[:, 0, 0, 0] |= ~mask.flatten(1).any(1)  # no clip is left without a token
        return mask

    def _largest_differences(self, frames: PatchView, count: int) -> Tensor:
        first = frames.grid.height * frames.grid.width
        kept = _largest(frames.differences_under(self.camera), (count - first) * len(frames))
        return torch.cat([kept.new_ones(len(kept), 1, *kept.shape[2:]), kept], 1)

    def _at_smallest_threshold(self, clip: PatchView, count: int) -> Tensor:
        """Halve the interval of thresholds until it is narrower than a hundredth of a grey level."""
        low, high = 0.0, LARGEST_DIFFERENCE
        if _fits(mask := self.differ(clip, low), count):
            return mask
        mask = self.differ(clip, high)
        while _fits(mask, count) and high - low > _HUNDREDTH_OF_A_LEVEL:
            found = self.differ(clip, (low + high) / 2)
            low, high, mask = (low, (low + high) / 2, found) if _fits(found, count) else ((low + high) / 2, high, mask)
        # Scenes that are kept whole may be more than the budget: then the largest differences are within it.
        return mask if _fits(mask, count) else self._largest_differences(clip, count)


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the so many largest of all values are, of equal ones the first: bool of the same shape."""
    order = values.flatten().argsort(descending=True, stable=True)[:count]
    return (
        torch.zeros(values.numel(), dtype=torch.bool, device=values.device).index_fill_(0, order, True).view_as(values)
    )


def _fits(mask: Tensor, count: int) -> bool:
    return int(mask.sum()) <= count * len(mask)


_HUNDREDTH_OF_A_LEVEL = 0.01 / 255 / 0.225


@register_rule("none")
@dataclass(frozen=True)
class Everything(Rule):
    """Keep every token: the dense network."""

    @override
    def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
        return torch.ones(frames.shape, dtype=torch.bool, device=frames.device)


@register_rule("random")
@dataclass(frozen=True)
class Random(Rule):
    """Keep as many as another rule would, drawn at random. A token stands for itself only: every run length is 1."""

    like: Rule = Threshold()
    """The rule whose count is kept, clip by clip."""
    seed: int = 0
    """Added to the number of each clip."""
    keep_first: bool = False
    """Keep the first time step whole, draw the others, and let each stand for its run: chance with run lengths."""

    @property
    @override
    def runs(self) -> bool:
        return self.keep_first

    @override
    def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
        first = frames.grid.height * frames.grid.width if self.keep_first else 0
        counts = _counts(self.like, frames, seeds)
        drawn = [
            random_mask(frames.grid.num_tokens - first, max(count - first, 0), self.seed + seed)
            for count, seed in zip(counts, seeds, strict=True)
        ]
        rows = torch.stack(drawn)
        return torch.cat([rows.new_ones(len(rows), first), rows], 1).view(frames.shape).to(frames.device)


@register_rule("uniform_frames")
@dataclass(frozen=True)
class UniformFrames(Rule):
    """Keep all tokens of evenly spread time steps, about as many as another rule would: fewer frames."""

    like: Rule = Threshold()
    """The rule whose count is kept, clip by clip, to a whole number of time steps."""

    @override
    def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
        mask = torch.zeros(frames.shape, dtype=torch.bool, device=frames.device)
        tokens_per_step = frames.grid.height * frames.grid.width
        for clip, count in zip(mask, _counts(self.like, frames, seeds), strict=True):
            clip[even_steps(frames.grid.time, max(round(count / tokens_per_step), 1))] = True
        return mask


@register_rule("drawn")
@dataclass(frozen=True)
class Drawn(Compared):
    """Draw a threshold or a share anew for every clip, so that one network learns to serve them all.

    For training. Where a network is measured or used, `Threshold` and `Budget` name one of them.
    """

    lowest: float = 0.05
    """End of the range that is drawn from, above 0;"""
    highest: float = 0.8
    """its other end, at least `lowest`; up to 1 for shares."""
    over: str = "threshold"
    """"threshold" draws thresholds, each factor as likely as another (log-uniform). "keep_ratio" draws shares of the
    tokens of a clip, uniform, see `Budget`."""
    reference: ReferenceName = "previous"
    """See `Threshold`."""
    exposure: ExposureName = "none"
    """See `Threshold`."""
    motion: MotionName = "none"
    """See `Threshold`."""

    @property
    @override
    def drops_places(self) -> bool:
        return self.over == "keep_ratio"

    def __post_init__(self) -> None:
        self.check_names()
        one_of(("threshold", "keep_ratio"), over=self.over)
        most = 1.0 if self.over == "keep_ratio" else math.inf
        if not 0 < self.lowest <= self.highest <= most:
            limits = "above 0 and rising" + (", up to 1" if self.over == "keep_ratio" else "")
            raise InvalidArgumentError(f"lowest is {self.lowest} and highest is {self.highest}; {limits} is needed")

    def at(self, seed: int) -> Rule:
        """The rule of the clip with this number."""
        part = float(torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        if self.over == "keep_ratio":
            share_kept = self.lowest + part * (self.highest - self.lowest)
            return Budget(share_kept, None, self.reference, self.exposure, self.motion)
        threshold = self.lowest * (self.highest / self.lowest) ** part
        return Threshold(threshold, self.reference, self.exposure, self.motion)

    @override
    def __call__(self, frames: PatchView, *, seeds: Sequence[int]) -> Tensor:
        clips = zip(frames.clips(), seeds, strict=True)
        return torch.cat([self.at(seed)(clip, seeds=[seed]) for clip, seed in clips])


def apply_rule(rule: Rule, frames: PatchView, seeds: Sequence[int] | None = None) -> Tensor:
    """The mask of a rule, looked at before anything is cut by it: bool [B, T', H', W'].

    Args:
        rule: any.
        frames: B clips.
        seeds: B numbers; None means 0, 1, 2, ...

    Raises:
        InvalidArgumentError: for another number of seeds, or a mask of another dtype, shape or device.
    """
    numbers = range(len(frames)) if seeds is None else seeds
    if len(numbers) != len(frames):
        raise InvalidArgumentError(f"{len(numbers)} seeds for {len(frames)} clips; one per clip is needed")
    with torch.no_grad():
        mask = rule(frames, seeds=numbers)
    if mask.dtype != torch.bool or tuple(mask.shape) != frames.shape or mask.device != frames.device:
        raise InvalidArgumentError(
            f"rule {rule} gave {mask.dtype} {list(mask.shape)} on {mask.device}; bool {list(frames.shape)} on "
            f"{frames.device} is needed"
        )
    return mask


def _counts(like: Rule, frames: PatchView, seeds: Sequence[int]) -> list[int]:
    """Tokens of each clip under another rule. A budget below the first time step is no hindrance here."""
    if isinstance(like, Budget) and not like.shared:
        return [like.count(frames.grid)] * len(frames)
    counts: list[int] = like(frames, seeds=seeds).flatten(1).sum(1).tolist()
    return counts


def random_mask(num_tokens: int, count: int, seed: int) -> Tensor:
    """bool [num_tokens] with `count` places drawn at random, a function of `seed` alone."""
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def even_steps(time: int, count: int) -> list[int]:
    """`count` of the steps 0..time-1, evenly spread, the first among them."""
    return [step * time // count for step in range(count)]

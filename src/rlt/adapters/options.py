"""What users ask of a patched model, and what it tells them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor

from rlt.checks import Renamed, at_least, one_of, share
from rlt.errors import InvalidArgumentError
from rlt.network.run_lengths import IGNORED, NOWHERE, RunLengthParts
from rlt.structures import RGB, token_at_place
from rlt.tokens import Rule, Threshold, choose_rule
from rlt.tokens.naming import PLAIN, change_rule
from rlt.tokens.tokenize import POLICY

Expand = Literal["fill"]
FOR_IMAGES = ("frames_per_clip", "refresh_every", "refresh_share", "refresh_around")
"""Options that image models alone have."""
DEFAULT_RUN_LENGTHS = IGNORED
"""What `run_lengths` is where none is given and the model can count them."""
MOVED = {"policy": POLICY, "seed": "give rule=rlt.Random(seed=...)"}
"""Options of earlier versions, and what is written instead."""


@dataclass(frozen=True)
class PatchOptions:
    """What a patched model does."""

    rule: Rule = Threshold()
    """Which tokens it keeps. Thresholds are in units of the ImageNet-normalised picture, whatever the model's own."""
    expand: Expand | None = None
    """"fill" puts outputs per token back on the full grid, each dropped place with the token that stands for it, and a
    classifier pools over that. None pools over the kept tokens. Bare encoders always fill."""
    frames_per_clip: int | None = None
    """Image models only: how many consecutive images of a batch are one clip. None: the whole batch is one."""
    pixel_mean: RGB | None = None
    """Of each channel on the scale 0..1: what `pixel_values` were normalised by. None is what the processor that lies
    beside the checkpoint says, or else that of the family."""
    pixel_std: RGB | None = None
    """As above: the standard deviation of each channel on the scale 0..1."""
    run_lengths: str | None = None
    """Where a kept token counts as often as it stood, without training: "aware" for everywhere in the model, "ignored"
    for nowhere (paper), or parts joined by "+", such as "pooling+attention"; see `rlt.network.run_lengths`. None, which
    no patched model has, is `DEFAULT_RUN_LENGTHS`, and "ignored" for models that cannot count them."""

    refresh_every: int | None = None
    """Image models only: every so many frames of a clip, or a stream, keep the whole frame."""
    refresh_share: float | None = None
    """Image models only: keep a frame whole if the rule keeps more than this share of it, above 0 and below 1."""
    refresh_around: int | None = None
    """Image models only: keep also patches up to so many rows and columns beside one that the rule keeps."""

    def __post_init__(self) -> None:
        if self.expand not in (None, "fill"):
            raise InvalidArgumentError(f"expand is {self.expand!r}; allowed are None and 'fill'")
        if self.expand == "fill":
            self.check_runs("expand is 'fill'")
        at_least(1, frames_per_clip=self.frames_per_clip)
        at_least(1, refresh_every=self.refresh_every)
        at_least(1, refresh_around=self.refresh_around)
        share(refresh_share=self.refresh_share)
        if self.run_lengths is not None:
            RunLengthParts.of(self.run_lengths)

    @property
    def parts(self) -> RunLengthParts:
        """Where run lengths count; nowhere for a rule whose tokens stand for themselves alone."""
        return NOWHERE if self.run_lengths is None or not self.rule.runs else RunLengthParts.of(self.run_lengths)

    def check_runs(self, reason: str) -> None:
        """Hold that every place has a token that stands for it, which rules such as `rlt.Random` do not give."""
        if not self.rule.runs:
            raise InvalidArgumentError(f"{reason}, but tokens of {self.rule} stand for no others; use another rule")

    def changed(self, **changes: Any) -> PatchOptions:
        """The same with other values; those that spell out a rule change `rule` as `rlt.tokens.change_rule` says."""
        allowed = [*PLAIN, *(field.name for field in fields(self))]
        for name in changes:
            if name in MOVED:
                raise InvalidArgumentError(f"{name} is no option any more; {MOVED[name]}")
            one_of(allowed, option=name)
        plain = {name: changes.pop(name) for name in PLAIN if name in changes}
        rule = changes.pop("rule", None)
        changes["rule"] = change_rule(self.rule, **plain) if rule is None else choose_rule(rule, **plain)
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class LastForward:
    """What the last call of a patched model kept."""

    mask: Tensor
    """bool [B, T', H', W'], True where a token was kept."""

    tokens_kept = Renamed("num_kept, the tokens of each clip; share_kept is their share")
    tokens_dense = Renamed("num_dense")

    @cached_property
    def num_kept(self) -> tuple[int, ...]:
        """Tokens of each clip that went through the network."""
        return tuple(self.mask.flatten(1).sum(1).tolist())

    @property
    def num_dense(self) -> int:
        """Tokens of one clip before anything is dropped."""
        return self.mask[0].numel()

    @property
    def share_kept(self) -> float:
        """Share of all tokens that was kept, above 0 and up to 1."""
        return sum(self.num_kept) / self.mask.numel()

    def row_at_place(self) -> Tensor:
        """int64 [B, T' * H' * W']: which kept token, counted over all clips, stands for each place.

        Raises:
            InvalidArgumentError: if a clip's first time step was not kept whole.
        """
        return token_at_place(self.mask).flatten(1)

    def __repr__(self) -> str:
        return f"LastForward({list(self.num_kept)} of {self.num_dense} tokens per clip)"

"""What users ask of a patched model, and what it tells them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from torch import Tensor

from rlt.checks import Renamed, one_of
from rlt.errors import InvalidArgumentError
from rlt.structures import token_at_place
from rlt.tokens import check_threshold

Policy = Literal["rlt", "none", "random", "uniform_frames"]
Expand = Literal["fill"]
Statistics = tuple[float, float, float]
"""One number per channel, on the scale 0..1."""


@dataclass(frozen=True)
class PatchOptions:
    """Which tokens a patched model keeps. Of threshold, keep_ratio and max_tokens the last that is given counts."""

    threshold: float = 0.1
    """Keep what differs by more from the time step before, in units of the normalised clip; see `rlt.keep_mask`."""
    keep_ratio: float | None = None
    """Keep this share of each clip's tokens instead, those that differ most, above 0 and up to 1."""
    max_tokens: int | None = None
    """Keep at most so many tokens of each clip instead, those that differ most. The first time step is always kept."""
    policy: Policy = "rlt"
    """"rlt", "none" (keep all), and for comparisons "random" (as many tokens as "rlt", drawn at random) or
    "uniform_frames" (all tokens of evenly spread time steps, about as many as "rlt" keeps)."""
    expand: Expand | None = None
    """"fill" puts outputs per token back on the full grid, each dropped place with the token that stands for it, and a
    classifier pools over that. None pools over the kept tokens. Bare encoders always fill."""
    pixel_mean: Statistics | None = None
    """Used for uint8 `pixel_values` only: mean of each channel on the scale 0..1. None is what the family's processor
    takes: 0.5 for ViViT, ImageNet's for the others."""
    pixel_std: Statistics | None = None
    """Used for uint8 `pixel_values` only: standard deviation of each channel on the scale 0..1; None as above."""
    seed: int = 0
    """Of policy "random"."""
    frames_per_clip: int | None = None
    """Image models only: how many consecutive images of a batch are one clip. None: the whole batch is one."""

    def __post_init__(self) -> None:
        """Hold values.

        Raises:
            InvalidArgumentError: naming the field.
        """
        check_threshold(self.threshold)
        if self.policy not in get_args(Policy):
            raise InvalidArgumentError(f"policy is {self.policy!r}; allowed are {', '.join(get_args(Policy))}")
        if self.expand not in (None, "fill"):
            raise InvalidArgumentError(f"expand is {self.expand!r}; allowed are None and 'fill'")
        if self.expand == "fill" and self.policy == "random":
            raise InvalidArgumentError("expand is 'fill', but random tokens stand for no others; use policy='rlt'")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise InvalidArgumentError(f"keep_ratio is {self.keep_ratio}; above 0 and up to 1 is needed")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidArgumentError(f"max_tokens is {self.max_tokens}; at least 1 is needed")
        if self.frames_per_clip is not None and self.frames_per_clip < 1:
            raise InvalidArgumentError(f"frames_per_clip is {self.frames_per_clip}; at least 1 is needed")
        if self.keep_ratio is not None and self.max_tokens is not None:
            raise InvalidArgumentError("keep_ratio and max_tokens are both given; give one of them")

    def changed(self, **changes: Any) -> PatchOptions:
        """The same with other values.

        Raises:
            InvalidArgumentError: for values out of range, or a name that is no option.
        """
        for name in changes:
            one_of([field.name for field in fields(self)], option=name)
        return replace(self, **changes)


@dataclass(frozen=True, eq=False)
class LastForward:
    """What the last call of a patched model kept."""

    mask: Tensor
    """bool [B, T', H', W'], True where a token was kept."""

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

    tokens_kept = Renamed("num_kept, the tokens of each clip; share_kept is their share")
    tokens_dense = Renamed("num_dense")

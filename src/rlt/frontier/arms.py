"""What is compared with the dense network: rules, their options, what run lengths do, and the baselines beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlt.checks import at_least
from rlt.errors import InvalidArgumentError
from rlt.network.run_lengths import AWARE, IGNORED
from rlt.tokens import Budget, Everything, Random, Rule, Threshold, UniformFrames, rule_line, rule_options

ArmName = Literal[
    "paper", "aware", "pooling", "pooling+position", "anchor", "gain", "anchor+gain", "motion", "anchor+motion",
    "random", "random with runs", "fewer frames", "fewer frames with runs", "token merging", "calibrated",
]  # fmt: skip
"""Families of arms: each is one line of a plot, from few tokens to many."""
BASELINES: tuple[ArmName, ...] = (
    "random",
    "random with runs",
    "fewer frames",
    "fewer frames with runs",
    "token merging",
)
"""Families that choose without looking, or inside the network."""


@dataclass(frozen=True)
class FrontierArm:
    """One way to spend fewer FLOPs than the dense network."""

    family: ArmName
    """What it belongs to."""
    rule: Rule
    """Which tokens go in. For "token merging", whose FLOPs are met: all go in."""
    run_lengths: str = IGNORED
    """Where run lengths count, see `rlt.network.run_lengths`."""
    seed: int | None = None
    """Of an arm that draws: the same family, rule and run lengths with other seeds are one point."""

    @property
    def key(self) -> str:
        """What tells it apart from every other arm."""
        return f"{self.family}|{self.rule!r}|{self.run_lengths}"

    @property
    def level(self) -> tuple[str, float]:
        """Threshold or share, its own or that of the rule whose count it meets: arms are compared at the same level."""
        rule = getattr(self.rule, "like", self.rule)
        for name in ("threshold", "keep_ratio", "max_tokens"):
            if (value := getattr(rule, name, None)) is not None:
                return name, float(value)
        return "rule", 0.0

    @property
    def merges(self) -> bool:
        """Whether all tokens go in, and so many are merged in every block that FLOPs are those of `rule`."""
        return self.family == "token merging"

    def to_json(self) -> dict[str, object]:
        """Family, rule, options and run lengths."""
        options = rule_options(self.rule)
        return {"arm": self.family, "rule": options.pop("rule"), "options": options, "run_lengths": self.run_lengths}

    def __str__(self) -> str:
        return f"{self.family}: {rule_line(self.rule)}"


def default_arms(
    thresholds: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.8), keep_ratios: Sequence[float] = (0.25,), seeds: int = 3
) -> list[FrontierArm]:
    """Every rule and option at every threshold and share, with the baselines at the same count of tokens.

    Args:
        thresholds: for `Threshold`, each 0 or more.
        keep_ratios: for `Budget`, each above 0 and up to 1.
        seeds: how many draws of each random arm, at least 1.
    """
    at_least(1, seeds=seeds)
    levels: list[dict[str, float]] = [{"threshold": value} for value in thresholds]
    levels += [{"keep_ratio": value} for value in keep_ratios]
    if not levels:
        raise InvalidArgumentError("no thresholds and no keep_ratios; give at least one")
    return [arm for level in levels for arm in _arms_at(level, seeds)]


def _arms_at(level: dict[str, float], seeds: int) -> list[FrontierArm]:
    def compared(**options: str) -> Rule:
        kind: type[Threshold] | type[Budget] = Threshold if "threshold" in level else Budget
        return kind(**level, **options)  # type: ignore[arg-type]

    plain = compared()
    arms = [
        FrontierArm("paper", plain),
        FrontierArm("pooling", plain, "pooling"),
        FrontierArm("pooling+position", plain, "pooling+position"),
        FrontierArm("aware", plain, AWARE),
        FrontierArm("anchor", compared(reference="anchor"), AWARE),
        FrontierArm("gain", compared(exposure="gain"), AWARE),
        FrontierArm("anchor+gain", compared(reference="anchor", exposure="gain"), AWARE),
        FrontierArm("motion", compared(motion="global"), AWARE),
        FrontierArm("anchor+motion", compared(reference="anchor", motion="global"), AWARE),
        FrontierArm("fewer frames", UniformFrames(like=plain)),
        FrontierArm("fewer frames with runs", UniformFrames(like=plain), AWARE),
        FrontierArm("token merging", plain),
    ]
    for seed in range(seeds):
        arms += [
            FrontierArm("random", Random(like=plain, seed=seed), IGNORED, seed),
            FrontierArm("random with runs", Random(like=plain, seed=seed, keep_first=True), AWARE, seed),
        ]
    return arms


DENSE = FrontierArm("paper", Everything())
"""What all arms are held against."""

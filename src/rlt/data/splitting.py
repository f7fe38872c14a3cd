"""One data set in two parts, for training and for validation, in which clips of the same recording stay together."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from rlt.checks import at_least
from rlt.data.listings import Listing
from rlt.data.sampler import derive_seed
from rlt.errors import InvalidArgumentError

_GROUPS = (re.compile(r"(.*_g\d+)(?:_.*)?"), re.compile(r"(.+)_\d{6}_\d{6}"))
"""Names that tell what a clip was cut from: v_Archery_g07_c02 (UCF-101), YOUTUBEID_000010_000020 (Kinetics)."""


class Split(NamedTuple):
    """A data set in two parts, which share their classes."""

    training: Listing
    validation: Listing
    num_groups: int
    """Groups whose clips stayed together; 0 where no name tells of any, and every file stands for itself."""


def group_of(path: str | Path) -> str | None:
    """What the name of a file says that it was cut from, such as "v_Archery_g07"; None if it says nothing."""
    stem = Path(path).stem
    return next((found[1] for pattern in _GROUPS if (found := pattern.fullmatch(stem))), None)


def split_listing(listing: Listing, val_fraction: float, seed: int = 0, *, limit: int | None = None) -> Split:
    """Part every class so that about `val_fraction` of its videos are for validation.

    Clips of one group (`group_of`) are never parted, so that the share of a class may differ by half of a group. A
    class of two groups or more has videos in both parts; one of a single group is for training alone. Which groups are
    taken depends on the seed and their names, not on where the folder lies.

    Args:
        listing: the videos.
        val_fraction: above 0 and below 1.
        seed: another one takes other groups.
        limit: take the first so many videos of the listing only, at least 1.

    Raises:
        InvalidArgumentError: if an argument is out of range, or no class can be parted.
    """
    if not 0 < val_fraction < 1:
        raise InvalidArgumentError(f"val_fraction is {val_fraction}; above 0 and below 1 is needed")
    at_least(1, limit=limit)
    videos = listing.videos[:limit]
    root = os.path.commonpath([os.path.dirname(path) for path, _ in videos])  # noqa: PTH120 (100,000s of files)
    named = {path: group_of(path) for path, _ in videos}
    groups = {path: name or os.path.relpath(path, root) for path, name in named.items()}
    sizes: dict[int, Counter[str]] = defaultdict(Counter)
    for path, label_id in videos:
        sizes[label_id][groups[path]] += 1
    chosen: dict[str, bool] = {}  # a group may hold clips of several classes
    for label_id in sorted(sizes):
        _choose(sizes[label_id], val_fraction, seed, chosen)
    if not any(chosen.values()):
        raise InvalidArgumentError(
            f"{listing.source}: no class has two videos or two groups of them, so that nothing can be parted; "
            "leave val_fraction out"
        )
    training, validation = (
        replace(listing, videos=tuple(video for video in videos if chosen[groups[video[0]]] is wanted))
        for wanted in (False, True)
    )
    return Split(training, validation, len({name for name in named.values() if name is not None}))


def _choose(sizes: Mapping[str, int], val_fraction: float, seed: int, chosen: dict[str, bool]) -> None:
    """Say of each group of a class whether it is for validation; those that are in `chosen` already stay."""
    free = sorted(
        (group for group in sizes if group not in chosen),
        key=lambda group: derive_seed(seed, int.from_bytes(os.fsencode(group), "big")),
    )
    target = val_fraction * sum(sizes.values())
    taken = sum(size for group, size in sizes.items() if chosen.get(group))
    for group in free:
        chosen[group] = len(sizes) > 1 and taken + sizes[group] / 2 <= target
        taken += sizes[group] if chosen[group] else 0
    for wanted in (False, True):  # both parts need one
        if len(sizes) > 1 and free and not any(chosen[group] is wanted for group in sizes):
            chosen[min(free, key=sizes.__getitem__)] = wanted

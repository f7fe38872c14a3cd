"""Videos that stand in a data set twice, or in both splits: by path, by content, by name."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_HASHED_BYTES = 64 * 1024


class Duplicate(NamedTuple):
    """Two videos that are the same, or may be."""

    path: str
    """A video of the manifest."""
    other: str
    """Another one, of the same manifest or of the other split."""
    reason: str
    """"same file", "same content" (size and the first 64 KiB) or "same name" (content differs)."""

    def __str__(self) -> str:
        return f"{self.path} = {self.other} ({self.reason})"


def find_duplicates(paths: Sequence[str], sizes: Mapping[str, int]) -> tuple[Duplicate, ...]:
    """Videos that stand in a list twice, by path or by content; `sizes` in bytes are those of the files that exist."""
    same = [Duplicate(path, path, "same file") for path, count in Counter(paths).items() if count > 1]
    same += [Duplicate(path, first, "same content") for first, *more in _by_content(sizes) for path in more]
    return tuple(same)


def compare_splits(sizes: Mapping[str, int], others: Iterable[str]) -> tuple[Duplicate, ...]:
    """Videos of this split that stand in another one too, by path, content or name; `sizes` as above."""
    other_sizes: dict[str, int] = {}
    for path in others:
        try:
            other_sizes[path] = os.stat(path).st_size  # noqa: PTH116 (100,000s of files)
        except OSError:
            continue
    found = [Duplicate(path, path, "same file") for path in sizes if path in other_sizes]
    common = set(sizes.values()) & set(other_sizes.values())
    both = {path: size for path, size in {**other_sizes, **sizes}.items() if size in common}
    for group in _by_content(both):
        ours = [path for path in group if path in sizes]
        theirs = [path for path in group if path in other_sizes]
        found += [Duplicate(path, theirs[0], "same content") for path in ours if theirs and path not in other_sizes]
    told = {duplicate.path for duplicate in found}
    by_name = {Path(path).stem: path for path in other_sizes}
    names = ((path, by_name.get(Path(path).stem)) for path in sizes if path not in told)
    return (*found, *(Duplicate(path, other, "same name") for path, other in names if other is not None))


def _by_content(sizes: Mapping[str, int]) -> list[list[str]]:
    """Groups of two or more files of the same size with the same first 64 KiB; only files of equal size are read."""
    by_size: dict[int, list[str]] = defaultdict(list)
    for path, size in sizes.items():
        if size:
            by_size[size].append(path)
    by_content: dict[tuple[int, bytes], list[str]] = defaultdict(list)
    for size, paths in by_size.items():
        for path in paths if len(paths) > 1 else ():
            try:
                with open(path, "rb") as stream:  # noqa: PTH123 (100,000s of files)
                    digest = hashlib.blake2b(stream.read(_HASHED_BYTES)).digest()
            except OSError:
                continue
            by_content[size, digest].append(path)
    return [group for group in by_content.values() if len(group) > 1]

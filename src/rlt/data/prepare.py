"""From a listing to a manifest: look into every video, check the data set, and say what was found."""

from __future__ import annotations

import hashlib
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlt.data.listings import Listing, check_some_exist
from rlt.data.manifest import Manifest, VideoEntry, check_manifest_path, read_manifest, write_manifest
from rlt.data.probing import MISSING, Probe, ProbeRecord, Progress, probe_videos
from rlt.errors import InvalidArgumentError

MIN_FRAMES = 16
"""Videos with fewer frames are reported: a clip of 16 repeats their last frame."""

_HASHED_BYTES = 64 * 1024


class Duplicate(NamedTuple):
    """Two videos that are the same, or may be."""

    path: str
    """A video of the manifest."""
    other: str
    """Another one, of the same manifest or of the other split."""
    reason: str
    """"same file", "same content" (size and the first 64 KiB) or "same name" (content differs)."""


@dataclass(frozen=True)
class PrepareReport:
    """What was prepared, and what deserves a look before training on it."""

    output: str
    """The manifest that was written."""
    num_videos: int
    """Videos in the manifest."""
    num_classes: int
    """Classes of the data set."""
    num_usable: int
    """Videos with status "ok"."""
    num_probed: int
    """Files that were looked at now."""
    num_resumed: int
    """Files that were on record from an interrupted run and have not changed since."""
    missing: tuple[str, ...]
    """Paths of videos that do not exist."""
    unreadable: tuple[tuple[str, str], ...]
    """Path and reason of each file that cannot be used."""
    short: tuple[str, ...]
    """Paths of videos with fewer than `MIN_FRAMES` frames; they can be used."""
    empty_classes: tuple[str, ...]
    """Classes without any video that can be used."""
    duplicates: tuple[Duplicate, ...]
    """Videos that stand in the manifest twice."""
    other_split: str | None
    """The manifest that this one was compared with."""
    between_splits: tuple[Duplicate, ...]
    """Videos that stand in both manifests, the surest reason for each. Numbered files may share names by chance."""
    class_names_differ: bool
    """Whether the other split has other classes or another order of them, so that label ids do not agree."""
    tokens_kept: float | None
    """Mean share of the tokens that the clips in the middle keep at threshold 0.1; None if it was not measured."""

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        values = asdict(self)
        for name in ("duplicates", "between_splits"):
            values[name] = [duplicate._asdict() for duplicate in getattr(self, name)]
        values["unreadable"] = [{"path": path, "status": status} for path, status in self.unreadable]
        return values


def prepare(
    listing: Listing,
    output: str | Path,
    *,
    workers: int | None = None,
    limit: int | None = None,
    measure_tokens: bool = False,
    other_split: str | Path | None = None,
    on_progress: Progress | None = None,
) -> PrepareReport:
    """Look into all videos of a listing and write the manifest.

    A run that was interrupted leaves `<output>.partial`; the next one with the same output goes on from there, and
    looks again at files whose size or time of change differs. The file is removed at the end.

    Args:
        listing: the videos, from `rlt.data.listings` or `rlt.data.sources`.
        output: manifest to write, .parquet or .csv.
        workers: threads; the number of cores without it.
        limit: take the first so many videos of the listing only.
        measure_tokens: also measure `VideoEntry.tokens_kept`, which decodes a clip of every video.
        other_split: manifest of another split, to look for videos that stand in both.
        on_progress: called with (done, total, name) after every video.

    Raises:
        InvalidArgumentError: if none of the videos exists, a number is out of range, or a file cannot be written.
        MissingDependencyError: for Parquet without pyarrow.
    """
    target = check_manifest_path(output)
    for name, value in (("workers", workers), ("limit", limit)):
        if value is not None and value < 1:
            raise InvalidArgumentError(f"{name} is {value}; at least 1 is needed")
    other = None if other_split is None else read_manifest(other_split)
    check_some_exist(listing)
    candidates = listing.candidates[:limit]
    _check_names(target, (candidate.path for candidate in candidates))
    partial = target.with_name(target.name + ".partial")
    with ProbeRecord(partial) as record:
        probes, num_probed = probe_videos(
            [candidate.path for candidate in candidates],
            record,
            workers=workers or os.cpu_count() or 1,
            measure_tokens=measure_tokens,
            on_progress=on_progress,
        )
    entries = tuple(
        _entry(probes[candidate.path], candidate.label_id, candidate.label, measure_tokens) for candidate in candidates
    )
    manifest = Manifest(entries, listing.class_names)
    write_manifest(manifest, target)
    partial.unlink(missing_ok=True)
    shares = [entry.tokens_kept for entry in entries if entry.tokens_kept is not None]
    sizes = {path: seen.size for path, seen in probes.items() if seen.status != MISSING}
    return PrepareReport(
        output=str(target),
        num_videos=len(entries),
        num_classes=len(manifest.class_names),
        num_usable=len(manifest.usable),
        num_probed=num_probed,
        num_resumed=len(probes) - num_probed,
        missing=tuple(entry.path for entry in entries if entry.status == MISSING),
        unreadable=tuple(
            (entry.path, entry.status) for entry in entries if entry.status != MISSING and not entry.usable
        ),
        short=tuple(entry.path for entry in manifest.usable if entry.frames < MIN_FRAMES),
        empty_classes=_empty_classes(manifest),
        duplicates=find_duplicates([entry.path for entry in entries], sizes),
        other_split=None if other_split is None else str(other_split),
        between_splits=() if other is None else compare_splits(sizes, [entry.path for entry in other.entries]),
        class_names_differ=other is not None and other.class_names != manifest.class_names,
        tokens_kept=statistics.fmean(shares) if shares else None,
    )


def _check_names(target: Path, paths: Iterable[str]) -> None:
    if target.suffix.lower() == ".csv":
        return
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError(
                f"{path!r}: a name that is not valid UTF-8, which Parquet needs; rename it, or write a .csv manifest"
            ) from None


def _entry(seen: Probe, label_id: int, label: str, measure_tokens: bool) -> VideoEntry:
    return VideoEntry(
        path=seen.path,
        label_id=label_id,
        label=label,
        frames=seen.frames,
        fps=seen.fps,
        width=seen.width,
        height=seen.height,
        duration=seen.duration,
        status=seen.status,
        tokens_kept=seen.tokens_kept if measure_tokens else None,
    )


def _empty_classes(manifest: Manifest) -> tuple[str, ...]:
    used = {entry.label_id for entry in manifest.usable}
    return tuple(name for label_id, name in enumerate(manifest.class_names) if label_id not in used)


# ---- duplicates --------------------------------------------------------------------------------------------------


def find_duplicates(paths: Sequence[str], sizes: Mapping[str, int]) -> tuple[Duplicate, ...]:
    """Videos that stand in a list twice, by path or by content.

    Args:
        paths: all paths of the list.
        sizes: size in bytes of each file that exists, by path.
    """
    counts: dict[str, int] = defaultdict(int)
    for path in paths:
        counts[path] += 1
    same = [Duplicate(path, path, "same file") for path, count in counts.items() if count > 1]
    same += [Duplicate(path, first, "same content") for first, *more in _by_content(sizes) for path in more]
    return tuple(same)


def compare_splits(sizes: Mapping[str, int], others: Iterable[str]) -> tuple[Duplicate, ...]:
    """Videos of this split that stand in another one too, by path, content or name.

    Args:
        sizes: size in bytes of each file of this split that exists, by path.
        others: paths of the other split.
    """
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

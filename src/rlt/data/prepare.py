"""From a listing to a manifest: look into every video, check the data set, and say what was found."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlt.checks import at_least
from rlt.data.duplicates import Duplicate, compare_splits, find_duplicates
from rlt.data.listings import Listing, check_some_exist
from rlt.data.manifest import Manifest, check_manifest_path, check_unicode, read_manifest, write_manifest
from rlt.data.probing import MISSING, Probe, ProbeRecord, Progress, probe_videos
from rlt.data.splitting import Split
from rlt.errors import RltError
from rlt.files import refuse_inputs

MIN_FRAMES = 16
"""Videos with fewer frames are reported: a clip of 16 repeats their last frame."""

_REPORTED = (
    "output", "num_videos", "num_classes", "num_usable", "num_probed", "num_resumed", "missing", "unreadable", "short",
    "empty_classes", "duplicates", "other_split", "between_splits", "class_names_differ", "tokens_kept",
)  # fmt: skip


@dataclass(frozen=True)
class PrepareReport:
    """What was prepared, and what deserves a look before training on it."""

    output: str
    """The manifest that was written."""
    manifest: Manifest
    """What it holds."""
    num_probed: int
    """Files that were looked at now."""
    num_resumed: int
    """Files that were on record from an interrupted run and have not changed since."""
    duplicates: tuple[Duplicate, ...]
    """Videos that stand in the manifest twice."""
    other_split: str | None
    """The manifest that this one was compared with."""
    between_splits: tuple[Duplicate, ...]
    """Videos that stand in both manifests, the surest reason for each. Numbered files may share names by chance."""
    class_names_differ: bool
    """Whether the other split has other classes or another order of them, so that label ids do not agree."""

    @property
    def num_videos(self) -> int:
        """Videos in the manifest."""
        return len(self.manifest)

    @property
    def num_classes(self) -> int:
        """Classes of the data set."""
        return len(self.manifest.class_names)

    @property
    def num_usable(self) -> int:
        """Videos with status "ok"."""
        return len(self.manifest.usable)

    @property
    def missing(self) -> list[str]:
        """Paths of videos that do not exist."""
        return [entry.path for entry in self.manifest.entries if entry.status == MISSING]

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """Path and reason of each file that cannot be used."""
        broken = (entry for entry in self.manifest.entries if not entry.usable and entry.status != MISSING)
        return [(entry.path, entry.status) for entry in broken]

    @property
    def short(self) -> list[str]:
        """Paths of videos with fewer than `MIN_FRAMES` frames; they can be used."""
        return [entry.path for entry in self.manifest.usable if entry.frames < MIN_FRAMES]

    @property
    def empty_classes(self) -> list[str]:
        """Classes without any video that can be used."""
        used = {entry.label_id for entry in self.manifest.usable}
        return [name for label_id, name in enumerate(self.manifest.class_names) if label_id not in used]

    @property
    def tokens_kept(self) -> float | None:
        """Mean share of the tokens that the clips in the middle keep at threshold 0.1; None if it was not measured."""
        shares = [entry.tokens_kept for entry in self.manifest.entries if entry.tokens_kept is not None]
        return statistics.fmean(shares) if shares else None

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        values = {name: getattr(self, name) for name in _REPORTED}
        values["unreadable"] = [{"path": path, "status": status} for path, status in self.unreadable]
        for name in ("duplicates", "between_splits"):
            values[name] = [pair._asdict() for pair in values[name]]
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
        measure_tokens: also measure `VideoEntry.tokens_kept`, which decodes a clip of every video. Without it what
            the manifest of before says of a video that has not changed stays.
        other_split: manifest of another split, to look for videos that stand in both.
        on_progress: called with (done, total, name) after every video.
    """
    target = check_manifest_path(output)
    at_least(1, workers=workers, limit=limit)
    refuse_inputs([target], [listing.source] if other_split is None else [listing.source, other_split])
    other = None if other_split is None else read_manifest(other_split)
    check_some_exist(listing)
    paths = [path for path, _ in listing.videos[:limit]]
    check_unicode(target, paths)  # told before the work, not after it
    partial = target.with_name(target.name + ".partial")
    with ProbeRecord(partial) as record:
        probes, num_probed = probe_videos(
            paths,
            record,
            workers=workers or os.cpu_count() or 1,
            measure_tokens=measure_tokens,
            on_progress=on_progress,
        )
    measured = _measured_before(target, probes)
    entries = []
    for path, label_id in listing.videos[:limit]:
        seen = probes[path].entry
        kept = measured.get(path) if seen.tokens_kept is None else seen.tokens_kept
        entries.append(replace(seen, label_id=label_id, label=listing.class_names[label_id], tokens_kept=kept))
    manifest = Manifest(tuple(entries), listing.class_names)
    write_manifest(manifest, target)
    partial.unlink(missing_ok=True)
    sizes = {path: seen.size for path, seen in probes.items() if seen.entry.status != MISSING}
    return PrepareReport(
        output=str(target),
        manifest=manifest,
        num_probed=num_probed,
        num_resumed=len(probes) - num_probed,
        duplicates=find_duplicates(paths, sizes),
        other_split=None if other_split is None else str(other_split),
        between_splits=() if other is None else compare_splits(sizes, [entry.path for entry in other.entries]),
        class_names_differ=other is not None and other.class_names != manifest.class_names,
    )


def prepare_split(
    split: Split,
    output: str | Path,
    *,
    workers: int | None = None,
    measure_tokens: bool = False,
    on_progress: Progress | None = None,
) -> list[PrepareReport]:
    """Write a manifest of each part, "x.csv" as "x_train.csv" and "x_val.csv"; other arguments are those of `prepare`.

    Returns:
        The report on training, and the one on validation, which names what stands in both.
    """
    target = check_manifest_path(output)
    parts = {"train": split.training, "val": split.validation}
    total = sum(len(part.videos) for part in parts.values())
    for part in parts.values():
        check_unicode(target, (path for path, _ in part.videos))
    reports: list[PrepareReport] = []
    for name, part in parts.items():
        before = sum(report.num_videos for report in reports)

        def tell(done: int, _: int, video: str, before: int = before) -> None:
            if on_progress is not None:
                on_progress(before + done, total, video)

        report = prepare(
            part,
            target.with_name(f"{target.stem}_{name}{target.suffix}"),
            workers=workers,
            measure_tokens=measure_tokens,
            other_split=reports[0].output if reports else None,
            on_progress=tell,
        )
        reports.append(report)
    return reports


def _measured_before(target: Path, probes: Mapping[str, Probe]) -> dict[str, float]:
    """`VideoEntry.tokens_kept` of the manifest that is about to be replaced, of videos that are as they were then."""
    try:
        written = target.stat().st_mtime_ns
        before = read_manifest(target).entries
    except (OSError, RltError):  # there is none, or it is none
        return {}
    return {
        entry.path: entry.tokens_kept
        for entry in before
        if entry.tokens_kept is not None
        and (probe := probes.get(entry.path)) is not None
        and probe.modified <= written
        and replace(probe.entry, label_id=entry.label_id, label=entry.label, tokens_kept=entry.tokens_kept) == entry
    }

"""Kinetics and Something-Something v2: from their official label files to the videos and labels."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlt.checks import one_of
from rlt.data.labels import class_index, read_text
from rlt.data.listings import (
    Listing,
    check_folder,
    class_folder_listing,
    list_file_listing,
    make_listing,
    videos_by_stem,
)
from rlt.data.manifest import absolute_path
from rlt.errors import InvalidArgumentError

KINETICS = ("kinetics400", "kinetics600", "kinetics700")
"""Names of the Kinetics data sets."""

_KINETICS_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def kinetics_listing(
    dataset: str,
    videos: str | Path,
    *,
    csv_file: str | Path | None = None,
    names: Sequence[str] | None = None,
    split: str | None = None,
) -> Listing:
    """List Kinetics from an official CSV file, from a list of paths and labels, or from class folders.

    Args:
        dataset: one of `KINETICS`.
        videos: folder of the videos, `<youtube_id>_<start>_<end>.mp4` with six digits of seconds each or
            `<youtube_id>.mp4`, in any folder below it and with any extension of a video; class folders without a CSV.
        csv_file: official CSV file (label, youtube_id, time_start, time_end, split), or a list file.
        names: class names in the order of label ids. Without it Kinetics-400 has the published order, the others the
            sorted order of the names found.
        split: value of the column split of the lines to take; needed where a file holds several.
    """
    one_of(KINETICS, dataset=dataset)
    folder = check_folder(videos)
    index = class_index(names, dataset)
    if csv_file is None:
        return class_folder_listing(folder, index=index, underscores=False)
    file = absolute_path(csv_file)
    rows = _official_rows(file)
    if rows is None:
        return list_file_listing(file, videos=folder, index=index)
    rows = _of_split(rows, split, file)
    found = videos_by_stem(folder)

    def find(row: Mapping[str, str]) -> Path:
        stem = _kinetics_stem(row, file)
        return found.get(stem) or found.get(row["youtube_id"]) or folder / f"{stem}.mp4"

    return make_listing(file, index, (row["label"] for row in rows), ((find(row), row["label"]) for row in rows))


def _official_rows(file: Path) -> list[dict[str, str]] | None:
    """Rows of an official CSV file; None if this is a list of paths and labels."""
    lines = csv.reader(read_text(file).splitlines())
    header = [name.strip() for name in next(lines, [])]
    if "youtube_id" not in header:
        return None
    missing = [name for name in _KINETICS_COLUMNS if name not in header]
    if missing == ["label"]:
        raise InvalidArgumentError(f"{file}: no column label, as in lists of test videos; give a list with labels")
    if missing:
        raise InvalidArgumentError(f"{file}: no column {', '.join(missing)}; give the official CSV file")
    rows = []
    try:
        for row in lines:
            if row:
                if len(row) != len(header):
                    raise InvalidArgumentError(
                        f"{file}, line {lines.line_num}: {len(row)} columns; {len(header)} are needed as in the first "
                        "line"
                    )
                rows.append(dict(zip(header, row, strict=True)) | {"line": str(lines.line_num)})
    except csv.Error as error:
        raise InvalidArgumentError(f"{file}, line {lines.line_num}: {error}; give the official CSV file") from None
    if not rows:
        raise InvalidArgumentError(f"{file}: no video in it; give the official CSV file")
    return rows


def _of_split(rows: list[dict[str, str]], split: str | None, file: Path) -> list[dict[str, str]]:
    held = sorted({row.get("split", "") for row in rows})
    if split is None and len(held) > 1:
        raise InvalidArgumentError(f"{file}: it holds the splits {', '.join(held)}; choose one with --split")
    if split is not None and split not in held:
        raise InvalidArgumentError(f"{file}: no split {split!r}; it holds {', '.join(held)}")
    return rows if split is None else [row for row in rows if row.get("split", "") == split]


def _kinetics_stem(row: Mapping[str, str], file: Path) -> str:
    try:
        start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
    except (ValueError, OverflowError):  # OverflowError: infinite
        raise InvalidArgumentError(
            f"{file}, line {row['line']}: time_start {row['time_start']!r}, time_end {row['time_end']!r}; "
            "two numbers of seconds are needed"
        ) from None
    return f"{row['youtube_id']}_{start:06d}_{end:06d}"


def ssv2_listing(annotations: str | Path, videos: str | Path, *, names: Sequence[str] | None = None) -> Listing:
    """List Something-Something v2 from an official JSON list of {"id", "template", ...}, or from a list file.

    Videos are `<id>.webm` (or another extension of a video) in the folder `videos` or below it; `names` are the
    templates in the order of label ids, the published ones without it.
    """
    folder = check_folder(videos)
    file = absolute_path(annotations)
    index, text = class_index(names, "ssv2"), read_text(file)
    if not re.match(r"\s*[\[{]", text):
        return list_file_listing(file, videos=folder, index=index)
    entries = _ssv2_entries(text, file)
    found = videos_by_stem(folder)
    paths = ((found.get(name) or folder / f"{name}.webm", template) for name, template in entries)
    return make_listing(file, index, (template for _, template in entries), paths)


def _ssv2_entries(text: str, file: Path) -> list[tuple[str, str]]:
    """(id, template) of each entry."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{file}: not a JSON file ({error}); give the official annotations") from None
    if not isinstance(content, list) or not all(isinstance(entry, dict) and "id" in entry for entry in content):
        raise InvalidArgumentError(
            f"{file}: not the annotations of Something-Something v2; a list of entries with id and template is needed"
        )
    if not content:
        raise InvalidArgumentError(f"{file}: no video in it; give the official annotations")
    entries = []
    for entry in content:
        if not isinstance(entry.get("template"), str):
            raise InvalidArgumentError(
                f"{file}: entry {entry['id']} has no template, as in the test annotations; "
                "give the annotations for training or validation"
            )
        entries.append((str(entry["id"]), entry["template"]))
    return entries

"""From class folders or a list file to the videos of a data set with their labels; no video is opened here."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rlt.checks import some
from rlt.data.labels import ClassIndex, read_text
from rlt.data.manifest import MAX_LABEL_ID, absolute_path
from rlt.errors import InvalidArgumentError
from rlt.video import VIDEO_EXTENSIONS, videos_below

_SPLITS = frozenset({"train", "training", "val", "valid", "validate", "validation", "test", "testing"})
_LIST_HEADERS = frozenset({"path", "video", "video_path", "file", "filename", "video_name"})
_RAW_FRAMES = re.compile(r"(.+?)[ ,\t](\d+)[ ,\t](\d+)")


@dataclass(frozen=True)
class Listing:
    """What a data set says about itself, before anybody looks at the videos."""

    source: str
    """Where it comes from, for messages."""
    videos: tuple[tuple[str, int], ...]
    """Absolute path and label id of each video in the order of the source; the file may be missing or broken."""
    class_names: tuple[str, ...]
    """Name of each class, by label id."""


def make_listing(source: Path, index: ClassIndex, videos: Iterable[tuple[Path, int]]) -> Listing:
    """The listing of `source`, which gives these videos these label ids of `index`."""
    return Listing(str(source), tuple((str(path), label_id) for path, label_id in videos), index.names)


def folder_listing(
    source: str | Path, *, videos: str | Path | None = None, names: Sequence[str] | None = None
) -> Listing:
    """List a folder of class folders, `SOURCE/<class>/**/video`, or a list file with a path and a label per line.

    Label ids count the classes in the sorted order of their names, unless `names` gives the order. `videos` is the
    folder where the paths of a list file start.
    """
    root = absolute_path(source)
    if not root.exists():
        raise InvalidArgumentError(f"{source}: no such folder or list file; check the path")
    index = None if names is None else ClassIndex(names, origin="--labels")
    if not root.is_dir():
        return list_file_listing(root, videos=videos, index=index)
    if videos is not None:
        raise InvalidArgumentError(f"{source} is a folder, so --videos {videos} has no use; leave it out")
    return class_folder_listing(root, index=index)


def class_folder_listing(root: Path, *, index: ClassIndex | None = None, underscores: bool = True) -> Listing:
    """List `root/<class>/**/video`, with label ids from `index`.

    Without it folders name the classes, sorted, with spaces for underscores unless `underscores` keeps them.
    """
    try:
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InvalidArgumentError(f"{root}: cannot be read ({error.strerror}); check the path") from None
    found = {folder.name: list(videos_below(folder, follow_links=True)) for folder in folders}
    if not any(found.values()):
        raise InvalidArgumentError(
            f"{root}: no videos in class folders ({root.name}/<class>/video.mp4) were found; "
            "sort the videos into one folder per class, or give a list file with a path and a label per line"
        )
    if all(name.lower() in _SPLITS for name in found):
        raise InvalidArgumentError(f"{root} holds splits ({', '.join(found)}), not classes; prepare each of them alone")
    names = {name: name if index or underscores else name.replace("_", " ") for name in found}
    index = index or sorted_index(names.values(), origin=str(root))
    label_ids = index.find_all(names.values(), source=str(root))
    return make_listing(
        root, index, ((path, label_ids[names[name]]) for name, paths in found.items() for path in paths)
    )


def list_file_listing(file: Path, *, videos: str | Path | None = None, index: ClassIndex | None = None) -> Listing:
    """List a text file with a path and a label per line, parted by a tab, a space or a comma.

    Labels are whole numbers, or names. Names get their ids in sorted order, and numbers get names such as "class 7",
    unless `index` gives both. Paths start at the folder `videos`, or that of the list. What they start with may differ
    from the folders on this machine: the longest end of a path that exists in `videos` is taken.
    """
    rows = list(_list_rows(file))
    if not rows:
        raise InvalidArgumentError(f"{file}: no line with a path and a label; check the file")
    by_number = all(row.label.isdecimal() for row in rows)
    if index is None:
        found = sorted({row.label for row in rows})
        highest = max(int(name) for name in found) if by_number else 0
        if highest > MAX_LABEL_ID:
            raise InvalidArgumentError(f"{file}: label {highest} is no label id; 0 to {MAX_LABEL_ID} is allowed")
        names = [f"class {label_id}" for label_id in range(highest + 1)] if by_number else found
        index = ClassIndex(names, origin=str(file))
    if by_number:
        label_ids = {row.label: int(row.label) for row in rows}
        for row in rows:
            index.check(int(row.label), source=f"{file}, line {row.line}")
    else:
        label_ids = index.find_all({row.label for row in rows}, source=str(file))
    folder = file.parent if videos is None else check_folder(videos)
    find = Path.joinpath if videos is None else find_by_end
    return make_listing(file, index, ((absolute_path(find(folder, row.path)), label_ids[row.label]) for row in rows))


class _ListRow(NamedTuple):
    line: int
    path: str
    label: str


def _list_rows(file: Path) -> Iterator[_ListRow]:
    text = read_text(file)
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        return
    separator = _separator(lines[0][1] if len(lines) == 1 else lines[1][1])
    for number, line in lines:
        frames = _RAW_FRAMES.fullmatch(line)
        if frames and Path(frames[1]).suffix.lower() not in VIDEO_EXTENSIONS:
            raise InvalidArgumentError(
                f"{file}, line {number}: a folder of raw frames (folder, number of frames, label), which is not "
                "supported; give a list of video files"
            )
        if separator == ",":
            cells = next(csv.reader([line], skipinitialspace=True))
            path, label = cells[0], ",".join(cells[1:])
        else:
            path, _, label = line.rpartition(separator)
        path, label = path.strip(), label.strip()
        if number == lines[0][0] and path.lower() in _LIST_HEADERS:
            continue
        if not path or not label:
            raise InvalidArgumentError(
                f"{file}, line {number}: {line!r}; a path and a label, parted by a tab, a space or a comma, are needed"
            )
        yield _ListRow(number, path, label)


def _separator(line: str) -> str:
    """What parts path and label: a space only before a number, since names of files and classes hold spaces."""
    if "\t" in line:
        return "\t"
    if re.fullmatch(r".+ \d+", line) or "," not in line:
        return " "
    return ","


def check_folder(folder: str | Path) -> Path:
    """The folder as an absolute path; it must exist."""
    path = absolute_path(folder)
    if not path.is_dir():
        raise InvalidArgumentError(f"{folder}: no such folder; give the folder of the videos with --videos")
    return path


def find_by_end(folder: Path, name: str) -> Path:
    """The file in `folder` that ends as `name` does, as much of it as possible; `folder / name` if there is none."""
    whole = folder / name
    if whole.exists():
        return whole
    parts = Path(name).parts
    ends = (folder.joinpath(*parts[start:]) for start in range(1, len(parts)))
    return next((path for path in ends if path.exists()), whole)


def videos_by_stem(folder: Path) -> dict[str, Path]:
    """Video files in a folder and all below it, by their names without extension; the first of equal names."""
    return {path.stem: path for path in reversed([*videos_below(folder, follow_links=True)])}


def sorted_index(names: Iterable[str], *, origin: str) -> ClassIndex:
    """The distinct names, at least one, in sorted order."""
    distinct = sorted(set(names))
    if not distinct or distinct == [""]:
        raise InvalidArgumentError(f"{origin}: it names no class; check the file")
    return ClassIndex(distinct, origin=origin)


def check_some_exist(listing: Listing) -> None:
    """Refuse a listing of which no file exists: the folder is wrong then, and nothing would be learnt."""
    paths = [path for path, _ in listing.videos]
    if not any(map(os.path.exists, paths)):
        raise InvalidArgumentError(
            f"{listing.source}: no video of {len(paths)} exists (looked for {some(paths, 1)}); "
            "give the folder of the videos with --videos"
        )

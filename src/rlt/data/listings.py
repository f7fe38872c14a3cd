"""From class folders or a list file to the videos of a data set with their labels; no video is opened here."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlt.checks import some
from rlt.data.labels import ClassIndex, class_index, read_text
from rlt.data.manifest import MAX_LABEL_ID, absolute_path
from rlt.errors import InvalidArgumentError, warn_caller
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


def make_listing(
    source: Path, index: ClassIndex | None, names: Iterable[str], videos: Iterable[tuple[Path, str]]
) -> Listing:
    """The listing of `source` with its classes, and each video with the name of its own.

    Without `index` label ids count the names in their sorted order.
    """
    distinct = sorted(set(names))
    if index is None and distinct in ([], [""]):
        raise InvalidArgumentError(f"{source}: it names no class; check the file")
    index = index or ClassIndex(distinct, origin=str(source))
    label_ids = index.find_all(distinct, source=str(source))
    return Listing(str(source), tuple((str(path), label_ids[name]) for path, name in videos), index.names)


def folder_listing(
    source: str | Path, *, videos: str | Path | None = None, names: Sequence[str] | None = None
) -> Listing:
    """List a folder of class folders, `SOURCE/<class>/**/video`, or a list file with a path and a label per line.

    Label ids count the classes in the sorted order of their names, unless `names` gives the order. `videos` is the
    folder where the paths of a list file start.
    """
    root = absolute_path(source)
    if not os.path.exists(root):  # noqa: PTH110 (as below)
        raise InvalidArgumentError(f"{source}: no such folder or list file; check the path")
    index = class_index(names)
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
    filled = {name: paths for name, paths in found.items() if paths}
    if all(name.lower() in _SPLITS for name in filled):
        raise InvalidArgumentError(
            f"{root} holds splits ({', '.join(filled)}), not classes; prepare each of them alone, such as "
            f"{root / next(iter(filled))}"
        )
    deeper = {str(path.relative_to(root).parent) for paths in filled.values() for path in paths}
    if not deeper & filled.keys():
        warn_caller(
            f"{root}: no video lies in {some([*filled])} itself, all lie deeper ({some(sorted(deeper))}); if those are "
            f"the classes, give the folder above them, such as {root / next(iter(filled))}",
            UserWarning,
        )
    names = {name: name if index or underscores else name.replace("_", " ") for name in found}
    return make_listing(
        root, index, names.values(), ((path, names[name]) for name, paths in found.items() for path in paths)
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
    folder = file.parent if videos is None else check_folder(videos)
    find = Path.joinpath if videos is None else find_by_end
    paths = [absolute_path(find(folder, path)) for _, path, _ in rows]
    labels = [label for *_, label in rows]
    if not all(map(str.isdecimal, labels)):
        return make_listing(file, index, labels, zip(paths, labels, strict=True))
    longest = max(labels, key=len)
    if len(longest) > 18:  # digits; Python converts no more than some thousands of them
        raise InvalidArgumentError(f"{file}: label {longest[:18]}... is no label id; 0 to {MAX_LABEL_ID} is allowed")
    label_ids = [*map(int, labels)]
    if index is None:
        highest = max(label_ids)
        if highest > MAX_LABEL_ID:
            raise InvalidArgumentError(f"{file}: label {highest} is no label id; 0 to {MAX_LABEL_ID} is allowed")
        index = ClassIndex([f"class {label_id}" for label_id in range(highest + 1)], origin=str(file))
    for (line, *_), label_id in zip(rows, label_ids, strict=True):
        index.check(label_id, source=f"{file}, line {line}")
    return Listing(str(file), tuple(zip(map(str, paths), label_ids, strict=True)), index.names)


def _list_rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """Number, path and label of each line."""
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
            try:
                cells = next(csv.reader([line], skipinitialspace=True))
            except csv.Error as error:
                raise InvalidArgumentError(f"{file}, line {number}: {error}; check the file") from None
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
        yield number, path, label


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
    if os.path.exists(whole):  # noqa: PTH110 (Path.exists raises for names that no file can have)
        return whole
    parts = Path(name).parts
    ends = (folder.joinpath(*parts[start:]) for start in range(1, len(parts)))
    return next((path for path in ends if os.path.exists(path)), whole)  # noqa: PTH110


def videos_by_stem(folder: Path) -> dict[str, Path]:
    """Video files in a folder and all below it, by their names without extension; the first of equal names."""
    return {path.stem: path for path in reversed([*videos_below(folder, follow_links=True)])}


def check_some_exist(listing: Listing) -> None:
    """Refuse a listing of which no file exists: the folder is wrong then, and nothing would be learnt."""
    paths = [path for path, _ in listing.videos]
    if not any(map(os.path.exists, paths)):
        raise InvalidArgumentError(
            f"{listing.source}: no video of {len(paths)} exists (looked for {some(paths, 1)}); "
            "give the folder of the videos with --videos"
        )

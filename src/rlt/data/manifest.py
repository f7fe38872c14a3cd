"""The manifest of a data set: one row per video with its label and what a look into the file found.

A manifest is a Parquet or a CSV file, by its extension. Parquet keeps the class names in the metadata of the file; in
CSV they are the columns label_id and label, and a class without any video has a row with an empty path, so that both
forms give back exactly what was written.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlt.data.tables import read_table, write_table
from rlt.errors import InvalidArgumentError, MissingDependencyError
from rlt.files import replacing

MANIFEST_EXTENSIONS = (".parquet", ".csv")
"""Extensions of the files that `write_manifest` writes and `read_manifest` reads."""

OK = "ok"
"""`VideoEntry.status` of a video that can be used."""

_CLASS_NAMES_KEY = "class_names"
_REMEDY = "write the manifest with `rlt prepare`"


@dataclass(frozen=True)
class VideoEntry:
    """One video of a data set. Numbers of a video that cannot be used are 0."""

    path: str
    """Absolute path of the file."""
    label_id: int
    """Number of the class, the position of its name in `Manifest.class_names`."""
    label: str
    """Name of the class."""
    frames: int
    """Frames in the video, at a constant rate of `fps`."""
    fps: float
    """Frames a second; the average if the rate varies."""
    width: int
    """Width of the picture as displayed, in pixels."""
    height: int
    """Height of the picture as displayed, in pixels."""
    duration: float
    """Length of the video stream in seconds."""
    status: str = OK
    """"ok", "missing", or one line that says why the file cannot be used."""
    tokens_kept: float | None = None
    """Share of the tokens that the clip in the middle keeps at threshold 0.1, 0 to 1; None if it was not measured."""

    @property
    def usable(self) -> bool:
        """Whether the video can be used: its status is "ok"."""
        return self.status == OK


COLUMNS = tuple(field.name for field in fields(VideoEntry))
"""Columns of a manifest, in their order in the file. All but tokens_kept must be there."""


@dataclass(frozen=True)
class Manifest:
    """The videos of a data set and the names of its classes."""

    entries: tuple[VideoEntry, ...]
    """All videos in the order of the source, those that cannot be used too."""
    class_names: tuple[str, ...]
    """Name of each class, by label id."""

    def __post_init__(self) -> None:
        """Hold that every label exists.

        Raises:
            InvalidArgumentError: naming the row (counted from 1), if its label is not that of `class_names`.
        """
        for row, entry in enumerate(self.entries, 1):
            if not 0 <= entry.label_id < len(self.class_names):
                raise InvalidArgumentError(
                    f"row {row} ({entry.path}): label_id is {entry.label_id}; "
                    f"0 to {len(self.class_names) - 1} is needed for {len(self.class_names)} classes"
                )
            if entry.label != self.class_names[entry.label_id]:
                raise InvalidArgumentError(
                    f"row {row} ({entry.path}): label is {entry.label!r}, but class {entry.label_id} is "
                    f"{self.class_names[entry.label_id]!r}; one label_id stands for one label"
                )

    def __len__(self) -> int:
        """Number of videos, those that cannot be used too."""
        return len(self.entries)

    @cached_property
    def usable(self) -> tuple[VideoEntry, ...]:
        """The videos that can be used: those with status "ok"."""
        return tuple(entry for entry in self.entries if entry.usable)


def absolute_path(path: str | Path) -> Path:
    """The path as an absolute one, without "..", which must not be cut out as text where it follows a link."""
    whole = Path(path).absolute()
    return whole.resolve() if ".." in whole.parts else whole


def check_manifest_path(path: str | Path) -> Path:
    """The path as an absolute one, if its extension is that of a manifest.

    Raises:
        InvalidArgumentError: for any other extension, or a folder.
        MissingDependencyError: for Parquet without pyarrow.
    """
    file = absolute_path(path)
    if file.suffix.lower() not in MANIFEST_EXTENSIONS:
        raise InvalidArgumentError(f"{path}: a manifest ends in {' or '.join(MANIFEST_EXTENSIONS)}; rename it")
    if file.is_dir():
        raise InvalidArgumentError(f"{path} is a folder; give the name of a manifest file")
    if file.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:  # told before the work, not after it
        raise MissingDependencyError(
            f'{path}: Parquet needs pyarrow; install it with `pip install "rlt[train]"`, or use a .csv manifest'
        )
    return file


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write a manifest, as Parquet or CSV by the extension of `path`, completely or not at all.

    Raises:
        InvalidArgumentError: if it has no entry, or the file cannot be written.
        MissingDependencyError: for Parquet without pyarrow.
    """
    target = check_manifest_path(path)
    if not manifest.entries:
        raise InvalidArgumentError(f"{path}: the manifest would hold no video; give a source with videos")
    if target.suffix.lower() == ".csv":
        _write_csv(manifest, target)
    else:
        _write_parquet(manifest, target)


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest. Relative paths of videos start at the folder of the manifest.

    Raises:
        InvalidArgumentError: naming file, row and column, if it is no manifest or holds no video.
        MissingDependencyError: for Parquet without pyarrow.
    """
    file = check_manifest_path(path)
    if not file.exists():
        raise InvalidArgumentError(f"{path}: no such file; {_REMEDY} first")
    class_names: tuple[str, ...] | None = None
    rows: Iterable[tuple[str, Mapping[str, object]]]
    if file.suffix.lower() == ".csv":
        rows = _csv_rows(file)
    else:
        rows, class_names = _parquet_rows(file)
    entries: list[VideoEntry] = []
    labels: dict[int, str] = {}
    for place, row in rows:
        entry = _to_entry(row, f"{path}: {place}")
        if labels.setdefault(entry.label_id, entry.label) != entry.label:
            raise InvalidArgumentError(
                f"{path}: {place}, column label: {entry.label!r}, but label_id {entry.label_id} was "
                f"{labels[entry.label_id]!r} before; one label_id stands for one label"
            )
        if entry.path:
            entries.append(_absolute(entry, file.parent))
    if not entries:
        raise InvalidArgumentError(f"{path}: the manifest holds no video; {_REMEDY} from a source with videos")
    try:
        return Manifest(tuple(entries), _names_by_id(labels) if class_names is None else class_names)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error}") from None


def _absolute(entry: VideoEntry, folder: Path) -> VideoEntry:
    if os.path.isabs(entry.path):  # noqa: PTH117 (100,000s of files)
        return entry
    values = {name: getattr(entry, name) for name in COLUMNS}
    return VideoEntry(**values | {"path": str(absolute_path(folder / entry.path))})


def _names_by_id(labels: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(labels.get(index, f"class {index}") for index in range(max(labels) + 1))


# ---- one row -----------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a text is needed")
    return value


def _whole(value: object) -> int:
    message = "a whole number of 0 or more is needed"
    try:
        number = int(value) if isinstance(value, str | int | float) else -1
    except (ValueError, OverflowError):
        raise ValueError(message) from None
    if number < 0 or (isinstance(value, float) and number != value):
        raise ValueError(message)
    return number


def _number(value: object) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) else -1.0
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError("a number of 0 or more is needed")
    return number


def _optional_number(value: object) -> float | None:
    return None if value is None or value == "" else _number(value)


_CONVERTERS: dict[str, Callable[[object], Any]] = {
    "path": _text,
    "label_id": _whole,
    "label": _text,
    "frames": _whole,
    "fps": _number,
    "width": _whole,
    "height": _whole,
    "duration": _number,
    "status": _text,
    "tokens_kept": _optional_number,
}


def _to_entry(row: Mapping[str, object], place: str) -> VideoEntry:
    values: dict[str, Any] = {}
    for name, convert in _CONVERTERS.items():
        try:
            values[name] = convert(row.get(name))
        except ValueError as error:
            raise InvalidArgumentError(f"{place}, column {name}: {row.get(name)!r}; {error}, {_REMEDY}") from None
    return VideoEntry(**values)


def _check_columns(found: Sequence[str], file: Path) -> None:
    missing = [name for name in COLUMNS if name not in found and name != "tokens_kept"]
    if missing:
        raise InvalidArgumentError(
            f"{file}: no column {', '.join(missing)}; a manifest has {', '.join(COLUMNS)}, {_REMEDY}"
        )


# ---- CSV ---------------------------------------------------------------------------------------------------------


def _write_csv(manifest: Manifest, file: Path) -> None:
    with (
        replacing(file) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        # All texts are quoted, since names may hold commas, quotes and line breaks.
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(COLUMNS)
        for entry in manifest.entries:
            values = [getattr(entry, name) for name in COLUMNS]
            writer.writerow(["" if value is None else value for value in values])
        used = {entry.label_id for entry in manifest.entries}
        for label_id, label in enumerate(manifest.class_names):
            if label_id not in used:
                writer.writerow(["", label_id, label, 0, 0.0, 0, 0, 0.0, "class without videos", ""])


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            _check_columns(header, file)
            for number, row in enumerate(reader, 1):
                if not row:
                    continue
                if len(row) != len(header):
                    raise InvalidArgumentError(
                        f"{file}: row {number} (line {reader.line_num}) has {len(row)} columns; "
                        f"{len(header)} are needed, quote texts that hold commas"
                    )
                yield f"row {number} (line {reader.line_num})", dict(zip(header, row, strict=True))
    except (OSError, csv.Error) as error:
        raise InvalidArgumentError(f"{file}: not a CSV file that can be read ({error}); {_REMEDY}") from None


# ---- Parquet -----------------------------------------------------------------------------------------------------


def _write_parquet(manifest: Manifest, file: Path) -> None:
    columns: dict[str, list[Any]] = {
        name: [convert(getattr(entry, name)) for entry in manifest.entries] for name, convert in _CONVERTERS.items()
    }
    if not any(share is not None for share in columns["tokens_kept"]):
        del columns["tokens_kept"]  # a column of nothing has no type
    try:
        write_table(file, columns, {_CLASS_NAMES_KEY: json.dumps(manifest.class_names)})
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"{error.object!r} is not valid Unicode, which Parquet needs; rename the file, or write a .csv manifest"
        ) from None


def _parquet_rows(file: Path) -> tuple[Iterator[tuple[str, dict[str, object]]], tuple[str, ...] | None]:
    columns, metadata = read_table(file)
    _check_columns(list(columns), file)
    try:
        stored = metadata.get(_CLASS_NAMES_KEY)
        class_names = None if stored is None else tuple(map(str, json.loads(stored)))
    except (ValueError, TypeError):
        raise InvalidArgumentError(f"{file}: its class names cannot be read; {_REMEDY}") from None
    names = [name for name in COLUMNS if name in columns]
    rows = (
        (f"row {number}", dict(zip(names, values, strict=True)))
        for number, values in enumerate(zip(*(columns[name] for name in names), strict=True), 1)
    )
    return rows, class_names

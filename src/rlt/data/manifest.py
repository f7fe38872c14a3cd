"""The manifest of a data set: one row per video with its label and what a look into the file found.

A manifest is a Parquet or a CSV file, by its extension, and `VideoEntry` is the schema of both. Parquet keeps the class
names in the metadata of the file; in CSV they are the columns label_id and label, and a class without any video has a
row with an empty path, so that both forms give back exactly what was written. CSV is written and read without pyarrow,
whose writer refuses names of files that are no Unicode and whose reader knows no line numbers.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
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

MAX_LABEL_ID = 99_999
"""Largest label id where no list of classes says how many there are; larger ones are numbers of something else."""

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
    frames: int = 0
    """Frames in the video, at a constant rate of `fps`."""
    fps: float = 0.0
    """Frames a second; the average if the rate varies."""
    width: int = 0
    """Width of the picture as displayed, in pixels."""
    height: int = 0
    """Height of the picture as displayed, in pixels."""
    duration: float = 0.0
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
    """The videos of a data set and the names of its classes.

    Raises:
        InvalidArgumentError: naming the row (counted from 1), if its label is not that of `class_names`.
    """

    entries: tuple[VideoEntry, ...]
    """All videos in the order of the source, those that cannot be used too."""
    class_names: tuple[str, ...]
    """Name of each class, by label id."""

    def __post_init__(self) -> None:
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
    """The path as an absolute one, if its extension is that of a manifest, and pyarrow is there for Parquet."""
    file = absolute_path(path)
    if file.suffix.lower() not in MANIFEST_EXTENSIONS:
        raise InvalidArgumentError(f"{path}: a manifest ends in {' or '.join(MANIFEST_EXTENSIONS)}; rename it")
    if os.path.isdir(file):  # noqa: PTH112 (as below)
        raise InvalidArgumentError(f"{path} is a folder; give the name of a manifest file")
    if file.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:  # told before the work, not after it
        raise MissingDependencyError(
            f'{path}: Parquet needs pyarrow; install it with `pip install "rlt[train]"`, or use a .csv manifest'
        )
    return file


def check_unicode(file: Path, texts: Iterable[str]) -> None:
    """Hold that a manifest can hold these texts: names of files need not be Unicode, but Parquet needs it."""
    for text in texts if file.suffix.lower() == ".parquet" else ():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidArgumentError(
                f"{text!r}: a name that is not valid UTF-8, which Parquet needs; rename it, or write a .csv manifest"
            ) from None


def write_manifest(manifest: Manifest, path: str | Path) -> None:
    """Write a manifest of one video or more, as Parquet or CSV by the extension of `path`, completely or not at all."""
    file = check_manifest_path(path)
    entries = manifest.entries
    if not entries:
        raise InvalidArgumentError(f"{path}: the manifest would hold no video; give a source with videos")
    check_unicode(file, (text for entry in entries for text in (entry.path, entry.label, entry.status)))
    if file.suffix.lower() == ".csv":
        _write_csv(manifest, file)
        return
    columns = {name: [getattr(entry, name) for entry in entries] for name in COLUMNS}
    if all(share is None for share in columns["tokens_kept"]):
        del columns["tokens_kept"]  # a column of nothing has no type
    write_table(file, columns, {_CLASS_NAMES_KEY: json.dumps(manifest.class_names)})


def _write_csv(manifest: Manifest, file: Path) -> None:
    used = {entry.label_id for entry in manifest.entries}
    empty = [
        VideoEntry("", label_id, label, status="class without videos")
        for label_id, label in enumerate(manifest.class_names)
        if label_id not in used
    ]
    with (
        replacing(file) as temporary,
        temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        # All texts are quoted, since names may hold commas, quotes and line breaks.
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([getattr(entry, name) for name in COLUMNS] for entry in (*manifest.entries, *empty))


def read_manifest(path: str | Path) -> Manifest:
    """Read a manifest. Relative paths of videos start at the folder of the manifest; other columns are passed over."""
    file = check_manifest_path(path)
    if not os.path.isfile(file):  # noqa: PTH113 (Path.is_file raises for names that no file can have)
        problem = "no regular file" if os.path.exists(file) else "no such file"  # noqa: PTH110
        raise InvalidArgumentError(f"{path}: {problem}; {_REMEDY} first")
    rows, class_names = (_csv_rows(file), None) if file.suffix.lower() == ".csv" else _parquet_rows(file)
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
            whole = os.path.isabs(entry.path)  # noqa: PTH117 (100,000s of files)
            entries.append(entry if whole else replace(entry, path=str(absolute_path(file.parent / entry.path))))
    if not entries:
        raise InvalidArgumentError(f"{path}: the manifest holds no video; {_REMEDY} from a source with videos")
    if class_names is None:
        if max(labels) > MAX_LABEL_ID:
            raise InvalidArgumentError(
                f"{path}: column label_id: {max(labels)} is no label id; 0 to {MAX_LABEL_ID} is allowed, {_REMEDY}"
            )
        class_names = tuple(labels.get(label_id, f"class {label_id}") for label_id in range(max(labels) + 1))
    try:
        return Manifest(tuple(entries), class_names)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error}") from None


Rows = Iterator[tuple[str, Mapping[str, object]]]
"""For each row of a file its place, for messages, and its values by column."""


def _csv_rows(file: Path) -> Rows:
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream)
            header = next(reader, [])
            _check_columns(header, file)
            for number, row in enumerate(reader, 1):
                if not row:
                    continue
                place = f"row {number} (line {reader.line_num})"
                if len(row) != len(header):
                    raise InvalidArgumentError(
                        f"{file}: {place} has {len(row)} columns; {len(header)} are needed, "
                        "quote texts that hold commas"
                    )
                yield place, dict(zip(header, row, strict=True))
    except (OSError, csv.Error) as error:
        raise InvalidArgumentError(f"{file}: not a CSV file that can be read ({error}); {_REMEDY}") from None


def _parquet_rows(file: Path) -> tuple[Rows, tuple[str, ...] | None]:
    columns, metadata = read_table(file)
    _check_columns(columns, file)
    try:
        stored = metadata.get(_CLASS_NAMES_KEY)
        class_names = None if stored is None else tuple(map(str, json.loads(stored)))
    except (ValueError, TypeError, RecursionError):
        raise InvalidArgumentError(f"{file}: its class names cannot be read; {_REMEDY}") from None
    rows = enumerate(zip(*columns.values(), strict=True), 1)
    return ((f"row {number}", dict(zip(columns, values, strict=True))) for number, values in rows), class_names


def _check_columns(found: Collection[str], file: Path) -> None:
    missing = set(COLUMNS) - {*found} - {"tokens_kept"}
    if missing and "patches" in found:
        raise InvalidArgumentError(
            f"{file} holds tokens, which rlt train, evaluate, predict and features take; give the manifest of the "
            "videos"
        )
    if missing:
        names = ", ".join(name for name in COLUMNS if name in missing)
        raise InvalidArgumentError(f"{file}: no column {names}; a manifest has {', '.join(COLUMNS)}, {_REMEDY}")


_NEEDED = {"str": "a text", "int": "a whole number of 0 or more"}


def _to_entry(row: Mapping[str, object], place: str) -> VideoEntry:
    values: dict[str, Any] = {}
    for field in fields(VideoEntry):
        value, kind = row.get(field.name), str(field.type)
        try:
            values[field.name] = _convert(value, kind)
        except (TypeError, ValueError, OverflowError):
            needed = _NEEDED.get(kind, "a number of 0 or more")
            raise InvalidArgumentError(
                f"{place}, column {field.name}: {value!r:.100}; {needed} is needed, {_REMEDY}"
            ) from None
    return VideoEntry(**values)


def _convert(value: Any, kind: str) -> Any:
    """A value of a file, text in CSV, as the kind of a field: "str", "int", "float" or "float | None"."""
    if kind == "str" and isinstance(value, str):
        return value
    if kind == "float | None" and value in (None, ""):
        return None
    number = int(value) if kind == "int" else float(value)
    if kind == "str" or number != float(value) or not 0 <= number < float("inf"):
        raise ValueError
    return number

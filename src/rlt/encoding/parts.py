"""Rows on their way into a file: small whole parts beside it, so that a run that was cut off goes on exactly once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from json import dumps, loads
from pathlib import Path
from typing import Any

from rlt.checks import some
from rlt.data.tables import join_tables, read_table, write_table
from rlt.data.token_files import COLUMNS
from rlt.encoding.cutting import Row
from rlt.encoding.rows import STORED, columns_of, kinds_of
from rlt.errors import InvalidArgumentError
from rlt.files import held, not_writable, write_json

_ROWS, _SECONDS = 512, 10.0
"""A part is written when it has so many rows, or the one before is so old: what a kill costs."""
_BYTES = 2**26
"""The same of patches, which a part is in memory with."""
PARTS = ".parts"
_SETTINGS = "settings.json"
_KEYS = ("source", "window", "last")


class Parts:
    """The rows of one file, in a folder beside it until all are there; a context manager, in which they are its own.

    Args:
        target: the file. Its parts are Parquet where it is, JSON where it is.
        outputs: columns, see `rlt.encoding.rows.OUTPUTS`.
        settings: what decides the rows; a run that goes on must have the same.

    Raises:
        InvalidArgumentError: for parts of other settings, that cannot be read, or that another process has, and where
            nothing can be written.
    """

    def __init__(self, target: Path, outputs: Sequence[str], settings: Mapping[str, object]) -> None:
        self.target, self.outputs, self.settings = target, outputs, dict(settings)
        self.folder = target.with_name(target.name + PARTS)
        self.done: dict[str, set[int]] = {}
        """Windows by video that are written."""
        self._last: dict[str, int] = {}
        self._large = STORED in outputs
        self._rows: list[Row] = []
        self._bytes = 0
        self._written = time.monotonic()
        self._lock = ExitStack()

    def __enter__(self) -> Parts:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = self._lock.enter_context(held(self.folder))
        except OSError as error:
            raise not_writable(self.folder, error) from error
        with ExitStack() as undo:
            undo.enter_context(self._lock)
            if free is False:
                raise InvalidArgumentError(f"{self.target} is being written by another process; wait, or name another")
            self._read_before()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def _read_before(self) -> None:
        self._check_settings()
        for path in self.paths():
            for source, window, last in zip(*(self._read(path, _KEYS)[key] for key in _KEYS), strict=True):
                self._note(source, window, last)

    def _check_settings(self) -> None:
        path = self.folder / _SETTINGS
        if not path.is_file():
            write_json(path, self.settings)
            return
        try:
            before = loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._unreadable(path, error) from error
        now = loads(dumps(self.settings))  # tuples are lists there
        if differ := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            raise InvalidArgumentError(
                f"{self.folder} has rows of a run with another {some(differ)}; give what it had, name another file, or "
                "remove the folder to start anew"
            )

    def paths(self) -> list[Path]:
        """The parts, in order."""
        return sorted(self.folder.glob(f"part-*{self.target.suffix}"))

    def is_finished(self, source: str) -> bool:
        """Whether all windows of a video are there, up to its last."""
        return len(self.done.get(source, ())) == self._last.get(source, -2) + 1

    def add(self, row: Row) -> bool:
        """Take a row, if it is not there yet; whether it was new."""
        if row["window"] in self.done.get(row["source"], ()):
            return False
        self._note(row["source"], row["window"], row["last"])
        self._rows.append(row)
        self._bytes += len(row.get(STORED) or b"")
        if len(self._rows) >= _ROWS or self._bytes >= _BYTES or time.monotonic() - self._written > _SECONDS:
            self.write()
        return True

    def _note(self, source: str, window: int, last: bool) -> None:
        self.done.setdefault(source, set()).add(window)
        if last:
            self._last[source] = window

    def write(self) -> None:
        """Write what is waiting as a part."""
        if self._rows:
            path = self.folder / f"part-{len(self.paths()):06}{self.target.suffix}"
            try:
                if path.suffix == ".parquet":
                    columns, kinds = columns_of(self._rows, self.outputs), kinds_of(self.outputs)
                    write_table(path, columns, kinds=kinds, large_rows=self._large)
                else:
                    write_json(path, _plain(self._rows))
            except OSError as error:
                raise not_writable(path, error) from error
            self._rows, self._bytes = [], 0
        self._written = time.monotonic()

    def rows(self) -> Iterator[Row]:
        """All rows that are written, in order; of tokens without them."""
        names = [name for name in kinds_of(self.outputs) if name not in COLUMNS] if self._large else None
        for path in self.paths():
            columns = self._read(path, names)
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def _read(self, path: Path, names: Sequence[str] | None = None) -> dict[str, list[Any]]:
        if path.suffix == ".parquet":
            return read_table(path, names)[0]
        try:
            rows = loads(path.read_text(encoding="utf-8"))
            return {name: [row.get(name) for row in rows] for name in names or columns_of(rows, self.outputs)}
        except (OSError, ValueError) as error:
            raise self._unreadable(path, error) from error

    def _unreadable(self, path: Path, error: Exception) -> InvalidArgumentError:
        return InvalidArgumentError(f"{path} cannot be read ({error}); remove {self.folder} to start anew")

    def finish(self, summary: Mapping[str, object]) -> None:
        """Make the file of the parts, with a summary in it, and take the parts away."""
        self.write()
        about = {"settings": self.settings, **summary}
        try:
            if self.target.suffix == ".parquet":
                texts = {name: dumps(value) for name, value in about.items()}
                join_tables(self.paths(), self.target, texts, large_rows=self._large)
            else:
                write_json(self.target, {**about, "rows": list(self.rows())})
        except OSError as error:
            raise not_writable(self.target, error) from error
        shutil.rmtree(self.folder, ignore_errors=True)


def _plain(value: Any) -> Any:
    """Arrays as lists, for JSON."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value

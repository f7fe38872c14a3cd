"""Parquet files, columns in and columns out, and files in stores. The only importer of pyarrow, when it is needed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rlt.errors import InvalidArgumentError, MissingDependencyError, VideoError, one_line
from rlt.files import replacing


def write_table(
    path: str | Path,
    columns: Mapping[str, Sequence[Any]],
    metadata: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    *,
    large_rows: bool = False,
) -> None:
    """Write one Parquet file, atomically, with text by name that travels in it beside the columns.

    `kinds` are those of columns, such as "string", "float64" or "list<float32>"; others are as their values are. With
    `large_rows` each row is a group of its own, with checksums, for `TableFile` to read any one of them.
    """
    parquet = _load_pyarrow()[1]
    table = make_table(columns, metadata, kinds, name=str(path))
    how, groups = _how(large_rows)
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, **how, **groups)


def _how(large_rows: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a writer of Parquet, and of writing a table with it."""
    if not large_rows:
        return {}, {}
    how = {"compression": "zstd", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    return how, {"row_group_size": 1}


def make_table(
    columns: Mapping[str, Sequence[Any]],
    metadata: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
    *,
    name: str = "the table",
) -> Any:
    """A pyarrow Table of columns, see `write_table`; `name` stands in errors."""
    arrow = _load_pyarrow()[0]
    try:
        wanted = kinds or {}
        arrays = {
            column: arrow.array(values, _kind(arrow, wanted[column])) if column in wanted else values
            for column, values in columns.items()
        }
        return arrow.table(arrays, metadata=metadata or {})
    except (arrow.ArrowException, OverflowError) as error:
        raise InvalidArgumentError(f"{name} cannot hold these columns: {one_line(error)}") from error


def join_tables(
    parts: Iterable[Path], path: str | Path, metadata: Mapping[str, str], *, large_rows: bool = False
) -> None:
    """Write the rows of Parquet files of the same columns into one, atomically; one of them is in memory."""
    parquet = _load_pyarrow()[1]
    how, groups = _how(large_rows)
    with replacing(path) as temporary:
        writer = None
        try:
            for part in parts:
                table = parquet.read_table(part)
                if writer is None:
                    writer = parquet.ParquetWriter(temporary, table.schema.with_metadata(dict(metadata)), **how)
                writer.write_table(table, **groups)
        finally:
            if writer is not None:
                writer.close()


def _kind(arrow: Any, kind: str) -> Any:
    inner = kind.removeprefix("list<")
    return arrow.type_for_alias(kind) if inner == kind else arrow.list_(_kind(arrow, inner.removesuffix(">")))


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Read what `write_table` wrote: columns by name, all if none are named, and the metadata."""
    arrow, parquet = _load_pyarrow()
    try:
        content = Path(path).read_bytes()  # from memory: pyarrow would take a folder as one table of many files
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error.strerror}); give a Parquet file") from error
    try:
        table = parquet.read_table(io.BytesIO(content), columns=None if columns is None else list(columns))
        metadata = table.schema.metadata or {}
        return table.to_pydict(), {key.decode(): value.decode() for key, value in metadata.items()}
    except (OSError, ValueError, ArithmeticError, LookupError, MemoryError, arrow.ArrowException) as error:
        # ValueError: texts that are no UTF-8. The others come from bytes that were changed here and there.
        raise InvalidArgumentError(f"{path} is not a whole Parquet file: {one_line(error)}") from error


class TableFile:
    """A Parquet file whose rows are read one at a time, in any order. It can be pickled and outlives a fork.

    Raises:
        InvalidArgumentError: if the file is none, or damaged where it is read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._opened: tuple[int, Any] | None = None
        with self._errors():
            metadata = self._file.schema_arrow.metadata or {}
            self.metadata = {key.decode(): value.decode() for key, value in metadata.items()}
            groups = self._file.metadata
            counts = [groups.row_group(index).num_rows for index in range(groups.num_row_groups)]
        self._places = [(group, row) for group, count in enumerate(counts) for row in range(count)]

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def _file(self) -> Any:
        """Each process opens its own: threads of the library do not outlive a fork."""
        if self._opened is None or self._opened[0] != os.getpid():
            parquet = _load_pyarrow()[1]
            how = {"memory_map": True, "pre_buffer": False, "page_checksum_verification": True}
            self._opened = os.getpid(), parquet.ParquetFile(self.path, **how)
        return self._opened[1]

    @property
    def columns(self) -> list[str]:
        """Their names."""
        with self._errors():
            return list(self._file.schema_arrow.names)

    def read(self, columns: Sequence[str]) -> dict[str, list[Any]]:
        """These columns of all rows."""
        with self._errors():
            found: dict[str, list[Any]] = self._file.read(list(columns), use_threads=False).to_pydict()
        return found

    def row(self, index: int, columns: Sequence[str]) -> dict[str, Any]:
        """These columns of one row; binary ones as buffers, which are not copied."""
        group, place = self._places[index]
        with self._errors():
            table = self._file.read_row_group(group, list(columns), use_threads=False)
            cells = {name: table.column(name)[place] for name in columns}
            return {
                name: cell.as_buffer() if hasattr(cell, "as_buffer") else cell.as_py() for name, cell in cells.items()
            }

    @contextmanager
    def _errors(self) -> Iterator[None]:
        arrow = _load_pyarrow()[0]
        try:
            yield
        except (OSError, ValueError, ArithmeticError, LookupError, MemoryError, arrow.ArrowException) as error:
            raise InvalidArgumentError(f"{self.path} is not a whole Parquet file: {one_line(error)}") from error


def _load_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.fs
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            'Parquet files need pyarrow, which cannot be imported; install with: pip install "rlt[train]"'
        ) from error
    return pyarrow, pyarrow.parquet


def list_store(address: str, extensions: Sequence[str]) -> list[str]:
    """Addresses of the files with one of these extensions below an address of a store (file://, s3://), sorted.

    Raises:
        VideoError: if there is nothing, or the store does not answer.
    """
    arrow, (store, path) = _load_pyarrow()[0], _store_of(address)
    try:
        info = store.get_file_info(path)
        if info.type == arrow.fs.FileType.File:
            return [address]
        below = store.get_file_info(arrow.fs.FileSelector(path, recursive=True)) if info.type else []
    except (OSError, arrow.ArrowException) as error:
        raise VideoError(f"{address}: cannot be listed ({one_line(error)}); check address and access") from error
    files = (found.path for found in below if found.type == arrow.fs.FileType.File)
    inside = sorted(file for file in files if file.lower().endswith(tuple(extensions)))
    if not inside:
        raise VideoError(f"{address}: no videos there (looked for {', '.join(extensions)})")
    start = address.removesuffix("/")
    return [start + file.removeprefix(path.removesuffix("/")) for file in inside]


@contextmanager
def open_in_store(address: str) -> Iterator[BinaryIO]:
    """A file of a store, which can seek.

    Raises:
        VideoError: if it is not there or cannot be read.
    """
    arrow, (store, path) = _load_pyarrow()[0], _store_of(address)
    try:
        stream = store.open_input_file(path)
    except (OSError, arrow.ArrowException) as error:
        raise VideoError(f"{address}: cannot be opened ({one_line(error)}); check address and access") from error
    with stream:
        yield stream


def _store_of(address: str) -> tuple[Any, str]:
    arrow = _load_pyarrow()[0]
    try:
        store, path = arrow.fs.FileSystem.from_uri(address)
        return store, str(path)
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise VideoError(
            f"{address}: no address of a store that can be read ({one_line(error)}); file://, s3:// and gs:// are"
        ) from error

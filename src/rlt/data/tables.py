"""Parquet files, columns in and columns out, and files in stores. The only importer of pyarrow, when it is needed."""

from __future__ import annotations

import io
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
) -> None:
    """Write one Parquet file, atomically, with text by name that travels in it beside the columns.

    `kinds` are those of columns, such as "string", "float64" or "list<float32>"; others are as their values are.
    """
    parquet = _load_pyarrow()[1]
    table = make_table(columns, metadata, kinds, name=str(path))
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)


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


def join_tables(parts: Iterable[Path], path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write the rows of Parquet files of the same columns into one, atomically; one of them is in memory."""
    parquet = _load_pyarrow()[1]
    with replacing(path) as temporary:
        writer = None
        try:
            for part in parts:
                table = parquet.read_table(part)
                if writer is None:
                    writer = parquet.ParquetWriter(temporary, table.schema.with_metadata(dict(metadata)))
                writer.write_table(table)
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

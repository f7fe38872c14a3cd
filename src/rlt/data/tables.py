"""Parquet files, columns in and columns out. The only module that imports pyarrow, and only when it is needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt.errors import InvalidArgumentError, MissingDependencyError, one_line
from rlt.files import replacing


def write_table(
    path: str | Path, columns: Mapping[str, Sequence[Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one Parquet file, atomically.

    Args:
        path: its folders are made; an old file of this name is replaced only when the new one is whole.
        columns: values by name, all of one length; whole numbers, numbers, text, truth values, lists of them, or None.
        metadata: text by name that travels in the file, beside the columns.

    Raises:
        InvalidArgumentError: if columns differ in length, a column mixes types, or the file cannot be written.
        MissingDependencyError: if pyarrow cannot be imported.
    """
    arrow, parquet = _load_pyarrow()
    counts = {name: len(values) for name, values in columns.items()}
    if len(set(counts.values())) > 1:
        raise InvalidArgumentError(f"columns of {path} differ in length: {counts}; one value per row is needed")
    try:
        table = arrow.table({name: list(values) for name, values in columns.items()})
    except arrow.ArrowException as error:
        raise InvalidArgumentError(f"{path} cannot hold these columns: {one_line(error)}") from error
    table = table.replace_schema_metadata(dict(metadata or {}))
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)


def read_table(path: str | Path) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Read what `write_table` wrote: columns by name, and the metadata.

    Raises:
        InvalidArgumentError: if the file does not exist, or is not a whole Parquet file.
        MissingDependencyError: if pyarrow cannot be imported.
    """
    arrow, parquet = _load_pyarrow()
    try:
        content = Path(path).read_bytes()  # from memory: pyarrow would take a folder as one table of many files
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error.strerror}); give a Parquet file") from error
    try:
        table = parquet.read_table(io.BytesIO(content))
    except (OSError, arrow.ArrowException) as error:
        raise InvalidArgumentError(f"{path} is not a whole Parquet file: {one_line(error)}") from error
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return table.to_pydict(), {key: value for key, value in metadata.items() if key != "ARROW:schema"}


def _load_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            'Parquet files need pyarrow, which cannot be imported; install with: pip install "rlt[train]"'
        ) from error
    return pyarrow, pyarrow.parquet

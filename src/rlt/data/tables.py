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
    """Write one Parquet file, atomically, with text by name that travels in it beside the columns."""
    arrow, parquet = _load_pyarrow()
    try:
        table = arrow.table(dict(columns), metadata=metadata or {})
    except (arrow.ArrowException, OverflowError) as error:
        raise InvalidArgumentError(f"{path} cannot hold these columns: {one_line(error)}") from error
    with replacing(path) as temporary:
        parquet.write_table(table, temporary)


def read_table(path: str | Path) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Read what `write_table` wrote: columns by name, and the metadata."""
    arrow, parquet = _load_pyarrow()
    try:
        content = Path(path).read_bytes()  # from memory: pyarrow would take a folder as one table of many files
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error.strerror}); give a Parquet file") from error
    try:
        table = parquet.read_table(io.BytesIO(content))
        metadata = table.schema.metadata or {}
        return table.to_pydict(), {key.decode(): value.decode() for key, value in metadata.items()}
    except (OSError, ValueError, ArithmeticError, LookupError, MemoryError, arrow.ArrowException) as error:
        # ValueError: texts that are no UTF-8. The others come from bytes that were changed here and there.
        raise InvalidArgumentError(f"{path} is not a whole Parquet file: {one_line(error)}") from error


def _load_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            'Parquet files need pyarrow, which cannot be imported; install with: pip install "rlt[train]"'
        ) from error
    return pyarrow, pyarrow.parquet

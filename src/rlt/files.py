"""Writing files so that nothing a user had is lost: into a temporary sibling first, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlt.errors import InvalidArgumentError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to; it takes the name `path` only if the block succeeds.

    The suffix is kept, since some writers choose the format by it. Parent folders are made.

    Raises:
        InvalidArgumentError: if `path` is a folder, or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise InvalidArgumentError(f"{target} is a folder; give the name of a file to write")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
    except OSError as error:
        raise InvalidArgumentError(f"{target} cannot be written ({error.strerror}); choose another path") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write JSON with sorted structure as given, two spaces of indentation, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

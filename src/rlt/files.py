"""Writing files so that nothing a user had is lost: into a temporary folder beside them first, then renamed."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rlt.errors import InvalidArgumentError


@contextmanager
def replacing_all(folder: str | Path, names: Sequence[str]) -> Iterator[Path]:
    """Give an empty folder to write files of these names into; they move to `folder` only if the block succeeds.

    It is a hidden folder inside `folder`, so that moving is renaming on the same file system. Files are renamed in the
    order of `names`; those that were not written, and all others in `folder`, stay as they are. `folder` and its
    parents are made, and taken away again after a failure.

    Raises:
        InvalidArgumentError: if `folder` cannot be written, or one of the names is a folder there.
    """
    target = Path(folder)
    with ExitStack() as undo:
        try:
            for path in (target / name for name in names):
                if path.is_dir():
                    raise InvalidArgumentError(f"{path} is a folder where a file is to be written; give another path")
            made = [path for path in (target, *target.parents) if not path.exists()]  # the deepest first
            undo.callback(_remove_empty, made)
            target.mkdir(parents=True, exist_ok=True)
            staging = tempfile.TemporaryDirectory(prefix=".rlt-", dir=target, ignore_cleanup_errors=True)
        except OSError as error:
            raise not_writable(target, error) from error
        with staging as name:
            yield Path(name)
            for written in (Path(name) / name_of_file for name_of_file in names):
                if written.exists():
                    written.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
                    written.replace(target / written.name)
        undo.pop_all()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path of the same name to write to; it takes the place of `path` only if the block succeeds.

    Parent folders are made.

    Raises:
        InvalidArgumentError: if `path` is a folder, or cannot be written.
    """
    target = Path(path)
    with replacing_all(target.parent, [target.name]) as folder:
        yield folder / target.name


def write_json(path: str | Path, content: object) -> None:
    """Write JSON with two spaces of indentation, keys in the order given, atomically."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def not_writable(path: str | Path, error: OSError) -> InvalidArgumentError:
    """The error for a place that the system does not let us write to."""
    return InvalidArgumentError(f"{path} cannot be written ({error.strerror or error}); choose another path")


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

"""Writing files so that nothing a user had is lost: into a temporary folder beside them first, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

from rlt.errors import InvalidArgumentError

_STAGING = ".rlt-"
_MOVING = ".rlt-moving"
_STALE_SECONDS = 60  # between making a folder and locking it


@contextmanager
def replacing_all(folder: str | Path, names: Sequence[str]) -> Iterator[Path]:
    """Give an empty folder to write files of these names into; they move to `folder` only if the block succeeds.

    It is a hidden folder inside `folder`, so that moving is renaming on the same file system. Files are renamed in the
    order of `names`; those that were not written, and all others in `folder`, stay as they are. A symbolic link stays,
    and what it names is replaced. `folder` and its parents are made, and taken away again after a failure.

    Nothing of a kill stays for ever: one before the moves leaves the old files, and the next writer to `folder` removes
    what was staged; one between two moves leaves the rest in a folder of its own, where `newest` finds it, and the next
    writer moves it.

    Raises:
        InvalidArgumentError: if `folder` cannot be written, or one of the names is there and no regular file.
    """
    target = Path(folder)
    with ExitStack() as undo:
        try:
            places = {name: _place(target / name) for name in names}
            made = [path for path in (target, *target.parents) if not path.exists()]  # the deepest first
            undo.callback(_remove_empty, made)
            target.mkdir(parents=True, exist_ok=True)
            _finish_moves(target)
            _remove_left(target.absolute())
            staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=target))
        except OSError as error:
            raise not_writable(target, error) from error
        undo.callback(shutil.rmtree, staging, ignore_errors=True)
        with held(staging):
            yield staging
            written = [name for name in names if (staging / name).exists()]
            for name in written:
                (staging / name).chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
            if len(written) > 1:
                staging = _commit(staging)
            undo.pop_all()
            for name in written:
                _move(staging / name, places[name])
            shutil.rmtree(staging, ignore_errors=True)


def newest(path: str | Path) -> Path:
    """Where to read a file that `replacing_all` writes beside others, which a kill may have stopped between two."""
    moving = Path(path).parent / _MOVING / Path(path).name
    return moving if moving.is_file() else Path(path)


def refuse_inputs(outputs: Iterable[str | Path], inputs: Iterable[str | Path]) -> None:
    """Hold, before any work, that no file to write is one that is read, under whatever name. Either may not exist.

    Raises:
        InvalidArgumentError: naming the first that is.
    """
    there = {key: path for path in outputs if (key := _identity(path)) is not None}
    for path in inputs if there else ():
        if (key := _identity(path)) in there:
            raise InvalidArgumentError(
                f"{there[key]} is to be written, and is the same file as {path}, which is read; give another path"
            )


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path of the same name to write to; it takes the place of `path` only if the block succeeds.

    Parent folders are made. Where `path` is a symbolic link, what it names is replaced.

    Raises:
        InvalidArgumentError: if `path` is there and no regular file, or cannot be written.
    """
    target = Path(path)
    with replacing_all(target.parent, [target.name]) as folder:
        yield folder / target.name


def write_json(path: str | Path, content: object) -> None:
    """Write JSON with two spaces of indentation, keys in the order given, atomically.

    Raises:
        InvalidArgumentError: if a number in it is NaN or infinite, or `path` cannot be written.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is not written: JSON has no such number ({error})") from error
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def not_writable(path: str | Path, error: OSError) -> InvalidArgumentError:
    """The error for a place that the system does not let us write to."""
    return InvalidArgumentError(f"{path} cannot be written ({error.strerror or error}); choose another path")


def _place(path: Path) -> Path:
    """What a path names, behind all links, if a file may be written there."""
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise InvalidArgumentError(f"{path} is a folder where a file is to be written; give another path")
    if place.exists() and not place.is_file():
        raise InvalidArgumentError(f"{path} is a device or a pipe, which is never replaced; give the path of a file")
    return place


def _identity(path: str | Path) -> tuple[int, int] | None:
    try:
        found = Path(path).stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _move(file: Path, place: Path) -> None:
    try:
        file.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing(place) as beside:  # what a link names lies on another file system
            shutil.copyfile(file, beside)


def _commit(staging: Path) -> Path:
    """Give the folder of staged files the name under which they count as written."""
    moving = staging.with_name(_MOVING)
    for _ in range(50):
        try:
            return staging.rename(moving)
        except OSError:  # another writer to the same folder is moving its files
            time.sleep(0.1)
            _finish_moves(staging.parent)
    raise InvalidArgumentError(f"{moving} is in the way, it may be of another writer; end that, or remove it")


def _finish_moves(folder: Path) -> None:
    """Move what a writer left that was killed between two moves. One at work holds a lock, which dies with it."""
    moving = folder / _MOVING
    if moving.is_dir():
        with held(moving) as free:
            if free is not False:
                for file in moving.iterdir():
                    _move(file, _place(folder / file.name))
                moving.rmdir()


@cache  # a folder may hold many files, and gets few kills while one process writes to it
def _remove_left(folder: Path) -> None:
    """Remove what writers staged that were killed."""
    for left in folder.glob(f"{_STAGING}*"):
        with suppress(OSError), held(left) as free:
            if free and left.name != _MOVING and time.time() - left.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(left)


@contextmanager
def held(folder: Path) -> Iterator[bool | None]:
    """Whether a folder could be locked, until the block or the process ends; None where there are no locks.

    The lock is the system's, and goes with the process however that ends.
    """
    if sys.platform == "win32":
        yield None
        return
    import fcntl

    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free: bool | None = True
        except BlockingIOError:
            free = False
        except OSError:
            free = None
        yield free
    finally:
        os.close(number)


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current

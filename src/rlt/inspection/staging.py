"""A folder of results that appears whole or not at all, beside whatever else the user keeps there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rlt.errors import InvalidArgumentError, RltError
from rlt.video import Source

MAKER = "rlt inspect"
"""Value of "made_by" in the report: the mark of a folder whose files may be replaced."""
REPORT_NAME = "report.json"
"""The file that carries the mark."""


@contextmanager
def staged_folder(output: str | Path, names: Sequence[str], *, source: Source) -> Iterator[Path]:
    """Give an empty folder to write into; its files move to `output`, one by one, only if the block succeeds.

    The staging folder is a hidden one inside `output`, so that moving is renaming on the same file system. Files of an
    earlier inspection are replaced, all others in `output` are left alone.

    Args:
        output: the folder; it and its parents are made if they are missing.
        names: the files that may be written.
        source: the video that is read, which must not be among them.

    Raises:
        InvalidArgumentError: if `output` is a file or cannot be written, or holds files of these names that no
            inspection made.
    """
    folder = Path(output)
    _check_output(folder, names, source)
    made = [path for path in (folder, *folder.parents) if not path.exists()]  # the deepest first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix=".inspect-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    finished = False
    try:
        with staging as name:
            yield Path(name)
            # The mark first: a folder that was left half replaced is known as one of ours.
            for path in sorted(Path(name).iterdir(), key=lambda path: path.name != REPORT_NAME):
                path.replace(folder / path.name)
        finished = True
    except OSError as error:
        if isinstance(error, RltError):  # a video that cannot be read is an OSError too
            raise
        raise _not_writable(folder, error) from error
    finally:
        if not finished:
            with suppress(OSError):
                for path in made:
                    path.rmdir()


def _check_output(folder: Path, names: Sequence[str], source: Source) -> None:
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is a file; give the name of a folder to write into")
    taken = [folder / name for name in names if (folder / name).exists()]
    if isinstance(source, str | Path) and any(path.samefile(source) for path in taken if Path(source).exists()):
        raise InvalidArgumentError(f"{source} would be overwritten by its own inspection; choose another output folder")
    if taken and not _is_ours(folder):
        raise InvalidArgumentError(f"{taken[0]} exists and was not made by {MAKER}; choose another output folder")
    for path in taken:
        if path.is_dir():
            raise InvalidArgumentError(
                f"{path} is a folder where a file is to be written; choose another output folder"
            )


def _is_ours(folder: Path) -> bool:
    try:
        report = json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("made_by") == MAKER


def _not_writable(folder: Path, error: OSError) -> InvalidArgumentError:
    return InvalidArgumentError(f"{folder} cannot be written ({error.strerror}); choose another output folder")

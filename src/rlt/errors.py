"""Errors that a user can act on: one line that names the value, what is allowed and the remedy.

The command line prints the message of an `RltError` and exits with code 2; every other exception is a bug.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection

_FROM_WORKER = "Original Traceback (most recent call last)"


class RltError(Exception):
    """Base of all errors that a user can mend. `str(error)` is one line.

    That of a data worker comes with torch's account of where it happened, which stays in `error.args`.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text.strip().rpartition("\n")[2].partition(": ")[2] if _FROM_WORKER in text else text


class InvalidArgumentError(RltError, ValueError):
    """An argument has a value or a shape that is not allowed."""


class VideoError(RltError, OSError):
    """A video cannot be opened, or the frames asked for cannot be decoded."""


class VideoWarning(UserWarning):
    """A video was decoded, but something about the file deserves a look (cut off, one frame only)."""


class TruncatedVideoWarning(VideoWarning):
    """The file is cut off, but all frames asked for lie before the cut and are whole."""


class CheckpointError(RltError, RuntimeError):
    """A checkpoint cannot be read, or its weights do not fit the model."""


class TrainingError(RltError, RuntimeError):
    """A training run cannot go on, or cannot be continued."""


class MissingDependencyError(RltError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


def one_line(error: object) -> str:
    """What an error or a text says, with its line breaks turned into spaces."""
    return " ".join(str(error).split())


def warn_caller(message: str, category: type[Warning], libraries: Collection[str] = ("rlt",)) -> None:
    """Warn at the first line outside of the libraries that a call runs through."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in libraries:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)

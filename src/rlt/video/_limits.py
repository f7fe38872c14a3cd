"""What reading a video may take, whatever a file says about itself, and the one place where foreign errors end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from rlt.errors import InvalidArgumentError, RltError, VideoError, one_line


@dataclass(frozen=True)
class Limits:
    """Bounds of one reading: a call such as `read_clip`, or of `iter_clips` what lies between two clips.

    They hold what is absurd, such as a header that promises years, and lie far above real work. Each is an environment
    variable, so that commands and the workers of data loaders obey it too.
    """

    frames: int = 5_000_000
    """RLT_VIDEO_MAX_FRAMES: frames of a video (46 hours at 30 a second), and frames that one call may ask for."""
    bytes: int = 8 << 30
    """RLT_VIDEO_MAX_BYTES: pictures of all clips of one reading. A stored frame may have a 64th of it in pixels."""
    seconds: int = 600
    """RLT_VIDEO_MAX_SECONDS: time of demuxing and decoding."""

    @classmethod
    def current(cls) -> Limits:
        """As the environment has them now.

        Raises:
            InvalidArgumentError: for a variable that is no whole number of at least 1.
        """
        asked: dict[str, int] = {}
        for field in fields(cls):
            text = os.environ.get(_variable(field.name), "")
            if text:
                if not (text.isascii() and text.isdecimal() and 0 < len(text) < 19 and int(text)):
                    raise InvalidArgumentError(f"{_variable(field.name)} is {text!r}; a whole number >= 1 is needed")
                asked[field.name] = int(text)
        return cls(**asked)

    @property
    def pixels(self) -> int:
        """Of a stored frame, of which decoders keep up to a few dozen at one and a half bytes a pixel and more."""
        return self.bytes // 64

    def check_asked(self, **asked: int) -> None:
        """Hold that numbers of frames or clips that an argument asks for can be meant.

        Raises:
            InvalidArgumentError: naming the first that is above `frames`.
        """
        for name, number in asked.items():
            if number > self.frames:
                raise InvalidArgumentError(f"{name} is {number}; up to {self.frames} is allowed; {remedy('frames')}")

    def check_sampled(self, name: str, number: int) -> None:
        """Hold that a walk over a video ends, though a header promises that its last frame stands for years.

        Raises:
            VideoError: after more than `frames` sampled ones.
        """
        if number > self.frames:
            raise VideoError(f"{name}: more than {self.frames:,} frames were sampled; {remedy('frames')}")

    def bytes_problem(self, pixels: int) -> str:
        """Say that so many RGB pixels take more than `bytes`; empty if they do not."""
        if pixels * 3 <= self.bytes:
            return ""
        return f"take {pixels * 3 / 1e9:,.1f} GB, {self.bytes / 1e9:,.1f} GB are allowed; {remedy('bytes')}"


def remedy(limit: str) -> str:
    """How a message says which environment variable stands for a limit."""
    return f"{_variable(limit)} sets another limit"


def _variable(limit: str) -> str:
    return f"RLT_VIDEO_MAX_{limit.upper()}"


@contextmanager
def foreign_errors(name: str) -> Iterator[None]:
    """Turn whatever a library raises about the file `name` into a VideoError, so that a bad one never ends a folder.

    Libraries raise nearly anything about bytes that they did not expect. What only a mistake in code raises, such as a
    TypeError, passes.
    """
    try:
        yield
    except RltError:
        raise
    except (OSError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError, MemoryError) as error:
        reason = one_line(error)[:200] or "no reason given"
        raise VideoError(
            f"{name}: cannot be read ({type(error).__name__}: {reason}); the file may be damaged, download it again"
        ) from error

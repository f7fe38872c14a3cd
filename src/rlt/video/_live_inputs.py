"""What a live source is read from: a pipe, a file that grows, a camera, an address. Says when nothing comes."""

from __future__ import annotations

import os
import select
import stat
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO

from rlt.checks import at_least
from rlt.errors import InvalidArgumentError, VideoError
from rlt.video._pyav import opening
from rlt.video._sources import check_source, library_input

LiveSource = str | os.PathLike[str] | BinaryIO
"""A path, "-" for standard input, an address, a device such as /dev/video0, or a binary file object."""

_PROTOCOLS = {
    "http": "http,tcp",
    "https": "https,tls,tcp",
    "rtsp": "rtsp,rtp,udp,tcp",
    "rtsps": "rtsp,rtp,udp,tcp,tls",
}
"""Schemes of addresses, and what libav may open for each: never a file of this machine."""
_SECONDS_BETWEEN_LOOKS = 0.05
_PEEKED = 1 << 16  # bytes in which an MP4 says whether its index comes first


@dataclass(frozen=True)
class LiveSettings:
    """How long is waited for a source, and what then."""

    stall_seconds: float = 10.0
    """Without data for so long a source counts as stalled, above 0."""
    follow_seconds: float = 0.0
    """How long the end of a file is waited at for more, 0 or more: for files that are still written."""
    reconnects: int = 5
    """How often in a row a camera or an address that fails is opened again, 0 or more."""

    def __post_init__(self) -> None:
        at_least(0, follow_seconds=self.follow_seconds, reconnects=self.reconnects)
        if not self.stall_seconds > 0:
            raise InvalidArgumentError(f"stall_seconds is {self.stall_seconds}; more than 0 is needed")


@dataclass(frozen=True)
class LiveInput:
    """What libav opens."""

    name: str
    file: str | BinaryIO
    options: dict[str, str]
    format: str | None = None
    is_live: bool = False
    """Whether it goes on without being read, so that one cannot wait."""
    may_return: bool = False
    """Whether it may be opened again after a failure."""


def live_input(source: LiveSource, settings: LiveSettings) -> LiveInput:
    """What to open for a source.

    Raises:
        VideoError: if it is not there, or holds nothing.
        InvalidArgumentError: for an address of another kind.
    """
    if not isinstance(source, str | os.PathLike):
        return _input_of_object(source)
    name = os.fspath(source)
    if name == "-":
        return _streamed("standard input", sys.stdin.buffer, settings)
    scheme, separator, _ = name.partition("://")
    if separator:
        return _address(name, scheme.lower(), settings)
    mode = _mode(name)
    if stat.S_ISCHR(mode):
        return LiveInput(name, name, opening(), "v4l2", is_live=True, may_return=True)
    if stat.S_ISFIFO(mode):
        return _streamed(name, Path(name).open("rb", buffering=0), settings)
    if settings.follow_seconds > 0 and stat.S_ISREG(mode):
        return _streamed(name, Path(name).open("rb", buffering=0), settings, grows=True)
    check_source(name)
    return LiveInput(name, library_input(name), opening())


def _input_of_object(source: BinaryIO) -> LiveInput:
    if not callable(getattr(source, "read", None)):
        raise InvalidArgumentError(
            f"source is {type(source).__name__}; a path, '-', an address or a binary file object is needed"
        )
    name = getattr(source, "name", None)
    return LiveInput(name if isinstance(name, str) else f"<{type(source).__name__}>", source, opening())


def _mode(name: str) -> int:
    try:
        return Path(name).stat().st_mode
    except (OSError, ValueError) as error:
        reason = "no such file or device" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise VideoError(f"{name}: {reason}; check the path") from None


def _address(name: str, scheme: str, settings: LiveSettings) -> LiveInput:
    if scheme not in _PROTOCOLS:
        raise InvalidArgumentError(f"source is {name!r}; addresses may begin with {', '.join(_PROTOCOLS)}")
    is_camera = scheme.startswith("rtsp")
    formats = opening()["format_whitelist"] + (",rtsp,rtp,sdp" if is_camera else "")
    options = {"protocol_whitelist": _PROTOCOLS[scheme], "format_whitelist": formats}
    if is_camera:
        options["rtsp_transport"] = "tcp"  # lost packets come again, and no port is opened here
    elif settings.reconnects:
        # libav goes on at the byte where a connection was dropped, where the server can.
        options |= {"reconnect": "1", "reconnect_delay_max": str(max(int(settings.stall_seconds), 1))}
    return LiveInput(name, name, options, is_live=is_camera, may_return=True)


def _streamed(name: str, file: IO[bytes], settings: LiveSettings, *, grows: bool = False) -> LiveInput:
    """Bytes that come one after the other; an MP4 whose index comes last is stored first, because it must end."""
    reader = _Reader(name, file, settings, grows=grows)
    reader.peek(_PEEKED)
    if reader.is_empty:
        raise VideoError(f"{name}: nothing came of it (0 bytes); check what writes it")
    if _index_comes_last(reader.peeked):
        return LiveInput(name, _stored(reader), opening())
    return LiveInput(name, reader, opening())  # type: ignore[arg-type]  # PyAV needs read() only


class _Reader:
    """A file object that only reads, and gives what there is instead of waiting for all that was asked for."""

    def __init__(self, name: str, file: IO[bytes], settings: LiveSettings, *, grows: bool) -> None:
        self.name = name
        self.peeked = b""
        self._ended = False
        self._file = file  # which is closed with this reader
        self._descriptor = file.fileno()
        self._settings = settings
        self._comes = self._comes_by_growth if grows else self._comes_by_pipe

    @property
    def is_empty(self) -> bool:
        return not self.peeked

    def peek(self, size: int) -> None:
        """Hold the first bytes back until they are read."""
        while len(self.peeked) < size and (more := self._next(size - len(self.peeked))):
            self.peeked += more
            if not _may_be_mp4(self.peeked) or _has_index(self.peeked):
                return

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end.

        Raises:
            VideoError: if nothing comes for `stall_seconds`.
        """
        if self.peeked:
            given, self.peeked = self.peeked[:size], self.peeked[size:]
            return given
        return self._next(size)

    def _next(self, size: int) -> bytes:
        if self._ended or not self._comes():
            self._ended = True  # libav asks again
            return b""
        return os.read(self._descriptor, size)

    def _comes_by_pipe(self) -> bool:
        seconds = self._settings.stall_seconds
        if select.select([self._descriptor], [], [], seconds)[0]:
            return True
        raise VideoError(
            f"{self.name}: stalled, nothing came for {seconds:g} s; check what writes it, or wait longer for it"
        )

    def _comes_by_growth(self) -> bool:
        """Whether a file has more than was read of it, within `follow_seconds`."""
        position = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        end = time.monotonic() + self._settings.follow_seconds
        while os.fstat(self._descriptor).st_size <= position:
            if time.monotonic() >= end:
                return False
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return True


def _boxes(head: bytes) -> list[bytes]:
    """Kinds of the first boxes of an MP4."""
    kinds, position = [], 0
    while position + 8 <= len(head):
        length = int.from_bytes(head[position : position + 4], "big")
        kinds.append(head[position + 4 : position + 8])
        if length < 8:
            break
        position += length
    return kinds


def _may_be_mp4(head: bytes) -> bool:
    return len(head) < 8 or head[4:8] in (b"ftyp", b"free", b"skip", b"wide", b"mdat", b"moov")


def _has_index(head: bytes) -> bool:
    return bool({b"moov", b"mdat"} & set(_boxes(head)))


def _index_comes_last(head: bytes) -> bool:
    kinds = _boxes(head)
    return _may_be_mp4(head) and b"mdat" in kinds and b"moov" not in kinds


def _stored(reader: _Reader) -> BinaryIO:
    file = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as libav reads it
    while data := reader.read(1 << 20):
        file.write(data)
    file.seek(0)
    return file

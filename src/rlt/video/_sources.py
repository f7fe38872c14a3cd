"""What a video is read from: a path, bytes or a file object. Names it in messages and sees whether it was cut off."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from rlt.errors import InvalidArgumentError, RltError, VideoError

Source = str | os.PathLike[str] | bytes | BinaryIO
"""A path, the bytes of a whole file, or a binary file object that can seek."""

_PATH = (str, os.PathLike)
_BYTES = (bytes, bytearray, memoryview)
_KINDS = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
_MAX_PARTS = 100_000  # a fragmented MP4 has two boxes per fragment; bounds the walk over a hostile file


def source_name(source: Source) -> str:
    """How messages name the source: the path, "<bytes>", or the name of the file object."""
    if isinstance(source, _BYTES):
        return "<bytes>"
    if isinstance(source, _PATH):
        return os.fspath(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else f"<{type(source).__name__}>"


def check_source(source: Source) -> None:
    """Raise for what cannot be a video before any library looks at it."""
    name = source_name(source)
    try:
        if isinstance(source, _PATH):
            _check_regular(source, name)
        elif not isinstance(source, _BYTES):
            _check_object(source, name)
        with _reader(source) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
    except RltError:
        raise
    except FileNotFoundError:
        address = " (addresses are not opened; download it, or read frames of your own)" if "://" in name else ""
        raise VideoError(f"{name}: no such file{address}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, a file object that is closed
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{name}: cannot be read ({reason}); check the path and its permissions") from None
    if size == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes); download or copy it again")


def _check_regular(source: str | os.PathLike[str], name: str) -> None:
    """Refuse what is no file before it is opened: a pipe waits for a writer, a device may never end."""
    mode = Path(source).stat().st_mode
    if stat.S_ISDIR(mode):
        raise VideoError(f"{name}: is a folder, not a video file; rlt.video.list_videos lists the videos in it")
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no regular file")
        raise VideoError(f"{name}: is {kind}, not a video file; copy what it gives into a file first")


def _check_object(source: object, name: str) -> None:
    if not (callable(getattr(source, "read", None)) and callable(getattr(source, "seek", None))):
        raise InvalidArgumentError(
            f"a video source is a path, bytes or a binary file object; {type(source).__name__} was given"
        )
    if not getattr(source, "seekable", lambda: True)():
        raise InvalidArgumentError(f"{name}: this file object cannot seek; read it into bytes first")


_LISTS = (b"#EXTM3U", b"ffconcat version", b"v=0")


def is_playlist(source: Source) -> bool:
    """Whether the source is a text that names other files or addresses: HLS, concat, DASH or SDP."""
    with _reader(source) as file:
        file.seek(0)
        head = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
    return head.startswith(_LISTS) or (head.startswith(b"<") and b"<MPD" in head)


def library_input(source: Source) -> str | BinaryIO:
    """What to hand to a libav-based reader: a "file:" address or a file object at its beginning."""
    if isinstance(source, _BYTES):
        return io.BytesIO(source)
    if isinstance(source, _PATH):
        # The explicit protocol keeps libav from reading "a:b.mp4" as protocol a.
        return f"file:{os.fspath(source)}"
    source.seek(0)
    return source


def missing_bytes(source: Source) -> tuple[int, int] | None:
    """(size, promised size) in bytes if the container's own headers promise more than is there, otherwise None.

    MP4/MOV boxes, RIFF (AVI) and Matroska/WebM say how long they are. Other containers do not: None for them.
    """
    with _reader(source) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(12)
        promised = 0
        for signatures, offset, length_of in _PARTS:
            if head[offset : offset + 4] in signatures:
                promised = _end_of_parts(file, size, length_of)
        file.seek(0)
    return (size, promised) if promised > size else None


def _reader(source: Source) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, _BYTES):
        return io.BytesIO(source)
    if isinstance(source, _PATH):
        return Path(source).open("rb")
    return nullcontext(source)  # not ours to close


def _end_of_parts(file: BinaryIO, size: int, length_of: Callable[[bytes], int | None]) -> int:
    """Where the last part of a file would end that says how long it is; 0 if one reaches to the end of the file."""
    position = 0
    for _ in range(_MAX_PARTS):
        if position >= size:  # the end, or so far behind it that no file could be that long
            break
        file.seek(position)
        length = length_of(file.read(16))
        if length is None:
            return 0
        if length == 0:  # the end of the file, or of what is known of it
            break
        position += length
    return position


def _box(header: bytes) -> int | None:
    if len(header) < 8:
        return 0
    length = int.from_bytes(header[:4], "big")
    if length == 1:
        length = int.from_bytes(header[8:], "big")
    return length if length >= 8 else None  # 0 = up to the end of the file; smaller values are no box


def _riff_chunk(header: bytes) -> int | None:  # OpenDML files are several one after the other
    if header[:4] != b"RIFF" or len(header) < 8:
        return 0
    length = int.from_bytes(header[4:8], "little")
    return None if length in (0, 0xFFFFFFFF) else 8 + length  # by a recorder that never came back to fill it in


def _matroska_element(header: bytes) -> int | None:
    if header[:4] not in (_EBML, b"\x18\x53\x80\x67") or len(header) < 5 or header[4] == 0:  # Segment
        return 0
    width = 9 - header[4].bit_length()
    length = int.from_bytes(header[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
    return None if length == (1 << 7 * width) - 1 else 4 + width + length  # unknown: a live recording


_EBML = b"\x1a\x45\xdf\xa3"
_PARTS: tuple[tuple[tuple[bytes, ...], int, Callable[[bytes], int | None]], ...] = (
    ((b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"), 4, _box),
    ((b"RIFF",), 0, _riff_chunk),
    ((_EBML,), 0, _matroska_element),
)
"""Signatures, where they stand in the file, and the length of a part from its first 16 bytes: None = up to the end of
the file, 0 = there is none."""

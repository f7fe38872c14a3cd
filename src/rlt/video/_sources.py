"""What a video is read from: a path, bytes or a file object. Names it in messages and sees whether it was cut off."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from rlt.errors import InvalidArgumentError, VideoError

Source = str | os.PathLike[str] | bytes | BinaryIO
"""A path, the bytes of a whole file, or a binary file object that can seek."""

_PATH = (str, os.PathLike)
_BYTES = (bytes, bytearray, memoryview)
_MAX_TOP_LEVEL_BOXES = 100_000  # a fragmented MP4 has two per fragment; bounds the walk over a hostile file


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
    if isinstance(source, _PATH):
        if Path(source).is_dir():
            raise VideoError(f"{name}: is a folder, not a video file; rlt.video.list_videos lists the videos in it")
    elif not isinstance(source, _BYTES):
        if not (callable(getattr(source, "read", None)) and callable(getattr(source, "seek", None))):
            raise InvalidArgumentError(
                f"a video source is a path, bytes or a binary file object; {type(source).__name__} was given"
            )
        if not getattr(source, "seekable", lambda: True)():
            raise InvalidArgumentError(f"{name}: this file object cannot seek; read it into bytes first")
    try:
        with _reader(source) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
    except FileNotFoundError:
        raise VideoError(f"{name}: no such file; check the path") from None
    except OSError as error:
        raise VideoError(f"{name}: cannot be read ({error.strerror}); check its permissions") from None
    if size == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes); download or copy it again")


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
        promised = size
        for signature, offset, walk in _WALKS:
            if head[offset : offset + 4] in signature:
                promised = walk(file, size)
        file.seek(0)
    return (size, promised) if promised > size else None


def _reader(source: Source) -> AbstractContextManager[BinaryIO]:
    if isinstance(source, _BYTES):
        return io.BytesIO(source)
    if isinstance(source, _PATH):
        return Path(source).open("rb")
    return nullcontext(source)  # not ours to close


def _end_of_boxes(file: BinaryIO, size: int) -> int:
    position = 0
    for _ in range(_MAX_TOP_LEVEL_BOXES):
        file.seek(position)
        header = file.read(16)
        if len(header) < 8:
            break
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0 = up to the end of the file; smaller values are no box
            return size
        position += length
    return position


def _end_of_riff(file: BinaryIO, size: int) -> int:
    position = 0  # OpenDML files are several RIFF chunks one after the other
    while position < size:
        file.seek(position)
        header = file.read(8)
        if header[:4] != b"RIFF" or len(header) < 8:
            break
        length = int.from_bytes(header[4:8], "little")
        if length in (0, 0xFFFFFFFF):  # written by a recorder that never came back to fill it in
            return size
        position += 8 + length
    return position


def _end_of_matroska(file: BinaryIO, size: int) -> int:
    position = 0
    for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # EBML header, Segment
        file.seek(position)
        header = file.read(12)
        if header[:4] != identifier or len(header) < 5 or header[4] == 0:
            return size
        width = 9 - header[4].bit_length()
        length = int.from_bytes(header[4 : 4 + width], "big") & ((1 << 7 * width) - 1)
        if length == (1 << 7 * width) - 1:  # unknown: a live recording
            return size
        position += 4 + width + length
    return position


_WALKS: tuple[tuple[tuple[bytes, ...], int, Callable[[BinaryIO, int], int]], ...] = (
    ((b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"), 4, _end_of_boxes),
    ((b"RIFF",), 0, _end_of_riff),
    ((b"\x1a\x45\xdf\xa3",), 0, _end_of_matroska),
)
"""Signatures, where they stand in the file, and how to find the promised end."""

"""Writes real short videos of all kinds with PyAV's own encoders.

Every picture shows its own number as ten black or white blocks, so that a test can read from the decoded pixels which
frame it got, with no decoder's word for it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 160, 96
NUM_BITS = 10
_BLOCK = 32, 48  # width, height: two rows of five blocks

Picture = npt.NDArray[np.uint8]


def numbered_picture(number: int) -> Picture:
    """uint8 [96, 160, 3] that shows `number` (0..1023) in blocks of 32x48 pixels, lowest bit top left."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for bit in range(NUM_BITS):
        row, column = divmod(bit, 5)
        value = 235 if number >> bit & 1 else 20
        picture[row * 48 : row * 48 + 48, column * 32 : column * 32 + 32] = value
    return picture


def read_number(picture: npt.NDArray[np.uint8]) -> int:
    """The number that a decoded picture shows (uint8 [H, W, 3], aspect ratio 5 to 3, any size)."""
    height, width = picture.shape[:2]
    number = 0
    for bit in range(NUM_BITS):
        row, column = divmod(bit, 5)
        y, x = (2 * row + 1) * height // 4, (2 * column + 1) * width // 10
        number |= int(picture[y, x].mean() > 128) << bit
    return number


def write_video(
    target: Path | BinaryIO,
    num_frames: int = 60,
    *,
    codec: str = "libx264",
    container: str | None = None,
    rate: Fraction | int = 25,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    rotation: tuple[int, bool, bool] | None = None,
    audio_seconds: float = 0,
    colorspace: int | None = None,
    color_range: int | None = None,
    picture: Callable[[int], Picture | av.VideoFrame] = numbered_picture,
    container_options: dict[str, str] | None = None,
    max_b_frames: int | None = None,
) -> None:
    """Encode pictures 0..num_frames-1.

    Args:
        pts: presentation times in `time_base`, for variable rates and late starts; constant rate without it.
        rotation: (counter-clockwise degrees, horizontal flip, vertical flip) for the display matrix.
        audio_seconds: length of a silent sound track that stands before the video stream; 0 = none.
        colorspace: libav's number of the matrix (1 = BT.709, 5 = BT.601), written to the file.
        color_range: libav's number of the range (1 = limited, 2 = full), written to the file.
        picture: RGB array or finished frame for a number.
    """
    file = str(target) if isinstance(target, Path) else target
    with av.open(file, "w", format=container, options=container_options or {}) as output:
        if audio_seconds:
            sound = output.add_stream("mp2" if container == "avi" else "aac", rate=48000)
        stream = output.add_stream(codec, rate=rate, options=options or {})
        first = as_frame(picture(0))
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, pix_fmt
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if max_b_frames is not None:
            stream.codec_context.max_b_frames = max_b_frames
        if colorspace is not None:
            stream.codec_context.colorspace = colorspace
        if color_range is not None:
            stream.codec_context.color_range = color_range
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        if audio_seconds:
            silence = np.zeros((1, 1024 * 2), np.int16)
            for block in range(int(audio_seconds * 48000 / 1024) + 1):
                samples = av.AudioFrame.from_ndarray(silence, format="s16", layout="stereo")
                samples.sample_rate, samples.pts = 48000, block * 1024
                output.mux(sound.encode(samples))
            output.mux(sound.encode(None))
        for number in range(num_frames):
            frame = as_frame(picture(number))
            frame.pts = number if pts is None else pts[number]
            frame.time_base = time_base or 1 / Fraction(rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def write_frames(target: Path, frames: Picture, *, codec: str = "ffv1", pix_fmt: str = "bgr0") -> Path:
    """Encode uint8 [T, H, W, 3] at 10 frames a second into Matroska; lossless unless told otherwise."""
    write_video(
        target, len(frames), codec=codec, container="matroska", rate=10, pix_fmt=pix_fmt, picture=frames.__getitem__
    )
    return target


def as_frame(picture: Picture | av.VideoFrame) -> av.VideoFrame:
    """The picture as a libav frame."""
    return picture if isinstance(picture, av.VideoFrame) else av.VideoFrame.from_ndarray(picture, format="rgb24")


def yuv_frame(
    rgb: tuple[int, int, int],
    *,
    kr: float,
    kb: float,
    full_range: bool,
    bits: int = 8,
    width: int = 64,
    height: int = 64,
) -> av.VideoFrame:
    """A plain frame whose Y'CbCr comes from the definition: luma weights `kr`, `kb`, range and bit depth as given."""
    red, green, blue = (value / 255 for value in rgb)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = ((blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr))
    scale = 1 << (bits - 8)
    if full_range:
        top = 256 * scale - 1
        values = [luma * top, *(part * top + 128 * scale for part in chroma)]
    else:
        values = [(luma * 219 + 16) * scale, *((part * 224 + 128) * scale for part in chroma)]
    name = "yuv420p" if bits == 8 else f"yuv420p{bits}le"
    frame = av.VideoFrame(width, height, name)
    for plane, value in zip(frame.planes, values, strict=True):
        kind = np.dtype(np.uint8 if bits == 8 else "<u2")
        plane.update(
            np.full(plane.buffer_size // kind.itemsize, min(round(value), (256 << bits >> 8) - 1), kind).tobytes()
        )
    return frame


def write_audio(target: Path, *, cover: bool = False) -> None:
    """A file with one second of silence and no moving pictures, with a cover picture if asked."""
    with av.open(str(target), "w") as output:
        sound = output.add_stream("aac", rate=48000)
        picture = None
        if cover:
            picture = output.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
        for block in range(47):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.int16), format="s16", layout="stereo")
            samples.sample_rate, samples.pts = 48000, block * 1024
            output.mux(sound.encode(samples))
        output.mux(sound.encode(None))
        if picture is not None:
            frame = as_frame(numbered_picture(1)).reformat(format="yuvj420p")
            output.mux(picture.encode(frame))
            output.mux(picture.encode(None))


def packets_of(data: bytes) -> list[tuple[int, int]]:
    """(position, size) in bytes of the video packets of a file, in the order in which they are stored."""
    with av.open(io.BytesIO(data)) as container:
        return [
            (packet.pos, packet.size) for packet in container.demux(video=0) if packet.size and packet.pos is not None
        ]


def damage_packet(data: bytes, packet: int, *, whole: bool = False) -> bytes:
    """The file with the second half of one video packet replaced by noise, or the whole packet by 0xFF."""
    position, size = packets_of(data)[packet]
    begin = position if whole else position + size // 2
    length = position + size - begin
    noise = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8).tobytes()
    return data[:begin] + (b"\xff" * length if whole else noise) + data[position + size :]

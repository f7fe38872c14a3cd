"""Peak memory and time of `rlt features` against the length of a video: 1, 10 and 60 minutes of 1080p, dense and RLT.

    python scripts/long_videos.py [--minutes 1 10 60] [--rate 2] [--json FILE]

One minute is encoded with PyAV; longer videos repeat its packets with later time stamps, in a temporary folder. Every
run is a process of its own, whose peak memory is what the kernel counts for it. Python, torch and the
network are in it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from rlt.files import write_json
from rlt.measure import machine_info

HEIGHT, WIDTH, SECONDS = 1080, 1920, 60
WAYS = {"dense": ("--rule", "none"), "rlt": ("--threshold", "0.1")}
MODEL, EVERY = "vit_micro", 30.0
BATCH = 3136  # two dense windows: as full after a minute as after an hour
OPTIONS = {"preset": "ultrafast", "crf": "28", "g": "60", "bf": "0", "threads": "1"}


def pictures(kind: str, count: int) -> Iterator[np.ndarray]:
    """A blurred texture that stands still but for a walking box, or that the camera pans over."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
    scene = np.kron(noise, np.ones((8, 8, 1), np.uint8))
    for number in range(count):
        picture = scene.copy() if kind == "static" else np.roll(scene, 48 * number, axis=1)
        left = 24 * number % (WIDTH - 160)
        picture[400:720, left : left + 160] = 230
        yield picture


def write_minute(path: Path, kind: str, rate: int) -> None:
    """One minute, which begins with a key frame."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=rate, options=OPTIONS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for picture in pictures(kind, SECONDS * rate):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode(None))


def repeat(minute: Path, target: Path, times: int) -> None:
    """The packets of a minute again and again, each time a minute later; nothing is encoded."""
    with av.open(str(target), "w") as output, av.open(str(minute)) as source:
        stream = output.add_stream_from_template(source.streams.video[0])
        for turn in range(times):
            source.seek(0)
            for packet in source.demux(video=0):
                if packet.dts is None:
                    continue
                shift = int(turn * SECONDS / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                output.mux(packet)


def run(video: Path, way: str, folder: Path) -> dict[str, float]:
    """Seconds and peak memory of one command."""
    command = [sys.executable, "-m", "rlt", "features", MODEL, str(video), "--output", str(folder / "f.parquet")]
    begin = time.perf_counter()
    with open(os.devnull, "w") as nothing:  # noqa: PTH123 (a device)
        child = os.posix_spawn(
            sys.executable,
            [*command, "--every", str(EVERY), "--batch-tokens", str(BATCH), *WAYS[way]],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, nothing.fileno(), 1)],
        )
        _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"rlt features {video} ended with {os.waitstatus_to_exitcode(status)}")
    scale = 1 if sys.platform == "darwin" else 1024
    return {"seconds": time.perf_counter() - begin, "peak_memory_bytes": usage.ru_maxrss * scale}


def main() -> None:
    """Measure every length and leave JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, nargs="+", default=[1, 10, 60])
    parser.add_argument("--rate", type=int, default=2, help="frames a second")
    parser.add_argument("--json", type=Path, default=Path("docs/results/long-videos.json"))
    options = parser.parse_args()
    runs: list[dict[str, object]] = []
    settings = {"model": MODEL, "every": EVERY, "batch_tokens": BATCH, "rate": options.rate, "size": [HEIGHT, WIDTH]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("static", "moving"):
            minute, video = folder / f"{kind}.mp4", folder / "long.mp4"
            write_minute(minute, kind, options.rate)
            for minutes in options.minutes:
                repeat(minute, video, minutes)
                for way in WAYS:
                    found = run(video, way, folder)
                    runs.append({"kind": kind, "minutes": minutes, "way": way, "bytes": video.stat().st_size, **found})
                    print(runs[-1], flush=True)
                    write_json(options.json, {"settings": settings, "runs": runs, "machine": machine_info("cpu")})


if __name__ == "__main__":
    main()

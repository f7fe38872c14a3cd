"""Looks into many video files at once, and remembers what it saw, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rlt.data.manifest import VideoEntry
from rlt.errors import InvalidArgumentError, VideoError, VideoWarning, one_line
from rlt.tokens import keep_mask
from rlt.video import probe, read_clip

Progress = Callable[[int, int, str], None]
"""Called with the number of finished videos, the number of all, and the name of the last one."""

MISSING = "missing"
"""`VideoEntry.status` where there is no file."""

_WAITING_PER_WORKER = 16


@dataclass(frozen=True)
class Probe:
    """What a look into a video file found."""

    entry: VideoEntry
    """The row of a manifest, with the status "ok", "missing", or one line that says why the file cannot be used. Its
    label is not known here."""
    size: int = 0
    """Size of the file in bytes."""
    modified: int = 0
    """When the file was changed last, in nanoseconds since 1970."""


def probe_video(path: str, *, measure_tokens: bool = False) -> Probe:
    """Look into one file, given by its absolute path; whatever is wrong with it becomes the status.

    With `measure_tokens` the clip in the middle (16 frames, stride 4, 224 px) is decoded, and the tokens that it keeps
    at threshold 0.1 are counted.
    """
    entry = VideoEntry(path, 0, "")
    try:
        stat = os.stat(path)  # noqa: PTH116 (100,000s of files)
    except (OSError, ValueError):
        return Probe(replace(entry, status=MISSING))
    try:
        info = probe(path)
        if info.truncated:
            entry = replace(entry, status="the file is cut off; download or copy it again")
        else:
            entry = VideoEntry(path, 0, "", info.num_frames, info.fps, info.width, info.height, info.duration)
            if measure_tokens:
                clip = read_clip(path, num_frames=16, frame_stride=4, size=224, num_threads=1)
                kept = keep_mask(clip.frames[None], threshold=0.1)
                entry = replace(entry, tokens_kept=float(kept.to(torch.float64).mean()))
    except VideoError as error:
        entry = replace(entry, status=one_line(str(error).removeprefix(f"{path}: ")))
    except Exception as error:  # one strange file must not end the work on 200,000 others
        entry = replace(entry, status=one_line(f"{type(error).__name__}: {error}"))
    return Probe(entry, stat.st_size, stat.st_mtime_ns)


class ProbeRecord:
    """The file `<output>.partial`: one JSON line per video, appended and flushed as soon as it is done.

    Use it as a context manager. It begins with what an interrupted run left.
    """

    def __init__(self, path: Path) -> None:
        self._known: dict[str, Probe] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A kill in the middle of a line leaves a piece of it: it is no JSON, and the next line begins anew.
            self._stream = path.open("a+", encoding="utf-8")
            self._stream.seek(0)
            text = self._stream.read()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(
                f"{path} cannot be used ({one_line(error)}); choose another --output, or remove it"
            ) from None
        for line in text.splitlines():
            try:
                values = json.loads(line)
                size, modified = values.pop("size"), values.pop("modified")
                self._known[values["path"]] = Probe(VideoEntry(**values), size, modified)
            except (ValueError, TypeError, LookupError, AttributeError):  # a line of something else
                continue
        if text and not text.endswith("\n"):
            self._stream.write("\n")

    def __enter__(self) -> ProbeRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def find(self, path: str, *, measure_tokens: bool) -> Probe | None:
        """What is known of a file; None if nothing is, if it was changed since, or if its tokens are to be measured."""
        known = self._known.get(path)
        if known is None or (measure_tokens and known.entry.usable and known.entry.tokens_kept is None):
            return None
        try:
            stat = os.stat(path)  # noqa: PTH116 (100,000s of files)
        except OSError:
            return None
        return known if (stat.st_size, stat.st_mtime_ns) == (known.size, known.modified) else None

    def add(self, seen: Probe) -> None:
        """Remember a file. One that is missing is not remembered: it may come."""
        if seen.entry.status != MISSING:
            self._known[seen.entry.path] = seen
            values = asdict(seen.entry) | {"size": seen.size, "modified": seen.modified}
            self._stream.write(json.dumps(values) + "\n")
            self._stream.flush()


def probe_videos(
    paths: Sequence[str],
    record: ProbeRecord,
    *,
    workers: int,
    measure_tokens: bool = False,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Probe], int]:
    """What was found in many files, by path, and how many were looked at now rather than taken from `record`.

    Threads, not processes: libav works without the interpreter's lock. On two cores two threads are 1.6 times as fast
    as one at headers and 2.0 times at clips; two processes are no faster, and take seconds to start.
    """
    known = {path: record.find(path, measure_tokens=measure_tokens) for path in paths}
    found = {path: seen for path, seen in known.items() if seen is not None}
    unknown = [path for path in known if path not in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)  # of no use among thousands; what matters becomes the status
        for seen in _in_threads(unknown, workers, measure_tokens):
            record.add(seen)
            found[seen.entry.path] = seen
            if on_progress is not None:
                on_progress(len(found), len(known), Path(seen.entry.path).name)
    return found, len(unknown)


def _in_threads(paths: Iterable[str], workers: int, measure_tokens: bool) -> Iterator[Probe]:
    """Results in the order of `paths`, with a bounded number of files under way."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="probe")
    waiting: deque[Future[Probe]] = deque()
    try:
        for path in paths:
            waiting.append(pool.submit(probe_video, path, measure_tokens=measure_tokens))
            if len(waiting) > workers * _WAITING_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)

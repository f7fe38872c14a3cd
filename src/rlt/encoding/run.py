"""The job behind `rlt predict` and `rlt features`: many videos through one encoder, into a file, whatever happens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlt.checks import exclusive, one_of
from rlt.data.token_files import StoredVideo
from rlt.encoding.cutting import Cutter, Row
from rlt.encoding.encoder import Encoder
from rlt.encoding.parts import Parts
from rlt.encoding.rows import failed_row
from rlt.encoding.sources import is_address, list_sources, stored_videos
from rlt.errors import InvalidArgumentError
from rlt.files import refuse_inputs
from rlt.measure import machine_info

ENGINES = ("local", "ray")
Progress = Callable[[int, int, str], None]
"""Called with (videos done, videos in all, name of the one that is read); of a few videos with hundredths of them."""
_MANY = 100
_VIDEOS_KEPT = 20


@dataclass
class VideoDigest:
    """What is shown of one video."""

    source: str
    windows: int = 0
    seconds: float = 0.0
    """Time of its last frame."""
    tokens_kept: float = 0.0
    """Share, mean over its windows."""
    classes: Counter[str] = field(default_factory=Counter)
    """How many windows put a class first."""


@dataclass
class Encoding:
    """What a run came to."""

    num_videos: int
    num_rows: int = 0
    """New rows of windows, without errors."""
    num_before: int = 0
    """Rows that an earlier run had written."""
    num_tokens: int = 0
    window_tokens: int = 0
    """Tokens of a window when nothing is dropped."""
    num_dense: float = 0.0
    """Tokens of the new windows when nothing is dropped."""
    seconds: float = 0.0
    """Wall-clock time of this run."""
    failed: list[tuple[str, str]] = field(default_factory=list)
    """(video, what is wrong with it), of all runs."""
    videos: dict[str, VideoDigest] = field(default_factory=dict)
    """The first few."""

    @property
    def tokens_kept(self) -> float:
        """Share of the tokens of this run's windows."""
        return self.num_tokens / self.num_dense if self.num_dense else 1.0

    @property
    def has_classes(self) -> bool:
        """Whether classes were asked for."""
        return any(video.classes for video in self.videos.values())

    def to_json(self) -> dict[str, Any]:
        """Numbers and errors as JSON values."""
        names = ("num_videos", "num_rows", "num_before", "num_tokens", "tokens_kept", "seconds")
        failed = [{"source": source, "error": error} for source, error in self.failed]
        return {**{name: getattr(self, name) for name in names}, "failed": failed}

    def add(self, row: Mapping[str, Any], *, new: bool = True) -> None:
        """Count a row."""
        if row["error"] is not None:
            self.failed.append((row["source"], row["error"]))
            return
        self.num_rows += new
        self.num_before += not new
        if new:
            self.num_tokens += row["num_tokens"]
            # An image model has nothing to compute where nothing changed since the window before.
            self.num_dense += row["num_tokens"] / row["tokens_kept"] if row["num_tokens"] else self.window_tokens
        if row["source"] not in self.videos and len(self.videos) < _VIDEOS_KEPT:
            self.videos[row["source"]] = VideoDigest(row["source"])
        if (video := self.videos.get(row["source"])) is not None:
            video.windows += 1
            video.seconds = row["end"]
            video.tokens_kept += (row["tokens_kept"] - video.tokens_kept) / video.windows
            if row.get("top_ids"):
                video.classes[row["top_names"][0] or f"class {row['top_ids'][0]}"] += 1


def encode_videos(
    encoder: Encoder | Cutter,
    videos: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    on_progress: Progress | None = None,
) -> Encoding:
    """Run an encoder over videos, one row per window.

    Rows are written as they come, and a run that was cut off goes on where it stopped, with each row once, when the
    same is asked for again. A video that cannot be read is a row with `error`; the others go on.

    Args:
        encoder: what is asked of which network; a `Cutter` writes the tokens themselves.
        videos: see `rlt.encoding.list_sources`.
        output: Parquet (.parquet) or JSON (.json) file to write; None writes nothing.
        engine: "local", or "ray" for Ray Data on this machine or a cluster; the rows are the same.
        address: of a Ray cluster; None starts Ray here.
        workers: of Ray, networks at once; one for each GPU, or one, if None.
        on_progress: see `Progress`.

    Raises:
        InvalidArgumentError: for an output that is no such file, has parts of another run, or that another process
            writes.
        VideoError: if something named does not exist.
        MissingDependencyError: if pyarrow or ray is needed and not installed.
    """
    one_of(ENGINES, engine=engine)
    if engine == "local":
        for name, value in (("address", address), ("workers", workers)):
            exclusive(engine="local", **{name: value})
    found, stored = list_sources(videos), stored_videos(videos)
    cutter = encoder.cutter if isinstance(encoder, Encoder) else encoder
    for file in {id(video.file): video.file for video in stored.values()}.values():
        file.check(cutter.settings_of_tokens())
    if output is None:
        return _encode(encoder, found, stored, None, engine, address, workers, on_progress)
    target = Path(output)
    if target.suffix.lower() not in (".parquet", ".json"):
        raise InvalidArgumentError(f"output is {output}; a file that ends in .parquet or .json is needed")
    refuse_inputs([target], [*(name for name in found if not is_address(name)), *videos, encoder.name or ""])
    with Parts(target, encoder.outputs, encoder.settings()) as parts:
        return _encode(encoder, found, stored, parts, engine, address, workers, on_progress)


def _encode(
    encoder: Encoder | Cutter,
    found: Mapping[str, str | None],
    stored: Mapping[str, StoredVideo],
    parts: Parts | None,
    engine: str,
    address: str | None,
    workers: int | None,
    on_progress: Progress | None,
) -> Encoding:
    cutter = encoder.cutter if isinstance(encoder, Encoder) else encoder
    result, begin = Encoding(len(found), window_tokens=cutter.window_tokens), time.monotonic()
    for row in parts.rows() if parts is not None and parts.done else ():
        result.add(row, new=False)
    todo = [name for name in found if parts is None or not parts.is_finished(name)]
    done = {name: sorted(parts.done.get(name, ())) for name in todo} if parts is not None else {}
    tell = _Telling(found, todo, on_progress)
    for row, share in _rows(encoder, todo, found, stored, done, engine, address, workers):
        if parts is None or parts.add(row):
            result.add(row)
        tell(row, share)
    result.seconds = time.monotonic() - begin
    if parts is not None:
        parts.finish({"summary": result.to_json(), "machine": machine_info()})
    return result


def _rows(
    encoder: Encoder | Cutter,
    todo: Sequence[str],
    found: Mapping[str, str | None],
    stored: Mapping[str, StoredVideo],
    done: Mapping[str, list[int]],
    engine: str,
    address: str | None,
    workers: int | None,
) -> Iterator[tuple[Row, float]]:
    """Rows, and how much of its video was read with each."""
    known = [name for name in todo if (error := found[name]) is None or not error]
    for name in todo:
        if name not in known:
            yield failed_row(name, 0, f"{name}: {found[name]}"), 1.0
    batch: dict[str, list[Any]] = {
        "video": [stored.get(name) or (name if is_address(name) else str(Path(name).absolute())) for name in known],
        "source": list(known),
        "done": [done.get(name, []) for name in known],
    }
    if engine == "ray":
        from rlt.encoding._ray import rows_by_ray  # optional package

        yield from rows_by_ray(encoder, batch, address=address, workers=workers)
    elif known:
        for cut in encoder.run(encoder.cut(batch)):
            yield cut.row, cut.share_read


class _Telling:
    """From rows to progress."""

    def __init__(self, found: Iterable[str], todo: Sequence[str], on_progress: Progress | None) -> None:
        videos = len(list(found))
        self.per_video = 1 if videos >= _MANY else 100
        self.total = self.per_video * videos
        self.finished = self.total - self.per_video * len(todo)
        self.on_progress = on_progress

    def __call__(self, row: Row, share: float) -> None:
        if row["last"]:
            self.finished += self.per_video
        within = 0 if row["last"] else int(self.per_video * share)
        if self.on_progress is not None:
            self.on_progress(min(self.finished + within, self.total), self.total, Path(row["source"]).name)

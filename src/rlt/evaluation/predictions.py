"""What a model says about each video, and its Parquet file: one row per video."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlt.data.tables import read_table, write_table
from rlt.errors import InvalidArgumentError

MAX_TOP = 5
"""Top-k accuracy is taken for this k, or for the number of classes where there are fewer."""


@dataclass(frozen=True)
class VideoPrediction:
    """One video: what it is, and what the mean over its views says."""

    path: str
    """Its file."""
    label_id: int
    """The class that it has."""
    top_ids: tuple[int, ...]
    """The most probable classes, most probable first; 5, or all where there are fewer."""
    top_probabilities: tuple[float, ...]
    """Their probabilities: softmax, averaged over the views."""
    tokens: tuple[int, ...]
    """Tokens that entered the network, view by view."""
    tokens_dense: int
    """Tokens of a view when nothing is dropped."""

    @property
    def predicted_id(self) -> int:
        """The most probable class."""
        return self.top_ids[0]

    @property
    def correct(self) -> bool:
        """Whether the most probable class is the right one."""
        return self.predicted_id == self.label_id

    @property
    def in_top(self) -> bool:
        """Whether the right class is among the most probable ones."""
        return self.label_id in self.top_ids

    @property
    def tokens_kept(self) -> float:
        """Share of the tokens that entered the network, mean over the views."""
        return sum(self.tokens) / (len(self.tokens) * self.tokens_dense)


_COLUMNS = (
    "path", "label_id", "label", "predicted_id", "predicted", "correct",
    "top_ids", "top_probabilities", "tokens_kept", "tokens", "tokens_dense",
)  # fmt: skip


def write_predictions(
    predictions: Iterable[VideoPrediction],
    path: str | Path,
    *,
    class_names: Sequence[str],
    settings: Mapping[str, object] | None = None,
) -> None:
    """Write a Parquet file with one row per video; an old file is replaced only when the new one is whole.

    Its metadata keep as JSON all `class_names`, by label id, and the `settings`, so that it says how it came about.

    Raises:
        InvalidArgumentError: if there is no prediction, or the file cannot be written.
        MissingDependencyError: if pyarrow cannot be imported.
    """
    videos = list(predictions)
    if not videos:
        raise InvalidArgumentError(f"no predictions to write to {path}; evaluate at least one video")
    names = {"label": "label_id", "predicted": "predicted_id"}
    columns: dict[str, list[Any]] = {
        name: [getattr(video, names.get(name, name)) for video in videos] for name in _COLUMNS
    }
    columns |= {name: [class_names[label_id] for label_id in columns[name]] for name in names}
    write_table(path, columns, {"class_names": json.dumps(list(class_names)), "settings": json.dumps(settings or {})})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_predictions(path: str | Path) -> list[VideoPrediction]:
    """Read what `write_predictions` wrote.

    Raises:
        InvalidArgumentError: if the file cannot be read, holds something else, or names a video twice.
        MissingDependencyError: if pyarrow cannot be imported.
    """
    columns: dict[str, list[Any]] = read_table(path)[0]
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise InvalidArgumentError(
            f"{path} lacks the columns {', '.join(missing)}; give a file that `rlt evaluate predictions=FILE` wrote"
        )
    rows = zip(*(columns[field.name] for field in fields(VideoPrediction)), strict=True)
    videos = [VideoPrediction(*map(_frozen, row)) for row in rows]
    twice = [file for file, count in Counter(video.path for video in videos).items() if count > 1]
    if twice:
        raise InvalidArgumentError(f"{path} holds {twice[0]} twice; one row per video is needed")
    return videos

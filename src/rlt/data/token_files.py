"""Tokens as data: kept patches, coordinates and run lengths as rows of a file, so that decoding is paid once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlt.data.manifest import Manifest, VideoEntry
from rlt.data.tables import TableFile
from rlt.errors import InvalidArgumentError
from rlt.structures import PatchSpec, RunLengthTokens, TokenGrid
from rlt.tokens import Rule, rule_options
from rlt.video import ClipSpec

COLUMNS = {"patches": "binary", "coords": "binary", "run_lengths": "binary", "grid": "list<int64>"}
"""Of the tokens of one clip: uint8 [N, D], int32 [N, 3] and int32 [N] as little-endian bytes, and (T', H', W')."""
LABELS = {"label_id": "int64", "label": "string"}
_INDEX = ("source", "window", "start", "end", "tokens_kept", "error", "last", *LABELS)
_SETTINGS, _MARK = "settings", ["patches"]
_REMEDY = "ask for what it has, or make another with `rlt tokens`"


def columns_of_tokens(tokens: RunLengthTokens) -> dict[str, Any]:
    """Tokens of uint8 patches as the values of `COLUMNS`."""
    small = tokens.coords.numpy().astype("<i4"), tokens.lengths.numpy().astype("<i4")
    numbers = tokens.patches.contiguous().numpy(), *small
    return dict(zip(COLUMNS, [*(array.tobytes() for array in numbers), list(tokens.grid)], strict=True))


def tokens_of_columns(row: Mapping[str, Any], spec: PatchSpec) -> RunLengthTokens:
    """What `columns_of_tokens` was given, from bytes or buffers."""
    return RunLengthTokens(
        _tensor(row["patches"], "u1", spec.values_per_token),
        _tensor(row["coords"], "<i4", 3).to(torch.int64),
        _tensor(row["run_lengths"], "<i4", 1).to(torch.int64)[:, 0],
        TokenGrid(*row["grid"]),
        spec,
    )


def _tensor(content: Any, kind: str, width: int) -> Tensor:
    return torch.from_numpy(np.frombuffer(content, kind).copy().reshape(-1, width))


def token_settings(clip: ClipSpec, rule: Rule, patches: PatchSpec) -> dict[str, Any]:
    """What decides tokens, ready for JSON: a file is of use only where the same is asked for."""
    return {
        **vars(clip),
        "size": list(clip.frame_size),
        "tubelet_size": patches.tubelet_size,
        "patch_size": patches.patch_size,
        "rule": rule_options(rule),
    }


def is_token_file(path: str | Path) -> bool:
    """Whether a file is one of `rlt tokens`, by what is said at its end."""
    if Path(path).suffix.lower() != ".parquet" or not Path(path).is_file():
        return False
    try:
        return _settings_of(TableFile(path)) is not None
    except InvalidArgumentError:  # whoever reads it says more
        return False


def _settings_of(table: TableFile) -> dict[str, Any] | None:
    try:
        found = json.loads(table.metadata.get(_SETTINGS, "null"))
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("outputs") == _MARK else None


class Window(NamedTuple):
    """A row of a file, without its tokens."""

    row: int
    window: int
    start: float | None
    end: float | None
    error: str | None
    last: bool


class TokenFile:
    """The tokens of windows of videos, as `rlt tokens` wrote them; read row by row. It can be pickled.

    Raises:
        InvalidArgumentError: if the file cannot be read, or is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.table = TableFile(path)
        settings = _settings_of(self.table)
        if settings is None or not {*_INDEX, *COLUMNS} <= {*self.table.columns}:
            raise InvalidArgumentError(f"{path} has no tokens; write it with `rlt tokens`")
        self.settings = settings
        """`token_settings` of its making, with `overlap`, `every`, `decoder` and `class_names`."""
        self.patches = PatchSpec(settings["tubelet_size"], settings["patch_size"])
        columns = self.table.read(_INDEX)
        self.windows: dict[str, list[Window]] = {}
        """Rows of each video, in order."""
        self._shares: dict[str, list[float]] = {}
        self._labels: dict[str, tuple[int | None, str | None]] = {}
        rows = zip(*(columns[name] for name in _INDEX), strict=True)
        for index, (source, window, start, end, share, error, last, *label) in enumerate(rows):
            self.windows.setdefault(source, []).append(Window(index, window, start, end, error, last))
            if error is None:
                self._shares.setdefault(source, []).append(share)
                self._labels[source] = tuple(label)

    def __repr__(self) -> str:
        return f"TokenFile({str(self.table.path)!r}, {len(self)} windows of {len(self.windows)} videos)"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> RunLengthTokens:
        return self.tokens(index)

    def tokens(self, index: int, spec: PatchSpec | None = None) -> RunLengthTokens:
        """The tokens of row `index`, for a network that normalises as `spec` says.

        Raises:
            InvalidArgumentError: for a row that is an error or damaged.
        """
        row = self.table.row(index, tuple(COLUMNS))
        if row["patches"] is None:
            raise InvalidArgumentError(f"row {index} of {self.table.path} is an error and has no tokens")
        try:
            return tokens_of_columns(row, spec or self.patches)
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(f"row {index} of {self.table.path} is damaged ({error})") from error

    def whole(self, source: str) -> list[int]:
        """Rows of a video that have tokens."""
        return [window.row for window in self.windows[source] if window.error is None]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Hold that it was made as somebody now asks.

        Args:
            settings: those of its settings that matter, see `token_settings`.

        Raises:
            InvalidArgumentError: naming all that differs.
        """
        wanted = json.loads(json.dumps(settings))  # tuples are lists there
        differ = [
            f"{name} {_plain(self.settings.get(name))} and not {_plain(value)}"
            for name, value in wanted.items()
            if self.settings.get(name) != value
        ]
        if differ:
            raise InvalidArgumentError(f"the tokens of {self.table.path} have {', '.join(differ)}; {_REMEDY}")

    def manifest(self) -> Manifest:
        """Its videos with their labels; those without a single window are no usable ones.

        Raises:
            InvalidArgumentError: if it was made of videos without labels.
        """
        names = tuple(self.settings.get("class_names") or ())
        entries = []
        for source, windows in self.windows.items():
            if not (shares := self._shares.get(source)):
                problem = windows[-1].error or "no window"
                entries.append(VideoEntry(source, 0, names[0] if names else "", status=problem))
                continue
            label_id, label = self._labels[source]
            if label_id is None or label is None or not names:
                raise InvalidArgumentError(
                    f"{self.table.path}: {source} has no label; give `rlt tokens` the manifest of the videos"
                )
            entries.append(VideoEntry(source, label_id, label, tokens_kept=sum(shares) / len(shares)))
        if not names:
            raise InvalidArgumentError(
                f"{self.table.path} has no classes; give `rlt tokens` the manifest of the videos"
            )
        return Manifest(tuple(entries), names)


class StoredVideo(NamedTuple):
    """One video of a file of tokens, as a source of `rlt.Encoder`."""

    file: TokenFile
    source: str


def _plain(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return " ".join(f"{name}={inner}" for name, inner in value.items() if inner is not None)


def mirrored(tokens: RunLengthTokens) -> RunLengthTokens:
    """The tokens of the clip mirrored left to right: what is kept of it, where rules see nothing but differences."""
    tubelet, patch = tokens.spec.tubelet_size, tokens.spec.patch_size
    pixels = tokens.patches.view(len(tokens), tubelet, patch, patch, -1).flip(3).flatten(1)
    coords = tokens.coords.clone()
    coords[:, 2] = tokens.grid.width - 1 - coords[:, 2]
    place = (coords[:, 0] * tokens.grid.height + coords[:, 1]) * tokens.grid.width + coords[:, 2]
    order = place.argsort()
    return replace(tokens, patches=pixels[order], coords=coords[order], lengths=tokens.lengths[order])

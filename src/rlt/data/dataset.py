"""Videos of a manifest as data sets: random clips for training, all views tokenized for evaluation.

Both are map-style and picklable, open a file inside `__getitem__` and close it there, and decode with one thread, so
that they work in forked and in spawned workers of a DataLoader.
"""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rlt.checks import one_of
from rlt.data.augment import AugmentConfig, augment_clip
from rlt.data.clips import ViewConfig, read_evaluation_clips, read_training_clip
from rlt.data.manifest import VideoEntry
from rlt.data.sampler import SampleKey, derive_seed
from rlt.errors import InvalidArgumentError, VideoError, VideoWarning
from rlt.structures import Clip, PatchSpec, RunLengthTokens
from rlt.tokens import Rule, tokenize_batch
from rlt.video import DECODERS, ClipSpec

Sample = TypeVar("Sample", covariant=True)
Read = TypeVar("Read")
Failed = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """One augmented clip."""

    frames: Tensor
    """uint8 [T, H, W, 3]."""
    label_id: int
    """Its class; of the replacement if the video asked for could not be decoded."""
    path: str
    """The video that the frames come from."""
    failed: tuple[tuple[str, str], ...]
    """(path, reason) of videos that could not be decoded and were replaced by this one."""
    position: int
    """`SampleKey.position`."""
    notes: tuple[str, ...] = ()
    """What deserves a look though the clip is whole, such as a file that is cut off behind it."""


@dataclass(frozen=True, eq=False)
class EvaluationSample:
    """All views of one video."""

    tokens: list[RunLengthTokens]
    """One per view, crops of a clip next to each other; empty if the video could not be decoded."""
    label_id: int
    """Its class."""
    path: str
    """Its file."""
    error: str | None
    """Why it could not be decoded, in one line."""
    seconds_decode: float
    """Time that reading and decoding took, in seconds."""
    seconds_tokenize: float
    """Time that selecting tokens took, in seconds."""
    notes: tuple[str, ...] = ()
    """What deserves a look though all views are whole."""


@dataclass(eq=False, repr=False)
class _Videos(Dataset[Sample]):
    entries: Sequence[VideoEntry]
    """Usable videos (`Manifest.usable`)."""
    clip: ClipSpec
    _: KW_ONLY
    seed: int = 0
    """Of the run."""
    decoder: str = "pyav"
    """See `rlt.read_clip`."""

    def __post_init__(self) -> None:
        one_of(DECODERS, decoder=self.decoder)
        if not self.entries:
            raise InvalidArgumentError("0 videos; a data set needs at least one whose status is ok")

    def __len__(self) -> int:
        return len(self.entries)


class Replacing:
    """Takes the next video of a class, wrapping around, for one that cannot be read; if none of the class can be read,
    one of the next class. If none at all can be read, that is a VideoError."""

    def __init__(self, entries: Sequence[VideoEntry]) -> None:
        self.entries = entries
        self.members: dict[int, list[int]] = defaultdict(list)
        for index, entry in enumerate(entries):
            self.members[entry.label_id].append(index)

    def __call__(self, index: int, read: Callable[[VideoEntry], Read]) -> tuple[Read, VideoEntry, Failed, list[str]]:
        """What could be read, of which video, the (path, reason) of those before it, and warnings about it."""
        failed: list[tuple[str, str]] = []
        for candidate in self._candidates(index):
            entry = self.entries[candidate]
            try:
                with _recorded_warnings() as notes:
                    found = read(entry)
            except VideoError as error:
                failed.append((entry.path, str(error)))
                continue
            return found, entry, tuple(failed), notes
        raise VideoError(f"none of {len(self.entries)} videos can be decoded; the first one: {failed[0][1]}")

    def _candidates(self, index: int) -> Iterator[int]:
        """The sample itself, the others of its class from there on, then the next classes."""
        label_ids = sorted(self.members)
        first = label_ids.index(self.entries[index].label_id)
        for label_id in label_ids[first:] + label_ids[:first]:
            members = self.members[label_id]
            start = members.index(index) if index in members else 0
            yield from members[start:] + members[:start]


@dataclass(eq=False, repr=False)
class TrainingDataset(_Videos[TrainingSample]):
    """Random augmented clips; everything random is a function of (seed, position).

    A video that cannot be decoded is replaced by the next one of its class, wrapping around; if none of the class can
    be decoded, by one of the next class. If none at all can be decoded, that is a VideoError.
    """

    augment: AugmentConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self._replacing = Replacing(self.entries)

    def __getitem__(self, key: SampleKey) -> TrainingSample:
        return self.augmented(self.read(key))

    def read(self, key: SampleKey) -> TrainingSample:
        """The clip as it is decoded, cropped, scaled and mirrored, but not augmented."""
        seed = derive_seed(self.seed, key.position)

        def read(entry: VideoEntry) -> Clip:
            return read_training_clip(entry.path, self.clip, self.augment, seed=seed, decoder=self.decoder)

        clip, entry, failed, notes = self._replacing(key.index, read)
        return TrainingSample(clip.frames, entry.label_id, entry.path, failed, key.position, tuple(notes))

    def augmented(self, sample: TrainingSample) -> TrainingSample:
        """A clip of `read` after RandAugment and random erasing."""
        seed = derive_seed(derive_seed(self.seed, sample.position), 3)
        return replace(sample, frames=augment_clip(sample.frames, self.augment, seed=seed))


@dataclass(eq=False, repr=False)
class EvaluationDataset(_Videos[EvaluationSample]):
    """All views of each video, tokenized, or the reason why there are none; the same on every call.

    What a rule draws for a view depends on `seed`, the name of the file and the number of the view, not on which other
    videos there are or which machine reads them.
    """

    views: ViewConfig
    rule: Rule
    spec: PatchSpec

    def __getitem__(self, index: int) -> EvaluationSample:
        entry = self.entries[index]
        begin = time.perf_counter()
        try:
            with _recorded_warnings() as notes:
                clips = read_evaluation_clips(entry.path, self.clip, self.views, decoder=self.decoder)
        except VideoError as error:
            seconds = time.perf_counter() - begin
            return EvaluationSample([], entry.label_id, entry.path, str(error), seconds, 0.0)
        decoded = time.perf_counter()
        name = int.from_bytes(Path(entry.path).name.encode(), "big")
        seeds = [derive_seed(self.seed, name, view) for view in range(len(clips))]
        tokens = tokenize_batch(torch.stack([clip.frames for clip in clips]), self.rule, self.spec, seeds)
        done = time.perf_counter()
        return EvaluationSample(tokens, entry.label_id, entry.path, None, decoded - begin, done - decoded, tuple(notes))


@contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """Warnings about videos go into the list instead of to a worker's terminal; the list is filled at the end."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VideoWarning)
        yield notes
    for warning in caught:
        if issubclass(warning.category, VideoWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)

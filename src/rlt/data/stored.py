"""Training and validation on a file of `rlt tokens`, in the place of a manifest: nothing is decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch.utils.data import Dataset

from rlt.data.augment import AugmentConfig, soft_targets
from rlt.data.batch import Batch, batch_of, check_labels
from rlt.data.dataset import EvaluationSample, Replacing
from rlt.data.manifest import Manifest, VideoEntry, read_manifest
from rlt.data.sampler import SampleKey, derive_seed
from rlt.data.token_files import TokenFile, is_token_file, mirrored
from rlt.errors import InvalidArgumentError, VideoError
from rlt.structures import PatchSpec, RunLengthTokens

_NEEDS_PIXELS = {
    "random_resized_crop": False,
    "rand_augment_num_ops": 0,
    "erasing_probability": 0.0,
    "mixup_alpha": 0.0,
    "cutmix_alpha": 0.0,
}
"""Changes of whole frames, before tokens are chosen, and the values that turn them off."""


@dataclass(frozen=True, eq=False)
class StoredSample:
    """The tokens of one clip; see `TrainingSample`."""

    tokens: RunLengthTokens
    label_id: int
    path: str
    failed: tuple[tuple[str, str], ...]
    position: int
    notes: tuple[str, ...] = ()


def read_videos(path: str) -> tuple[Manifest, TokenFile | None]:
    """The videos of a manifest, or of a file of tokens, and that file."""
    if is_token_file(path):
        file = TokenFile(path)
        return file.manifest(), file
    return read_manifest(path), None


def check_augment(augment: AugmentConfig, name: str) -> None:
    """Hold that nothing is asked for that whole frames are needed for.

    Raises:
        InvalidArgumentError: naming all that is, and what turns it off.
    """
    without = {**_NEEDS_PIXELS} if augment.mixup_prob else {**_NEEDS_PIXELS, "mixup_alpha": None, "cutmix_alpha": None}
    wrong = {key: off for key, off in without.items() if off is not None and getattr(augment, key) != off}
    if wrong:
        remedy = " ".join(f"data.augment.{key}={str(off).lower()}" for key, off in wrong.items())
        raise InvalidArgumentError(
            f"{name} holds tokens, and {', '.join(wrong)} need whole frames; mirroring and label smoothing work with "
            f"tokens, turn the others off: {remedy}"
        )


def _read(file: TokenFile, row: int, spec: PatchSpec) -> RunLengthTokens:
    try:
        return file.tokens(row, spec)
    except InvalidArgumentError as error:
        raise VideoError(str(error)) from error


@dataclass(eq=False, repr=False)
class StoredTraining(Dataset[StoredSample]):
    """A random window of each video, mirrored or not; random as in `TrainingDataset`, a function of (seed, position).

    A window that is damaged is replaced as a video is there.
    """

    file: TokenFile
    entries: Sequence[VideoEntry]
    """Usable videos of `file.manifest()`."""
    augment: AugmentConfig
    spec: PatchSpec
    _: KW_ONLY
    seed: int = 0
    """Of the run."""

    def __post_init__(self) -> None:
        check_augment(self.augment, str(self.file.table.path))
        self._replacing = Replacing(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: SampleKey) -> StoredSample:
        seed = derive_seed(self.seed, key.position)
        draws = [torch.Generator().manual_seed(derive_seed(seed, number)) for number in (0, 2)]
        turned = self.augment.horizontal_flip and bool(torch.rand((), generator=draws[0]) < 0.5)
        moment = float(torch.rand((), generator=draws[1]))

        def read(entry: VideoEntry) -> RunLengthTokens:
            rows = self.file.whole(entry.path)
            return _read(self.file, rows[int(moment * len(rows))], self.spec)

        tokens, entry, failed, notes = self._replacing(key.index, read)
        tokens = mirrored(tokens) if turned else tokens
        return StoredSample(tokens, entry.label_id, entry.path, failed, key.position, tuple(notes))


@dataclass
class StoredCollate:
    """Samples -> `Batch`, as `Collate` makes it where nothing is mixed."""

    augment: AugmentConfig
    num_classes: int

    def __call__(self, samples: Sequence[StoredSample]) -> Batch:
        """Pack the samples, at least one."""
        label_ids = check_labels(samples, self.num_classes)
        targets = soft_targets(label_ids, self.num_classes, smoothing=self.augment.label_smoothing)
        return batch_of(samples, [sample.tokens for sample in samples], targets)


@dataclass(eq=False, repr=False)
class StoredEvaluation(Dataset[EvaluationSample]):
    """The window in the middle of each video."""

    file: TokenFile
    entries: Sequence[VideoEntry]
    spec: PatchSpec

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> EvaluationSample:
        entry = self.entries[index]
        rows = self.file.whole(entry.path)
        begin = time.perf_counter()
        try:
            tokens, error = [_read(self.file, rows[len(rows) // 2], self.spec)], None
        except VideoError as problem:
            tokens, error = [], str(problem)
        seconds = time.perf_counter() - begin
        return EvaluationSample(tokens, entry.label_id, entry.path, error, seconds, 0.0)

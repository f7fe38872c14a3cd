"""What leaves the data workers: only the kept patches of a batch, packed, with targets and names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import Self

from rlt.checks import at_least
from rlt.data.augment import AugmentConfig, mix_batch, soft_targets
from rlt.data.dataset import EvaluationSample, TrainingSample
from rlt.data.sampler import derive_seed
from rlt.errors import InvalidArgumentError
from rlt.structures import PackedTokens, PatchSpec, RunLengthTokens, pack
from rlt.tokens import Rule, tokenize_batch


@dataclass(frozen=True, eq=False)
class _OnDevice:
    """What Lightning and a DataLoader ask of a batch."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        return _changed(self, lambda values: values.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in memory that a device can copy from while it computes."""
        return _changed(self, Tensor.pin_memory)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same value with each of its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, PackedTokens):
        return value.changed(change)
    if isinstance(value, _OnDevice):
        return replace(value, **{part.name: _changed(getattr(value, part.name), change) for part in fields(value)})
    return value


@dataclass(frozen=True, eq=False)
class Batch(_OnDevice):
    """The clips of one training step on one rank."""

    packed: PackedTokens
    """The kept tokens of all clips."""
    targets: Tensor
    """float32 [clips, classes], each row sums to 1."""
    paths: tuple[str, ...]
    """The video of each clip."""
    failed: tuple[tuple[str, str], ...]
    """(path, reason) of videos that could not be decoded and were replaced."""
    position: int
    """`SampleKey.position` of the first clip."""

    def __len__(self) -> int:
        return len(self.packed)


@dataclass(frozen=True, eq=False)
class EvaluationBatch(_OnDevice):
    """All views of several videos."""

    packed: PackedTokens | None
    """The tokens of all views, video by video; None if no video of the batch could be decoded."""
    views_per_video: tuple[int, ...]
    """Views of each video, in the order of `samples`; 0 for one that could not be decoded."""
    samples: tuple[EvaluationSample, ...]
    """The videos, without their tokens (they are in `packed`)."""

    def __len__(self) -> int:
        return len(self.samples)


@dataclass
class Collate:
    """Samples -> `Batch`: mix, select tokens, pack. A function of the samples and their positions alone.

    It holds plain values only, so that workers can be given it.
    """

    rule: Rule
    augment: AugmentConfig
    num_classes: int
    spec: PatchSpec
    _: KW_ONLY
    seed: int = 0
    """Of the run."""

    def __post_init__(self) -> None:
        at_least(1, num_classes=self.num_classes)

    def __call__(self, samples: Sequence[TrainingSample]) -> Batch:
        """Pack the samples, at least one; an InvalidArgumentError names one whose label is no class."""
        label_ids = check_labels(samples, self.num_classes)
        frames = torch.stack([sample.frames for sample in samples])
        targets = soft_targets(label_ids, self.num_classes, smoothing=self.augment.label_smoothing)
        position = samples[0].position
        # Mixed before tokens are selected: the mask is taken on the clip as the network will see it.
        frames, targets = mix_batch(frames, targets, self.augment, seed=derive_seed(self.seed, position, 4))
        seeds = [derive_seed(self.seed, sample.position, 5) for sample in samples]
        tokens = tokenize_batch(frames, self.rule, self.spec, seeds)
        return batch_of(samples, tokens, targets)


class Named(Protocol):
    """What a batch says of each of its clips."""

    @property
    def label_id(self) -> int:
        """Its class."""

    @property
    def path(self) -> str:
        """Its video."""

    @property
    def failed(self) -> tuple[tuple[str, str], ...]:
        """(path, reason) of videos that it replaces."""

    @property
    def position(self) -> int:
        """`SampleKey.position`."""


def check_labels(samples: Sequence[Named], num_classes: int) -> Tensor:
    """Labels of samples, at least one, int64; an InvalidArgumentError names one whose label is no class."""
    if not samples:
        raise InvalidArgumentError("0 samples; a batch needs at least one")
    for sample in samples:
        if not 0 <= sample.label_id < num_classes:
            raise InvalidArgumentError(
                f"{sample.path} has label {sample.label_id}; 0 to {num_classes - 1} are the classes"
            )
    return torch.tensor([sample.label_id for sample in samples], dtype=torch.int64)


def batch_of(samples: Sequence[Named], tokens: Sequence[RunLengthTokens], targets: Tensor) -> Batch:
    """Samples, the tokens of each and its targets in one pack."""
    return Batch(
        packed=pack(tokens),
        targets=targets,
        paths=tuple(sample.path for sample in samples),
        failed=tuple(failure for sample in samples for failure in sample.failed),
        position=samples[0].position,
    )


def collate_evaluation(samples: Sequence[EvaluationSample]) -> EvaluationBatch:
    """All views of several videos in one pack."""
    if not samples:
        raise InvalidArgumentError("0 samples; a batch needs at least one")
    tokens = [view for sample in samples for view in sample.tokens]
    return EvaluationBatch(
        packed=pack(tokens) if tokens else None,
        views_per_video=tuple(len(sample.tokens) for sample in samples),
        samples=tuple(replace(sample, tokens=[]) for sample in samples),
    )

"""What leaves the data workers: only the kept patches of a batch, packed, with targets and names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from rlt.checks import at_least
from rlt.data.augment import AugmentConfig, mix_batch, soft_targets
from rlt.data.dataset import EvaluationSample, TrainingSample
from rlt.data.sampler import derive_seed
from rlt.errors import InvalidArgumentError
from rlt.structures import PackedTokens, PatchSpec, pack
from rlt.tokens import Rule, tokenize_batch


@dataclass(frozen=True, eq=False)
class Batch:
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

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            packed=self.packed.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The same batch in memory that a device can copy from while it computes; a DataLoader calls this."""
        return replace(self, packed=_pinned(self.packed), targets=self.targets.pin_memory())


@dataclass(frozen=True, eq=False)
class EvaluationBatch:
    """All views of several videos."""

    packed: PackedTokens | None
    """The tokens of all views, video by video; None if no video of the batch could be decoded."""
    views_per_video: tuple[int, ...]
    """Views of each video, in the order of `samples`; 0 for one that could not be decoded."""
    samples: tuple[EvaluationSample, ...]
    """The videos, without their tokens (they are in `packed`)."""

    def __len__(self) -> int:
        return len(self.samples)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> EvaluationBatch:
        """The same batch on another device."""
        return replace(self, packed=self.packed and self.packed.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EvaluationBatch:
        """The same batch in memory that a device can copy from while it computes; a DataLoader calls this."""
        return replace(self, packed=self.packed and _pinned(self.packed))


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
    training: bool = True
    """Whether mixing and label smoothing take place."""
    seed: int = 0
    """Of the run."""

    def __post_init__(self) -> None:
        at_least(1, num_classes=self.num_classes)

    def __call__(self, samples: Sequence[TrainingSample]) -> Batch:
        """Pack the samples, at least one; an InvalidArgumentError names one whose label is no class."""
        if not samples:
            raise InvalidArgumentError("0 samples; a batch needs at least one")
        for sample in samples:
            if not 0 <= sample.label_id < self.num_classes:
                raise InvalidArgumentError(
                    f"{sample.path} has label {sample.label_id}; 0 to {self.num_classes - 1} are the classes"
                )
        frames = torch.stack([sample.frames for sample in samples])
        label_ids = torch.tensor([sample.label_id for sample in samples], dtype=torch.int64)
        smoothing = self.augment.label_smoothing if self.training else 0.0
        targets = soft_targets(label_ids, self.num_classes, smoothing=smoothing)
        position = samples[0].position
        if self.training:
            # Mixed before tokens are selected: the mask is taken on the clip as the network will see it.
            frames, targets = mix_batch(frames, targets, self.augment, seed=derive_seed(self.seed, position, 4))
        seeds = [derive_seed(self.seed, sample.position, 5) for sample in samples]
        tokens = tokenize_batch(frames, self.rule, self.spec, seeds)
        return Batch(
            packed=pack(tokens),
            targets=targets,
            paths=tuple(sample.path for sample in samples),
            failed=tuple(failure for sample in samples for failure in sample.failed),
            position=position,
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


def _pinned(packed: PackedTokens) -> PackedTokens:
    segments = replace(packed.segments, cu_seqlens=packed.segments.cu_seqlens.pin_memory())
    return replace(
        packed,
        patches=packed.patches.pin_memory(),
        coords=packed.coords.pin_memory(),
        lengths=packed.lengths.pin_memory(),
        segments=segments,
    )

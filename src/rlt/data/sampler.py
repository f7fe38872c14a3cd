"""Which samples make which batch: a pure function of (seed, step), so that a run can be continued at any step.

Every sample of a run has a position: 0 for the first one that is trained on, and so on, through all epochs. Epoch e is
a permutation of the data set that is seeded by (seed, e); nothing is dropped at its end, steps run across it. All
randomness of a sample (its frames, crop, augmentation) is seeded by its position, so it does not depend on who loads
it, or when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.utils.data import Sampler

from rlt.checks import at_least
from rlt.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What a training data set is asked for."""

    index: int
    """Number of the sample in the data set."""
    position: int
    """Running number of the sample in the whole run: the seed of everything random about it."""


def derive_seed(*integers: int) -> int:
    """A seed from 0 to 2**63 - 1 that depends on all integers and on their order, the same on every machine."""
    digest = hashlib.blake2b(",".join(str(int(number)) for number in integers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of epoch `epoch` (from 0): a permutation of 0..num_samples-1."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(num_samples, generator=generator).tolist()


@dataclass(kw_only=True, eq=False)
class StepSampler(Sampler[list[SampleKey]]):
    """Batches of one rank for step `start_step`, `start_step` + 1, ...: a `batch_sampler` for a DataLoader.

    With `batch_size` every step holds `batch_size` samples per rank. With `token_budget` a step takes samples until
    they are expected to hold that many tokens per rank, and deals them out so that ranks are balanced (the longest
    first, each to the rank with the fewest tokens so far). In both cases the samples of a step over all ranks depend
    only on `batch_size * world_size` or `token_budget * world_size`, and all ranks have the same number of steps.

    Raises:
        InvalidArgumentError: naming the argument that is out of range.
    """

    num_samples: int = field(kw_only=False)
    """Size of the data set, at least 1."""
    batch_size: int | None = None
    """Samples per rank and step, at least 1; give this or `token_budget`."""
    token_budget: float | None = None
    """Expected kept tokens per rank and step, above 0. A step holds at least one sample per rank."""
    expected_tokens: Sequence[float] | None = None
    """For `token_budget`: expected kept tokens of each sample, above 0."""
    seed: int = 0
    """Of the order."""
    rank: int = 0
    """Number of this process, 0..world_size-1."""
    world_size: int = 1
    """Number of processes."""
    start_step: int = 0
    """First step to give, 0 or more: how many steps of the run have been made."""
    num_steps: int | None = None
    """Number of steps of the whole run; None = endless."""

    def __post_init__(self) -> None:
        at_least(1, num_samples=self.num_samples, world_size=self.world_size, batch_size=self.batch_size)
        at_least(0, start_step=self.start_step)
        if not 0 <= self.rank < self.world_size:
            raise InvalidArgumentError(f"rank is {self.rank}; 0 to {self.world_size - 1} (world_size - 1) is needed")
        if (self.batch_size is None) == (self.token_budget is None):
            raise InvalidArgumentError(
                f"batch_size is {self.batch_size} and token_budget is {self.token_budget}; give exactly one of them"
            )
        if self.token_budget is None:
            return
        if not self.token_budget > 0:
            raise InvalidArgumentError(
                f"token_budget is {self.token_budget}; expected tokens per rank, above 0, are needed"
            )
        if self.expected_tokens is None or len(self.expected_tokens) != self.num_samples:
            given = "no" if self.expected_tokens is None else str(len(self.expected_tokens))
            raise InvalidArgumentError(
                f"{given} expected_tokens for {self.num_samples} samples; token_budget needs one for each"
            )
        if not min(self.expected_tokens) > 0:
            raise InvalidArgumentError(f"expected_tokens has {min(self.expected_tokens)}; numbers above 0 are needed")

    def __iter__(self) -> Iterator[list[SampleKey]]:
        steps = self._token_steps() if self.batch_size is None else self._fixed_steps(self.batch_size)
        for shares in islice(steps, None if self.num_steps is None else len(self)):
            yield shares[self.rank]

    def __len__(self) -> int:
        if self.num_steps is None:
            raise TypeError("an endless sampler has no length; give num_steps")
        return max(self.num_steps - self.start_step, 0)

    def _keys(self, position: int) -> Iterator[SampleKey]:
        """Samples from `position` on, endless."""
        epoch, offset = divmod(position, self.num_samples)
        while True:
            for index in epoch_order(self.num_samples, self.seed, epoch)[offset:]:
                yield SampleKey(index, position)
                position += 1
            epoch, offset = epoch + 1, 0

    def _fixed_steps(self, batch_size: int) -> Iterator[list[list[SampleKey]]]:
        """For each step from `start_step` on the samples of every rank."""
        keys = self._keys(self.start_step * batch_size * self.world_size)
        while True:
            yield [list(islice(keys, batch_size)) for _ in range(self.world_size)]

    def _token_steps(self) -> Iterator[list[list[SampleKey]]]:
        """As `_fixed_steps`."""
        assert self.token_budget is not None
        assert self.expected_tokens is not None
        budget = self.token_budget * self.world_size
        step, batch, total = 0, list[SampleKey](), 0.0
        for key in self._keys(0):  # where a step begins depends on all steps before it: they are replayed, in integers
            tokens = self.expected_tokens[key.index]
            # A sample that would overshoot by more than half of itself waits for the next step.
            if len(batch) >= self.world_size and total + tokens / 2 > budget:
                if step >= self.start_step:
                    yield self._deal(batch, self.expected_tokens)
                step, batch, total = step + 1, [], 0.0
            batch.append(key)
            total += tokens

    def _deal(self, batch: list[SampleKey], tokens: Sequence[float]) -> list[list[SampleKey]]:
        """Spread the samples of a step over the ranks: longest first, each to the rank with the fewest tokens."""
        shares: list[list[SampleKey]] = [[] for _ in range(self.world_size)]
        totals = [0.0] * self.world_size
        for key in sorted(batch, key=lambda key: (-tokens[key.index], key.position)):
            rank = min(range(self.world_size), key=lambda rank: (totals[rank], rank))
            shares[rank].append(key)
            totals[rank] += tokens[key.index]
        return [sorted(share, key=lambda key: key.position) for share in shares]

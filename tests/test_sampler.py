"""The order of samples is a function of (seed, step): once per epoch, the same for any number of ranks, resumable."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt.data.sampler import SampleKey, StepSampler, derive_seed, epoch_order
from rlt.errors import InvalidArgumentError

seeds = st.integers(0, 5)
sizes = st.integers(1, 40)


def tokens_of(num_samples: int) -> list[float]:
    return [1 + (index * 37 % 101) for index in range(num_samples)]


def sampler(num_samples: int, *, budget: bool = False, **arguments) -> StepSampler:
    if budget:
        return StepSampler(num_samples, token_budget=150, expected_tokens=tokens_of(num_samples), **arguments)
    return StepSampler(num_samples, batch_size=3, **arguments)


def take(steps: StepSampler, count: int) -> list[list[SampleKey]]:
    return list(islice(steps, count))


@given(sizes, seeds, st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_sample_once_per_epoch_and_positions_run_on(num_samples, seed, budget):
    keys = [key for batch in take(sampler(num_samples, budget=budget, seed=seed), 60) for key in batch]
    assert [key.position for key in keys] == list(range(len(keys)))
    for epoch in range(len(keys) // num_samples):
        indices = [key.index for key in keys[epoch * num_samples : (epoch + 1) * num_samples]]
        assert indices == epoch_order(num_samples, seed, epoch)
        assert sorted(indices) == list(range(num_samples))


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(20, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(sizes, seeds, st.integers(0, 30), st.integers(1, 4), st.booleans())
@settings(max_examples=40, deadline=None)
def test_resuming_gives_what_an_uninterrupted_run_gives(num_samples, seed, start, world_size, budget):
    arguments = {"budget": budget, "seed": seed, "world_size": world_size, "rank": world_size - 1}
    whole = take(sampler(num_samples, **arguments), start + 5)
    assert take(sampler(num_samples, start_step=start, **arguments), 5) == whole[start:]


@given(sizes, seeds, st.sampled_from([1, 2, 3, 6]))
@settings(max_examples=30, deadline=None)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(num_samples, seed, world_size):
    one = take(StepSampler(num_samples, batch_size=6, seed=seed), 10)
    ranks = [
        take(StepSampler(num_samples, batch_size=6 // world_size, seed=seed, rank=rank, world_size=world_size), 10)
        for rank in range(world_size)
    ]
    assert [[key for batch in shares for key in batch] for shares in zip(*ranks, strict=True)] == one


@given(st.integers(10, 40), seeds, st.sampled_from([2, 3]))
@settings(max_examples=30, deadline=None)
def test_token_budget_deals_the_same_samples_to_any_number_of_ranks(num_samples, seed, world_size):
    tokens = tokens_of(num_samples)
    one = take(StepSampler(num_samples, token_budget=600, expected_tokens=tokens, seed=seed), 10)
    ranks = [
        take(
            StepSampler(
                num_samples,
                token_budget=600 / world_size,
                expected_tokens=tokens,
                seed=seed,
                rank=rank,
                world_size=world_size,
            ),
            10,
        )
        for rank in range(world_size)
    ]
    for whole, *shares in zip(one, *ranks, strict=True):
        assert all(shares)
        assert sorted((key for share in shares for key in share), key=lambda key: key.position) == whole
        totals = [sum(tokens[key.index] for key in share) for share in shares]
        # Greedy dealing, longest first: ranks differ by one sample at most.
        assert max(totals) - min(totals) <= max(tokens[key.index] for key in whole)


def test_token_budget_holds_the_budget_on_average_and_balances_ranks():
    generator = torch.Generator().manual_seed(0)
    tokens = (torch.rand(2000, generator=generator) * 1400 + 168).tolist()
    ranks = [
        take(StepSampler(2000, token_budget=12_000, expected_tokens=tokens, rank=rank, world_size=8), 40)
        for rank in range(8)
    ]
    totals = torch.tensor([[sum(tokens[key.index] for key in batch) for batch in batches] for batches in ranks])
    assert float(totals.mean()) == pytest.approx(12_000, rel=0.01)
    assert float((totals.amax(0) / totals.mean(0)).max()) < 1.08
    counts = Counter(len(batch) for batch in ranks[0])
    assert len(counts) > 1  # savings become larger batches


def test_a_video_larger_than_the_budget_still_trains():
    steps = StepSampler(4, token_budget=10, expected_tokens=[100.0] * 4, world_size=2)
    assert [len(batch) for batch in take(steps, 6)] == [1] * 6


def test_length_counts_the_steps_that_are_left():
    assert len(StepSampler(5, batch_size=2, num_steps=7, start_step=3)) == 4
    assert len(list(StepSampler(5, batch_size=2, num_steps=7, start_step=3))) == 4
    assert list(StepSampler(5, batch_size=2, num_steps=2, start_step=3)) == []
    with pytest.raises(TypeError, match="num_steps"):
        len(StepSampler(5, batch_size=2))


def test_iterating_twice_gives_the_same():
    steps = StepSampler(5, batch_size=2, num_steps=4, seed=1)
    assert list(steps) == list(steps)


def test_global_random_state_is_left_alone():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    take(sampler(10), 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_derived_seeds_are_fixed_numbers():
    assert derive_seed(0, 1) != derive_seed(1, 0) != derive_seed(0)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(7, 11) == 1630903509632268805  # a run can be continued on another machine and version
    assert all(0 <= derive_seed(seed) < 2**63 for seed in range(100))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_samples": 0, "batch_size": 1}, "num_samples is 0"),
        ({"num_samples": 1}, "give exactly one"),
        ({"num_samples": 1, "batch_size": 1, "token_budget": 5}, "give exactly one"),
        ({"num_samples": 1, "batch_size": 0}, "batch_size is 0"),
        ({"num_samples": 1, "batch_size": 1, "rank": 2, "world_size": 2}, "rank is 2"),
        ({"num_samples": 1, "batch_size": 1, "start_step": -1}, "start_step is -1"),
        ({"num_samples": 2, "token_budget": 5}, "no expected_tokens"),
        ({"num_samples": 2, "token_budget": 5, "expected_tokens": [1.0]}, "1 expected_tokens for 2"),
        ({"num_samples": 1, "token_budget": 5, "expected_tokens": [0.0]}, "above 0"),
        ({"num_samples": 1, "token_budget": 0, "expected_tokens": [1.0]}, "token_budget is 0"),
    ],
)
def test_errors_name_the_argument(arguments, words):
    num_samples = arguments.pop("num_samples")
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        StepSampler(num_samples, **arguments)
    assert "\n" not in str(caught.value)

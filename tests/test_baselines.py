"""Selection rules: the counts they promise, and randomness that is a function of the seed alone."""

from __future__ import annotations

import pytest
import torch

import rlt
from rlt.errors import InvalidArgumentError
from rlt.tokens.rules import TokenizerConfig, select


def frames() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (3, 16, 64, 96, 3), dtype=torch.uint8, generator=generator)
    clips[:2, 1:, :32] = clips[:2, :1, :32]
    return clips


@pytest.mark.parametrize("policy", ["none", "tome"])
def test_keep_all(policy: str) -> None:
    for ours, theirs in zip(
        select(frames(), TokenizerConfig(policy)), rlt.tokenize(frames(), policy="none"), strict=True
    ):
        assert torch.equal(ours.patches, theirs.patches)


def test_rlt_is_tokenize() -> None:
    for ours, theirs in zip(
        select(frames(), TokenizerConfig(threshold=0.3)), rlt.tokenize(frames(), threshold=0.3), strict=True
    ):
        assert torch.equal(ours.coords, theirs.coords)
        assert torch.equal(ours.lengths, theirs.lengths)


def test_random_keeps_as_many_as_rlt_and_depends_on_its_seed_alone() -> None:
    expected = [len(tokens) for tokens in rlt.tokenize(frames())]
    config = TokenizerConfig("random")
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = select(frames(), config, seeds=[5, 6, 7])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(tokens) for tokens in first] == expected
    again = select(frames()[1:2], config, seeds=[6])[0]
    assert torch.equal(first[1].coords, again.coords)
    assert not torch.equal(first[0].coords[:20], first[1].coords[:20])
    assert first[0].lengths.unique().tolist() == [1]
    assert torch.equal(first[0].mask().nonzero(), first[0].coords)
    with pytest.raises(InvalidArgumentError, match="no token at t=0"):
        select(frames()[:1], TokenizerConfig("random", keep_ratio=0.05), seeds=[0])[0].expand()


@pytest.mark.parametrize("ratio", [0.001, 0.25, 0.5, 1.0])
def test_keep_ratio_keeps_that_share(ratio: float) -> None:
    for tokens in select(frames(), TokenizerConfig("random", keep_ratio=ratio)):
        assert len(tokens) == max(round(ratio * 192), 1)
    for tokens in select(frames(), TokenizerConfig("uniform_frames", keep_ratio=ratio)):
        steps = tokens.coords[:, 0].unique()
        assert len(tokens) == len(steps) * 24
        assert len(steps) == max(round(ratio * 8), 1)
        tokens.validate()


def test_uniform_frames_are_even() -> None:
    tokens = select(frames()[:1], TokenizerConfig("uniform_frames", keep_ratio=0.5))[0]
    assert tokens.coords[:, 0].unique().tolist() == [0, 2, 4, 6]
    assert tokens.lengths.unique().tolist() == [2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "best"}, "tokenizer is 'best'; allowed are none, rlt, random"),
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"policy": "random", "keep_ratio": 0.0}, "keep_ratio is 0.0"),
        ({"keep_ratio": 0.5}, "tokenizer 'rlt' does not use it"),
        ({"policy": "tome", "merge_per_block": -3}, "merge_per_block is -3"),
    ],
)
def test_bad_configurations(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        TokenizerConfig(**arguments)  # type: ignore[arg-type]

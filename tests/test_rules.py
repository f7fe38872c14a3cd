"""Selection rules: the counts they promise, and randomness that is a function of the seed alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import rlt
from rlt import (
    Budget,
    Drawn,
    Everything,
    PatchSpec,
    Random,
    Rule,
    RunLengthTokens,
    Threshold,
    UniformFrames,
    register_rule,
)
from rlt.conf import compose
from rlt.errors import InvalidArgumentError
from rlt.tokens import PatchView, change_rule, choose_rule, make_rule, rule_name, rule_options, tokenize_batch
from rlt.tokens.rule_files import write_rule_file


def frames() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (3, 16, 64, 96, 3), dtype=torch.uint8, generator=generator)
    clips[:2, 1:, :32] = clips[:2, :1, :32]
    return clips


def select(clips: torch.Tensor, rule: Rule, seeds: Sequence[int] | None = None) -> list[RunLengthTokens]:
    return tokenize_batch(clips, rule, PatchSpec(), seeds)


def test_keep_all() -> None:
    for tokens in select(frames(), Everything()):
        assert tokens.share_kept == 1
        assert torch.equal(tokens.lengths, torch.ones(192, dtype=torch.int64))


def test_rlt_is_tokenize() -> None:
    for ours, theirs in zip(select(frames(), Threshold(0.3)), rlt.tokenize(frames(), threshold=0.3), strict=True):
        assert torch.equal(ours.coords, theirs.coords)
        assert torch.equal(ours.lengths, theirs.lengths)


def test_random_keeps_as_many_as_rlt_and_depends_on_its_seed_alone() -> None:
    expected = [len(tokens) for tokens in rlt.tokenize(frames())]
    config = Random()
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
        select(frames()[:1], Random(like=Budget(keep_ratio=0.05)), seeds=[0])[0].expand()


ANCHOR = Threshold(0.3, reference="anchor")


@pytest.mark.parametrize(
    ("rule", "fields", "expected"),
    [
        (ANCHOR, {}, ANCHOR),
        (ANCHOR, {"threshold": None, "exposure": None}, ANCHOR),
        (ANCHOR, {"threshold": 0.2}, Threshold(0.2, reference="anchor")),
        (ANCHOR, {"exposure": "gain"}, Threshold(0.3, reference="anchor", exposure="gain")),
        (ANCHOR, {"max_tokens": 9, "reference": "previous"}, Budget(max_tokens=9)),
        (Budget(keep_ratio=0.5, exposure="gain"), {"threshold": 0.2}, Threshold(0.2, exposure="gain")),
        (Budget(keep_ratio=0.5), {"max_tokens": 9}, Budget(max_tokens=9)),
        (Budget(keep_ratio=0.5), {"reference": "anchor"}, Budget(keep_ratio=0.5, reference="anchor")),
        (Random(like=ANCHOR, seed=3), {"reference": "previous"}, Random(like=Threshold(0.3), seed=3)),
        (Random(like=ANCHOR, seed=3), {"threshold": 0.2}, Threshold(0.2)),
        (Everything(), {"threshold": 0.2, "reference": "anchor"}, Threshold(0.2, reference="anchor")),
        (Everything(), {"exposure": None}, Everything()),
    ],
)
def test_the_amount_that_is_given_last_replaces_the_others(rule: Rule, fields: dict[str, Any], expected: Rule) -> None:
    assert change_rule(rule, **fields) == expected


def test_changes_that_do_not_fit_are_told() -> None:
    with pytest.raises(InvalidArgumentError, match=r"reference is anchor, but Everything\(\) has no such option; give"):
        change_rule(Everything(), reference="anchor")
    with pytest.raises(InvalidArgumentError, match=r"threshold is 0\.1 and max_tokens is 3; give one of them"):
        change_rule(Everything(), threshold=0.1, max_tokens=3)
    with pytest.raises(InvalidArgumentError, match=r"reference is 'ancor'; allowed are .* did you mean 'anchor'"):
        change_rule(Threshold(), reference="ancor")


@pytest.mark.parametrize("ratio", [0.001, 0.25, 0.5, 1.0])
def test_keep_ratio_keeps_that_share(ratio: float) -> None:
    for tokens in select(frames(), make_rule("random", keep_ratio=ratio)):
        assert len(tokens) == max(round(ratio * 192), 1)
    for tokens in select(frames(), make_rule("uniform_frames", keep_ratio=ratio)):
        steps = tokens.coords[:, 0].unique()
        assert len(tokens) == len(steps) * 24
        assert len(steps) == max(round(ratio * 8), 1)
        tokens.validate()


def test_uniform_frames_are_even() -> None:
    tokens = select(frames()[:1], make_rule("uniform_frames", keep_ratio=0.5))[0]
    assert tokens.coords[:, 0].unique().tolist() == [0, 2, 4, 6]
    assert tokens.lengths.unique().tolist() == [2]


@pytest.mark.parametrize("budget", [Budget(keep_ratio=0.4), Budget(max_tokens=77), Budget(max_tokens=10**6)], ids=repr)
def test_a_budget_keeps_what_differs_most(budget: Budget) -> None:
    differences = rlt.tokens.token_differences(frames())
    for tokens, of_clip in zip(select(frames(), budget), differences, strict=True):
        count = min(budget.max_tokens or round(0.4 * 192), 192)
        assert len(tokens) == count
        mask = tokens.validate().mask()
        assert mask[0].all()
        kept, dropped = of_clip[mask[1:]], of_clip[~mask[1:]]
        if len(dropped) and len(kept):
            assert kept.min() >= dropped.max()


def test_a_budget_of_equal_differences_keeps_the_earlier() -> None:
    still = torch.zeros(1, 8, 32, 32, 3, dtype=torch.uint8)
    tokens = select(still, Budget(max_tokens=6))[0]
    assert tokens.coords.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({}, Threshold(0.1)),
        ({"threshold": 0.3}, Threshold(0.3)),
        ({"keep_ratio": 0.5}, Budget(keep_ratio=0.5)),
        ({"max_tokens": 60}, Budget(max_tokens=60)),
        ({"rule": "rlt"}, Threshold()),
        ({"rule": "none"}, Everything()),
        ({"rule": "budget", "max_tokens": 60}, Budget(max_tokens=60)),
        ({"rule": "random"}, Random()),
        ({"rule": "random", "threshold": 0.2}, Random(like=Threshold(0.2))),
        ({"rule": "uniform_frames", "keep_ratio": 0.5}, UniformFrames(like=Budget(keep_ratio=0.5))),
        ({"rule": Random(seed=3)}, Random(seed=3)),
        ({"rule": "drawn"}, Drawn(0.05, 0.8)),
        ({"rule": "drawn", "reference": "anchor"}, Drawn(reference="anchor")),
        ({"rule": Random(like=Drawn(0.2, 0.4, "keep_ratio"))}, Random(like=Drawn(0.2, 0.4, "keep_ratio"))),
    ],
)
def test_the_plain_spelling(given: dict[str, Any], rule: Rule) -> None:
    assert choose_rule(**given) == rule
    if isinstance(getattr(rule, "like", None), Drawn):  # which no plain options stand for
        return
    options = rule_options(rule)
    assert make_rule(str(options.pop("rule")), **options) == rule


def test_names_of_rules() -> None:
    assert [rule_name(rule) for rule in (Threshold(), Random(), Everything())] == ["rlt", "random", "none"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "best"}, "rule is 'best'; allowed are rlt, budget, none, random, uniform_frames, drawn"),
        ({"rule": "radnom"}, "did you mean 'random'"),
        ({"rule": "tome"}, "model.merge_per_block=N"),
        ({"rule": Random}, r"rule is the class Random; give a value of it: Random\(\)"),
        ({"rule": Random(), "threshold": 0.2}, r"rule is Random.* and threshold is 0.2; give one of them"),
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"rule": "random", "keep_ratio": 0.0}, "keep_ratio is 0.0"),
        (
            {"rule": "rlt", "keep_ratio": 0.5},
            "keep_ratio is 0.5, but rule 'rlt' has no such option; allowed are thr",
        ),
        ({"rule": "none", "threshold": 0.5}, "rule 'none' has no such option; it has none"),
        ({"rule": "budget"}, "neither keep_ratio nor max_tokens"),
        ({"keep_ratio": 0.5, "max_tokens": 10}, "keep_ratio is 0.5 and max_tokens is 10; give one of them"),
        ({"threshold": 0.1, "max_tokens": 10}, "threshold is 0.1 and max_tokens is 10; give one of them"),
        ({"max_tokens": 0}, "max_tokens is 0; at least 1"),
        ({"rule": "drawn", "threshold": 0.1}, "rule 'drawn' has no such option; allowed are lowest, highest, over"),
    ],
)
def test_bad_rules(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        choose_rule(**given)


@pytest.mark.parametrize("count", [1, 5, 23])
def test_a_budget_below_the_first_time_step_drops_the_flattest_patches(count: int) -> None:
    clips = torch.full((2, 16, 64, 96, 3), 90, dtype=torch.uint8)
    contrast = torch.randperm(24, generator=torch.Generator().manual_seed(0))  # grey levels about the mean
    signs = torch.tensor([1, -1]).repeat(8).view(1, 16, 1)
    for place, level in enumerate(contrast.tolist()):
        y, x = place // 6 * 16, place % 6 * 16
        clips[:, :, y : y + 16, x : x + 16] = (90 + level * signs).to(torch.uint8)
    for tokens in select(clips, Budget(max_tokens=count)):
        assert len(tokens) == count
        assert set((tokens.coords[:, 1] * 6 + tokens.coords[:, 2]).tolist()) == set(
            contrast.argsort()[-count:].tolist()
        )
        assert tokens.lengths.unique().tolist() == [8]
        with pytest.raises(InvalidArgumentError, match="no token at t=0"):
            tokens.expand()


def test_a_change_is_worth_more_than_a_flat_patch() -> None:
    clip = torch.full((16, 64, 96, 3), 90, dtype=torch.uint8)
    clip[8:, :16, :16] = 200
    tokens = rlt.tokenize(clip, max_tokens=1)
    assert tokens.coords.tolist() == [[4, 0, 0]]
    assert tokens.lengths.tolist() == [4]


def test_chance_that_keeps_the_first_time_step_has_run_lengths() -> None:
    expected = [len(tokens) for tokens in rlt.tokenize(frames())]
    drawn = select(frames(), Random(keep_first=True))
    assert [len(tokens) for tokens in drawn] == expected
    for tokens in drawn:
        tokens.validate()
    assert not torch.equal(drawn[0].coords, rlt.tokenize(frames())[0].coords)
    assert [len(tokens) for tokens in select(frames(), Random(like=Budget(max_tokens=5), keep_first=True))] == [24] * 3


@pytest.mark.parametrize(
    "rule",
    [
        Drawn(),
        Drawn(0.2, 1.5, reference="anchor"),
        Drawn(0.02, 0.9, "keep_ratio"),
        Drawn(0.3, 0.3, "keep_ratio", exposure="gain"),
    ],
    ids=repr,
)
def test_a_drawn_rule_is_a_plain_one_for_every_clip(rule: Drawn) -> None:
    seeds = [3, 10**18, 5]
    drawn = select(frames(), rule, seeds)
    for clip, seed, tokens in zip(frames(), seeds, drawn, strict=True):
        plain = rule.at(seed)
        value = plain.keep_ratio if isinstance(plain, Budget) else getattr(plain, "threshold", None)
        assert value is not None
        assert rule.lowest <= value <= rule.highest
        assert (plain.reference, plain.exposure) == (rule.reference, rule.exposure)  # type: ignore[attr-defined]
        assert torch.equal(tokens.coords, select(clip[None], plain)[0].coords)
    again = select(frames()[1:2], rule, seeds[1:2])[0]  # whatever else is in the batch, and whatever was drawn before
    assert torch.equal(again.coords, drawn[1].coords)


def test_what_is_drawn_is_spread_over_the_range() -> None:
    thresholds = torch.tensor([Drawn(0.01, 1.0).at(seed).threshold for seed in range(2000)])  # type: ignore[attr-defined]
    shares = torch.tensor([Drawn(0.2, 0.6, "keep_ratio").at(seed).keep_ratio for seed in range(2000)])  # type: ignore[attr-defined]
    for values, low, high in ((thresholds.log10(), -2, 0), (shares, 0.2, 0.6)):
        levels = torch.linspace(low, high, 9)
        counts = torch.histogram(values, levels).hist
        assert counts.sum() == 2000
        assert (counts - 250).abs().max() < 60  # four standard deviations
    state = torch.random.get_rng_state()
    Drawn().at(7)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lowest": 0.0}, r"lowest is 0.0 and highest is 0.8; above 0 and rising is needed"),
        ({"lowest": 0.9}, r"lowest is 0.9 and highest is 0.8; above 0 and rising is needed"),
        ({"lowest": float("nan")}, r"above 0 and rising is needed"),
        ({"highest": 1.5, "over": "keep_ratio"}, r"above 0 and rising, up to 1 is needed"),
        ({"over": "tokens"}, r"over is 'tokens'; allowed are threshold, keep_ratio"),
        ({"reference": "next"}, r"reference is 'next'"),
    ],
)
def test_bad_ranges(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Drawn(**fields)


def test_a_rule_from_outside_the_package() -> None:
    @register_rule("every_other")
    @dataclass(frozen=True)
    class EveryOther:
        offset: int = 0

        def __call__(self, view: PatchView, *, seeds: Sequence[int]) -> torch.Tensor:
            assert len(seeds) == len(view)
            mask = torch.zeros(view.shape, dtype=torch.bool)
            mask[:, self.offset % 2 :: 2] = True
            return mask

    try:
        by_value, by_name = rlt.tokenize(frames(), rule=EveryOther()), rlt.tokenize(frames(), rule="every_other")
        assert [len(tokens.validate()) for tokens in by_value] == [96, 96, 96]
        assert torch.equal(by_value[0].coords, by_name[0].coords)
        with pytest.raises(InvalidArgumentError, match="mask drops a token of the first time step"):
            rlt.tokenize(frames(), rule=EveryOther(1))
        with pytest.raises(InvalidArgumentError, match="rule 'rlt' is Threshold already"):
            register_rule("rlt")(EveryOther)
    finally:
        del rlt.tokens.RULES["every_other"]


def test_a_rule_that_gives_no_mask() -> None:
    class Wrong:
        runs = True

        def __call__(self, view: PatchView, **_: object) -> torch.Tensor:
            return view.differences

    with pytest.raises(InvalidArgumentError, match=r"gave torch.float64 \[3, 7, 4, 6\]"):
        rlt.tokenize(frames(), rule=Wrong())


def test_floats_are_in_the_same_units_whatever_they_were_divided_by() -> None:
    clips = frames()
    exact = rlt.tokens.token_differences(clips)
    for std in ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5), (0.27, 0.26, 0.28)):
        mean = torch.tensor([0.4, 0.5, 0.6])
        floats = ((clips / 255 - mean) / torch.tensor(std)).permute(0, 1, 4, 2, 3)
        view = PatchView(floats, PatchSpec(mean=(0.4, 0.5, 0.6), std=std))
        assert torch.allclose(view.differences.double(), exact, atol=1e-5)


# Files


@pytest.mark.parametrize(
    "rule",
    [
        Threshold(0.2, reference="anchor"),
        Budget(max_tokens=40, exposure="gain"),
        Everything(),
        Random(like=Budget(keep_ratio=0.5), seed=3, keep_first=True),
        UniformFrames(like=Threshold(0.4)),
        Drawn(0.1, 0.6, "keep_ratio", reference="anchor"),
    ],
)
def test_a_rule_file_is_the_rule(rule: Rule, tmp_path: Path) -> None:
    path = tmp_path / "rule.json"
    write_rule_file(path, rule_options(rule), share_kept=0.5)
    assert choose_rule(str(path)) == rule
    ours, theirs = (rlt.tokenize(frames()[0], rule=chosen) for chosen in (str(path), rule))
    assert torch.equal(ours.coords, theirs.coords)  # type: ignore[union-attr]
    with pytest.raises(InvalidArgumentError, match=r"rule is .*rule.json and threshold is 0.3; give one of them"):
        choose_rule(str(path), threshold=0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read: Expecting value"),
        ("[1]", "has no object 'rule'"),
        ('{"rule": {"threshold": 1}}', "does not name its rule"),
        ('{"rule": {"rule": "rlt", "threshold": -1}}', "threshold is -1; 0 or more"),
        ('{"rule": {"rule": "rlt", "threshold": "x"}}', "rule.json: threshold is 'x'; a number is needed"),
        ('{"rule": {"rule": "rtl"}}', "rule is 'rtl'; allowed are"),
        ('{"rule": {"rule": "again.json"}}', "again.json cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_files_that_hold_no_rule_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rule.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        choose_rule(str(tmp_path / "rule.json"))
    with pytest.raises(InvalidArgumentError, match=r"no\.json cannot be read"):
        choose_rule(str(tmp_path / "no.json"))


# Budgets that clips share


def three_clips() -> torch.Tensor:
    """uint8 [3, 8, 32, 32, 3]: one stands, one moves a little, one is noise."""
    generator = torch.Generator().manual_seed(3)
    clips = torch.randint(100, 120, (3, 1, 32, 32, 3), generator=generator).repeat(1, 8, 1, 1, 1)
    clips[1, :, :16] += torch.arange(8).view(8, 1, 1, 1) * 3
    clips[2] = torch.randint(0, 256, (8, 32, 32, 3), generator=generator)
    return clips.to(torch.uint8)


@pytest.mark.parametrize("options", [{}, {"reference": "anchor"}, {"reference": "anchor", "exposure": "gain"}])
@pytest.mark.parametrize("max_tokens", [2, 4, 6, 9, 16])
def test_clips_share_a_budget(max_tokens: int, options: dict[str, str]) -> None:
    clips = three_clips()
    rule = Budget(max_tokens=max_tokens, shared=True, **options)  # type: ignore[arg-type]
    masks = torch.stack([tokens.mask() for tokens in rlt.tokenize(clips, rule=rule)])
    kept = masks.flatten(1).sum(1)
    assert kept.min() >= 1
    assert kept.sum() <= 3 * max_tokens + 2
    if "exposure" not in options:  # which takes noise off
        assert kept[0] <= kept[1] <= kept[2]
    if max_tokens >= 4:  # what the clips have in common is one threshold
        assert masks[:, 0].all()
    if 4 < max_tokens < 16 and not options:
        assert kept.sum() == 3 * max_tokens
        differences = PatchView(clips, PatchSpec()).differences
        assert differences[masks[:, 1:]].min() >= differences[~masks[:, 1:]].max()
    alone = rlt.tokenize(clips[2], rule=rule)
    plain = rlt.tokenize(clips[2], rule=dataclasses.replace(rule, shared=False))
    assert torch.equal(alone.mask(), plain.mask())


def test_random_tokens_are_as_many_as_a_shared_budget_keeps_of_each_clip() -> None:
    clips = three_clips()
    rule = Budget(max_tokens=9, shared=True)
    counts = [len(tokens) for tokens in rlt.tokenize(clips, rule=rule)]
    assert [len(tokens) for tokens in rlt.tokenize(clips, rule=Random(like=rule))] == counts
    assert len(set(counts)) == 3


def test_a_shared_budget_is_refused_where_clips_come_one_by_one() -> None:
    with pytest.raises(InvalidArgumentError, match=r"tokenizer.shared is true, but clips are tokenized one by one"):
        compose(["tokenizer=budget", "tokenizer.keep_ratio=0.5", "tokenizer.shared=true"]).tokenizer.build()

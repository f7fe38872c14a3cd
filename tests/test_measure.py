"""Measuring: turns, ratios, counted FLOPs against the closed form, and files that are replaced whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rlt
from rlt.cli.show import format_seconds
from rlt.errors import InvalidArgumentError
from rlt.files import replacing, write_json
from rlt.measure import Timing, interleave, machine_info
from rlt.network.flops import count_forward_flops


def test_arms_take_turns() -> None:
    calls: list[str] = []
    rounds: list[int] = []
    timings = interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        rounds=3,
        warmup=1,
        on_round=lambda: rounds.append(len(calls)),
    )
    assert "".join(calls) == "abababab"
    assert rounds == [2, 4, 6, 8]
    assert [len(timing.seconds) for timing in timings.values()] == [3, 3]


def test_ratios_are_taken_round_by_round() -> None:
    slow, fast = Timing((2.0, 40.0, 6.0)), Timing((1.0, 10.0, 2.0))  # the machine was busy in the second round
    assert slow.over(fast) == 3.0
    assert slow.median == 6.0
    assert slow.spread == (2.0, 40.0)
    assert (slow + fast).seconds == (3.0, 50.0, 8.0)


@pytest.mark.parametrize("name", ["vit_tiny", "vit_base"])
def test_counted_flops_equal_the_closed_form(name: str) -> None:
    config = rlt.checkpoints.models.MODELS[name]
    frames = torch.randint(0, 256, (2, 4, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames[0, 1:, :32] = frames[0, 0, :32]
    packed = rlt.pack(rlt.tokenize(frames))
    lengths, width = packed.segments.lengths, config.width
    assert len(set(lengths)) == 2
    linear = 2 * sum(lengths) * (4 * width**2 + 2 * width * config.mlp_width)
    attention = sum(4 * length**2 * width for length in lengths)
    embedding = 2 * sum(lengths) * 1536 * width
    expected = config.depth * (linear + attention) + embedding + 2 * 2 * width * 400
    assert count_forward_flops(config, packed) == expected


def test_the_machine_is_named() -> None:
    info = machine_info()
    assert info["processor"]
    assert info["torch"] == torch.__version__
    assert info["rlt"] == rlt.__version__
    json.dumps(info)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.345, "12.3 s"), (0.0123, "12.3 ms"), (0.99996, "1 s"), (0.0009996, "1 ms"), (4.2e-6, "4.2 µs")],
)
def test_durations_have_three_digits_and_a_unit(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def write_half(target: Path) -> None:
    with replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "result.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="nan"):
        write_json(target, {"a": float("nan")})
    with pytest.raises(KeyboardInterrupt):
        write_half(target)
    assert json.loads(target.read_text()) == {"a": 1}
    assert [path.name for path in target.parent.iterdir()] == ["result.json"]
    with pytest.raises(InvalidArgumentError, match="is a folder"):
        write_json(tmp_path, {})

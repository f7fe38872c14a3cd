"""Write the tables of README.md and docs/ from the JSON that `make figures` leaves in docs/results.

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; nothing else of a file is touched. With --check
nothing is written, and the exit code says whether every table is up to date.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from rlt.evaluation.statistics import mean_interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "results.md")


def main() -> int:
    """Fill every table; return 1 if `--check` found one that is out of date."""
    check = "--check" in sys.argv[1:]
    stale = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = re.sub(
            r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)",
            lambda match: match[1] + TABLES[match[2]]() + match[3],
            before,
            flags=re.DOTALL,
        )
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/write_tables.py")
        return 1
    return 0


def compare_table() -> str:
    """What `rlt compare` measured on the bundled clip."""
    result = load("compare")
    tokens, flops, seconds = result["tokens"], result["flops"], result["seconds"]
    settings = result["settings"]
    rows = [
        ("", "dense", "RLT", "speed-up"),
        ("---", "---:", "---:", "---:"),
        ("tokens", f"{tokens['dense']:,}", f"{tokens['rlt']:,} ({result['tokens_kept']:.1%})", ""),
        ("decode", time(seconds["decode"]), time(seconds["decode"]), ""),
        ("tokenize", time(seconds["tokenize_dense"]), time(seconds["tokenize_rlt"]), ""),
        (
            "forward pass",
            time(seconds["forward_dense"]),
            time(seconds["forward_rlt"]),
            f"{result['speedup_forward']:.2f}x",
        ),
        (
            "end to end",
            time(seconds["end_to_end_dense"]),
            time(seconds["end_to_end_rlt"]),
            f"{result['speedup_end_to_end']:.2f}x",
        ),
        (
            "FLOPs of the forward pass",
            f"{flops['dense'] / 1e9:.1f} G",
            f"{flops['rlt'] / 1e9:.1f} G",
            f"{result['speedup_flops']:.2f}x allowed",
        ),
    ]
    caption = (
        f"{settings['model']} ({result['weights']} weights), {settings['num_frames']} frames at stride "
        f"{settings['frame_stride']}, {settings['size']} px, threshold {settings['threshold']}; median of "
        f"{settings['repeats']} runs on {machine(result)}. Feature cosine {result['feature_cosine']:.3f}.\n"
    )
    return table(rows) + "\n" + caption


def benchmark_table() -> str:
    """What `rlt benchmark` measured: each suite beside the plain way."""
    rows = [("suite", "compared with", "compared", "RLT", "speed-up"), ("---", "---", "---:", "---:", "---:")]
    names = {
        "tokenize": "normalise all, difference, pool, cut, select in float32",
        "embed": "`Conv3d` on normalised kept patches",
        "forward": "the same ViT-B with every token",
    }
    for suite, name in names.items():
        result = load(suite)
        first, last = (arm["seconds_median"] for arm in result["arms"])
        rows.append((suite, name, time(first), time(last), f"{result['speedup']:.1f}x"))
    forward = load("forward")
    kept = forward["arms"][1]["tokens_kept"]
    caption = (
        f"{forward['settings']['clips']} clips of 16x224x224, {kept:.1%} of the tokens kept, on {machine(forward)}. "
        f"The forward pass takes {forward['time_ratio']:.3f} of the dense time at {forward['flop_ratio']:.3f} of the "
        f"FLOPs ({forward['time_ratio_over_flop_ratio']:.3f} times the ideal).\n"
    )
    return table(rows) + "\n" + caption


def small_table() -> str:
    """Accuracy of small networks trained with each selection rule, and what a training step costs."""
    text = ""
    for dataset in ("surveillance", "ucf6"):
        runs = [json.loads(path.read_text()) for path in sorted((RESULTS / "small").glob(f"{dataset}-*-seed*.json"))]
        if not runs or not (RESULTS / "small" / f"{dataset}-steps.json").exists():
            continue
        steps = load(f"small/{dataset}-steps")["arms"]
        rows = [
            (
                "trained with",
                "tokens kept",
                "training",
                "step / dense step",
                "top-1, evaluated dense",
                "top-1, evaluated with RLT",
                "clips/s, dense",
                "clips/s, RLT",
            ),
            ("---", *["---:"] * 7),
        ]
        for arm in ("none", "rlt", "random", "uniform_frames"):
            members = [run for run in runs if run["arm"] == arm]
            kept = statistics.fmean(run["train_tokens_kept"] for run in members)
            scores = [
                accuracy([run["evaluation"][tokenizer]["top1"] for run in members]) for tokenizer in ("none", "rlt")
            ]
            training = spread([run["train_seconds"] for run in members], " s")
            speeds = [
                spread([run["evaluation"][tokenizer]["clips_per_second"] for run in members])
                for tokenizer in ("none", "rlt")
            ]
            rows.append((arm, f"{kept:.1%}", training, f"{steps[arm]['of_dense']:.2f}", *scores, *speeds))
        first = runs[0]
        videos = first["evaluation"]["none"]["num_videos"]
        caption = (
            f"**{dataset}**: mean over {len({run['seed'] for run in runs})} seeds and its 95 % interval (Student's t); "
            f"{videos} validation videos, {first['steps']} steps of 8 clips from scratch, on {machine(first)}.\n\n"
        )
        text += caption + table(rows) + "\nPaired by seed:\n\n" + differences(runs) + "\n"
    return text


def spread(values: list[float], unit: str = "") -> str:
    """Median with the smallest and the largest."""
    return f"{statistics.median(values):.0f}{unit} ({min(values):.0f} to {max(values):.0f})"


def accuracy(values: list[float]) -> str:
    """Mean and interval over seeds."""
    interval = mean_interval(values)
    return f"{statistics.fmean(values):.1%} ({interval.low:.1%} to {interval.high:.1%})"


def difference(runs: list[dict[str, Any]], evaluated: str, arm: str, other: str) -> str:
    """Top-1 of one training arm minus another, paired by seed, both evaluated alike."""
    scores = {(run["arm"], run["seed"]): run["evaluation"][evaluated]["top1"] for run in runs}
    pairs = [scores[arm, seed] - scores[other, seed] for seed in sorted({run["seed"] for run in runs})]
    interval = mean_interval(pairs)
    verdict = "not separated" if interval.low <= 0 <= interval.high else "separated"
    low, high = (f"{100 * end:+.1f}" for end in (interval.low, interval.high))
    return f"{100 * statistics.fmean(pairs):+.1f} points ({low} to {high}, {verdict})"


def differences(runs: list[dict[str, Any]]) -> str:
    """RLT against every other arm under both evaluations."""
    rows = [("trained with rlt minus trained with", "evaluated dense", "evaluated with RLT"), ("---", "---:", "---:")]
    for other in ("none", "random", "uniform_frames"):
        rows.append((other, *(difference(runs, evaluated, "rlt", other) for evaluated in ("none", "rlt"))))
    return table(rows)


TABLES = {"compare": compare_table, "benchmark": benchmark_table, "small": small_table}


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def time(seconds: dict[str, float] | float) -> str:
    """Milliseconds, three digits."""
    median = seconds["median"] if isinstance(seconds, dict) else seconds
    digits = 1 if median < 0.1 else 0
    return f"{median * 1e3:,.{digits}f} ms"


def machine(result: dict[str, Any]) -> str:
    """Processor and versions in a few words."""
    info = result["machine"]
    return f"{info['processor']}, {info['cores']} cores, torch {info['torch']}"


if __name__ == "__main__":
    sys.exit(main())

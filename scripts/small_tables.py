"""The tables of docs/results.md, from docs/results/small."""

from __future__ import annotations

import json
import statistics
from typing import Any

from markdown_tables import RESULTS, load, machine, table
from student import mean_interval

DATASETS = ("surveillance", "ucf6")
ARMS = ("none", "rlt", "random", "uniform_frames")
NAMES = {
    "none": "every token",
    "rlt": "RLT",
    "random": "random tokens",
    "uniform_frames": "fewer frames",
    "tome": "ToMe",
}


def small_tables() -> str:
    """Accuracy of small networks trained with each selection rule, and what a training step costs."""
    text = ""
    for dataset in DATASETS:
        runs = [json.loads(path.read_text()) for path in sorted((RESULTS / "small").glob(f"{dataset}-*-seed*.json"))]
        steps = load(f"small/{dataset}-steps")
        first = runs[0]
        text += (
            f"### {dataset}\n\nMean over {len({run['seed'] for run in runs})} seeds and its 95 % interval (Student's "
            f"t); {first['evaluation']['none']['num_videos']} validation videos, {first['steps']} steps of 8 clips "
            f"from scratch, on {machine(steps)}.\n\n{_accuracy_table(runs, steps)}\n{_cost_note(steps)}\n"
            f"Paired by seed:\n\n{_differences(runs)}\n"
            f"The networks trained with every token, evaluated with fewer, and no training with them:\n\n"
            f"{_training_free_table(runs)}\n"
        )
    return text


def _accuracy_table(runs: list[dict[str, Any]], steps: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        (
            "trained with",
            "tokens kept",
            "training",
            "step / dense step",
            "top-1, evaluated dense",
            "top-1, evaluated with RLT",
            "top-1, evaluated as trained",
        )
    ]
    for arm in ARMS:
        members = [run for run in runs if run["arm"] == arm]
        kept = statistics.fmean(run["train_tokens_kept"] for run in members)
        scores = [_scores(members, evaluated) for evaluated in ("none", "rlt", arm)]
        timing = steps["arms"][arm]
        number = members[0]["steps"]
        fastest, slowest = (number * seconds for seconds in timing["seconds_spread"])
        training = f"{number * timing['seconds_median']:.0f} s ({fastest:.0f} to {slowest:.0f})"
        rows.append((NAMES[arm], f"{kept:.1%}", training, f"{timing['of_dense']:.2f}", *scores))
    return table(rows)


def _cost_note(steps: dict[str, Any]) -> str:
    dense, rlt = steps["evaluation"]["none"], steps["evaluation"]["rlt"]
    speeds = [
        f"{arm['clips_per_second_median']:.0f} clips/s ({arm['clips_per_second_spread'][0]:.0f} to "
        f"{arm['clips_per_second_spread'][1]:.0f})"
        for arm in (dense, rlt)
    ]
    return f"Evaluation from file to class: {speeds[0]} dense, {speeds[1]} with RLT.\n"


def _training_free_table(runs: list[dict[str, Any]]) -> str:
    dense = [run for run in runs if run["arm"] == "none"]
    rows: list[tuple[str, ...]] = [("evaluated with", "tokens kept", "FLOPs of dense", "top-1", "minus dense")]
    for tokenizer in ("none", *ARMS[1:], "tome"):
        results = [run["evaluation"][tokenizer] for run in dense]
        kept = statistics.fmean(result["tokens_kept"] for result in results)
        flops = statistics.fmean(result["flops"]["share_of_dense"] for result in results)
        pairs = [run["evaluation"][tokenizer]["top1"] - run["evaluation"]["none"]["top1"] for run in dense]
        change = "" if tokenizer == "none" else _points(pairs)
        rows.append((NAMES[tokenizer], f"{kept:.1%}", f"{flops:.1%}", _scores(dense, tokenizer), change))
    return table(rows)


def _differences(runs: list[dict[str, Any]]) -> str:
    """RLT against every other arm, evaluated alike."""
    rows: list[tuple[str, ...]] = [
        ("trained with RLT minus trained with", "evaluated dense", "evaluated with RLT", "each as trained")
    ]
    scores = {
        (run["arm"], run["seed"], evaluated): result["top1"]
        for run in runs
        for evaluated, result in run["evaluation"].items()
    }
    seeds = sorted({run["seed"] for run in runs})
    for other in ("none", "random", "uniform_frames"):
        cells = []
        for ours, theirs in (("none", "none"), ("rlt", "rlt"), ("rlt", other)):
            cells.append(_points([scores["rlt", seed, ours] - scores[other, seed, theirs] for seed in seeds]))
        rows.append((NAMES[other], *cells))
    return table(rows)


def _scores(runs: list[dict[str, Any]], evaluated: str) -> str:
    """Mean and interval over seeds."""
    values = [run["evaluation"][evaluated]["top1"] for run in runs]
    interval = mean_interval(values)
    return f"{statistics.fmean(values):.1%} ({interval.low:.1%} to {interval.high:.1%})"


def _points(pairs: list[float]) -> str:
    """Mean difference in percentage points and whether its interval leaves out zero."""
    interval = mean_interval(pairs)
    verdict = "not separated" if interval.low <= 0 <= interval.high else "separated"
    low, high = (f"{100 * end:+.1f}" for end in (interval.low, interval.high))
    return f"{100 * statistics.fmean(pairs):+.1f} points ({low} to {high}, {verdict})"

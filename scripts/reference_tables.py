"""The table of docs/reference-model.md, from docs/results/reference-*.json."""

from __future__ import annotations

from typing import Any

from markdown_tables import RESULTS, load, machine, table

from rlt.evaluation.statistics import wilson_interval

TRAINING = {"fit": "without those for choices", "train": "all for training"}
TESTED = {"choice": "those for choices", "test": "test"}
STAGES = {
    "mixed": "a quarter of the tokens, mixed clips",
    "few-tokens": "a quarter of the tokens",
    "dense": "all tokens",
}


def reference_tables() -> str:
    """Accuracy of the reference network after each finished stage, per data set."""
    rows: list[tuple[str, ...]] = []
    text = ""
    for path in sorted(RESULTS.glob("reference-joint*.json")):
        result = load(path.stem)
        for name, stage in result["stages"].items():
            seen = f"{STAGES[name]}, {stage['steps']:,} steps"
            for part in TESTED:
                counts = [stage["accuracy"].get(f"{part}-{dataset}") for dataset in result["datasets"]]
                if all(counts):
                    training = f"{result['videos']} videos, {TRAINING[result['part']]}"
                    rows.append((seen, training, TESTED[part], *map(_accuracy, counts)))
        text = f"seed {result['seed']}, {machine(result)}"
    head = ("after the stage", "trained on", "evaluated on", "ucf6", "surveillance")
    return f"{table([head, *rows])}\nTop-1 with every token on one clip in the middle of each video; {text}.\n"


def _accuracy(count: dict[str, Any]) -> str:
    interval = wilson_interval(count["right"], count["videos"])
    return f"{count['right']} of {count['videos']}: {interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def trials_table() -> str:
    """What trials came to on the videos for choices."""
    rows: list[tuple[str, ...]] = [("200 steps of 16 clips, a quarter of the tokens", "loss", "top-1")]
    for words, trial in load("reference-trials")["trials"].items():
        rows.append((words, f"{trial['loss']:.2f}", _accuracy(trial)))
    losses = load("reference-trials")["pretraining"]["loss"]
    after = ", ".join(f"{loss:.3f} after {step}" for step, loss in losses.items())
    return f"{table(rows)}\nLoss of masked pretraining by step: {after}.\n"

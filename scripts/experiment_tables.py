"""Tables of docs/performance.md that draw on several suites: memory, the paper's experiments, cores for one GPU."""

from __future__ import annotations

from statistics import median
from typing import Any

from markdown_tables import load, machine, table

FORWARD_MEMORY = ("memory-base", "memory-large")
TRAINING_MEMORY = tuple(
    f"memory-train-{size}"
    for size in ("small-16", "small-32", "small-64", "base-16", "base-32", "large-16", "large-32")
)
CLIPS_PER_SECOND_OF_A_GPU = (50, 100, 200, 400)


Memory = dict[tuple[str, str, int, str], dict[str, float]]
"""By (model, pass, frames, video): bytes by arm, and "kept", the share of tokens of RLT."""


def memory_table() -> str:
    """Peak memory of dense, RLT and padding as measured, forward and in training, against the number of frames."""
    rows: list[tuple[str, ...]] = [("model, pass, frames, video", "tokens kept", "dense", "RLT", "RLT, padded")]
    for (model, work, frames, video), found in _measured_memory().items():
        shown = (_mebibytes(found[arm]) if arm in found else "" for arm in ("dense", "rlt", "padded"))
        said = "both videos" if video == "all" else video
        rows.append((f"{model}, {work}, {frames}, {said}", f"{found['kept']:.1%}", *shown))
    return table(rows)


def counted_memory_table() -> str:
    """What was counted without running, where nothing was measured; and how far both agree elsewhere."""
    measured, counted = _measured_memory(), _counted_memory()
    rows: list[tuple[str, ...]] = [("model, pass, frames, video", "tokens kept", "dense", "RLT")]
    apart: dict[str, float] = {}
    for key, found in counted.items():
        model, work, frames, video = key
        if key not in measured:
            said = "both videos" if video == "all" else video
            memory = (_mebibytes(found[arm]) for arm in ("dense", "rlt"))
            rows.append((f"{model}, {work}, {frames}, {said}", f"{found['kept']:.1%}", *memory))
            continue
        for arm in ("dense", "rlt"):
            apart[work] = max(apart.get(work, 0.0), abs(found[arm] / measured[key][arm] - 1))
    agree = " and ".join(f"{share:.1%} ({work})" for work, share in apart.items())
    return f"{table(rows)}\nWhere both were done, counted and measured differ by at most {agree}.\n"


def _measured_memory() -> Memory:
    found: Memory = {}
    for file in FORWARD_MEMORY:
        result = load(file)
        for arm in result["arms"]:
            if arm["name"] in ("dense", "rlt", "packed", "padded"):
                key = (result["settings"]["model"], "forward", arm["frames"], arm["video"])
                name = "rlt" if arm["name"] == "packed" else arm["name"]
                found.setdefault(key, {})[name] = arm["peak_memory_bytes"]
                if name == "rlt":
                    found[key]["kept"] = arm["tokens_kept"]
    for file in TRAINING_MEMORY:
        result = load(file)
        by_name = {arm.get("runs", arm["name"]): arm for arm in result["arms"]}
        key = (result["settings"]["model"], "training step", result["settings"]["num_frames"], "all")
        found[key] = {
            name: by_name[arm]["peak_memory_bytes"]
            for name, arm in (("dense", "dense_packed"), ("rlt", "rlt"), ("padded", "padded"))
        }
        found[key]["kept"] = by_name["rlt"]["tokens_kept"]
    return found


def _counted_memory() -> Memory:
    found: Memory = {}
    for arm in load("memory-counted")["arms"]:
        place = found.setdefault((arm["model"], arm["pass"], arm["frames"], arm["video"]), {})
        place[arm["name"]] = arm["peak_memory_bytes"]
        if arm["name"] == "rlt":
            place["kept"] = arm["tokens_kept"]
    return found


def headline_table() -> str:
    """The experiments that the paper leads with: its figure, ours, and the command."""
    rows: list[tuple[str, ...]] = [("experiment", "paper", "here", "tokens kept", "command")]
    for file, name, paper, command in (
        ("forward", "forward throughput", "+35 %", "rlt benchmark forward"),
        ("forward-bfloat16", "forward throughput, bfloat16", "", "rlt benchmark forward --dtype bfloat16"),
    ):
        rlt = _arm(load(file), "rlt")
        rows.append((name, paper, f"{rlt['speedup'] - 1:+.0%}", f"{rlt['tokens_kept']:.1%}", f"`{command}`"))
    rlt = _arm(load("train-step"), "rlt")
    command = "`rlt benchmark train-step --clips 2`"
    rows.append(("time of a training step", "-30 %", _less(rlt["speedup"]), f"{rlt['tokens_kept']:.1%}", command))
    every_frame = load("memory-train-small-32")
    settings, rlt = every_frame["settings"], _arm(every_frame, "rlt")
    command = (
        f"`rlt benchmark train-step VIDEO... --model {settings['model']} --clips {settings['clips']} "
        f"--frames {settings['num_frames']} --stride {settings['frame_stride']}`"
    )
    name = "training throughput at every frame (25 to 30 per second)"
    rows.append((name, "+100 %", f"{rlt['speedup'] - 1:+.0%}", f"{rlt['tokens_kept']:.1%}", command))
    growth = load("frames")
    most = growth["settings"]["num_frames"]
    for arm in growth["arms"]:
        if arm["name"] == "rlt" and arm["frames"] == most:
            kept = arm["tokens_kept"]
            command = f"`rlt benchmark frames VIDEO... --frames {most} --stride 1`"
            rows.append(
                (f"tokens of {most} frames, {arm['video']}", "-80 %", f"{kept - 1:+.0%}", f"{kept:.1%}", command)
            )
    return f"{table(rows)}\nAll on {machine(every_frame)}.\n"


def feeding_table() -> str:
    """How many decoding cores keep a GPU busy, by the clips per second that it runs dense."""
    per_core = median(load("decode")["clips_per_second_per_core"].values())
    speedup = _arm(load("forward"), "rlt")["speedup"]
    rows: list[tuple[str, ...]] = [("clips/s of the GPU, dense", "cores, dense", "clips/s, RLT", "cores, RLT")]
    for clips in CLIPS_PER_SECOND_OF_A_GPU:
        cores = (f"{rate / per_core:.0f}" for rate in (clips, clips * speedup))
        rows.append((str(clips), next(cores), f"{clips * speedup:.0f}", next(cores)))
    said = f"At {per_core:.1f} clips/s per core, the median of the files above, and a speed-up of {speedup:.2f}.\n"
    return f"{table(rows)}\n{said}"


def _less(speedup: float) -> str:
    return f"{1 / speedup - 1:+.0%}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _arm(result: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(arm for arm in result["arms"] if arm["name"] == name)
    return found

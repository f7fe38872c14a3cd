"""The tables of docs/performance.md and README.md, from what `rlt benchmark` and `rlt compare` left in docs/results."""

from __future__ import annotations

from typing import Any

from markdown_tables import load, machine, table, time

SUITES = (
    ("tokenize", "tokenize", "normalise all, difference, pool, cut, select in float32", "reference"),
    ("embed", "embed", "`Conv3d` on normalised kept patches", "reference"),
    ("attention", "attention", "every token", "dense"),
    ("forward", "forward", "the same ViT with every token", "dense"),
    ("forward-bfloat16", "forward, bfloat16", "the same ViT with every token", "dense"),
    ("train-step", "training step", "the same ViT with every token", "dense"),
    ("end-to-end", "file to logits", "the same with every token", "dense"),
)
"""(JSON, name, what is compared with, its arm)."""
ALSO = (("attention-bfloat16", "attention, bfloat16"), ("forward-compiled", "forward, compiled"))
"""(JSON, name) of what only the long page shows."""


def compare_table() -> str:
    """What `rlt compare` measured on the bundled clip."""
    result = load("compare")
    tokens, flops, seconds = result["tokens"], result["flops"], result["seconds"]
    settings = result["settings"]
    kept = f"{tokens['rlt']:,} ({result['tokens_kept']:.1%})"
    rows: list[tuple[str, ...]] = [
        ("", "dense", "RLT", "speed-up"),
        ("tokens", f"{tokens['dense']:,}", kept, ""),
        ("decode", time(seconds["decode"]), time(seconds["decode"]), ""),
        ("tokenize", time(seconds["tokenize_dense"]), time(seconds["tokenize_rlt"]), ""),
    ]
    for name, stage in (("forward pass", "forward"), ("end to end", "end_to_end")):
        dense, rlt = (time(seconds[f"{stage}_{arm}"]) for arm in ("dense", "rlt"))
        rows.append((name, dense, rlt, f"{result[f'speedup_{stage}']:.2f}x"))
    dense, rlt = (f"{flops[arm] / 1e9:.1f} G" for arm in ("dense", "rlt"))
    rows.append(("FLOPs of the forward pass", dense, rlt, f"{result['speedup_flops']:.2f}x fewer"))
    caption = (
        f"{settings['model']} ({result['weights']} weights), {settings['num_frames']} frames at stride "
        f"{settings['frame_stride']}, {settings['size']} px, threshold {settings['threshold']}; median of "
        f"{settings['repeats']} runs on {machine(result)}. Feature cosine {result['feature_cosine']:.3f}.\n"
    )
    return f"{table(rows)}\n{caption}"


def summary_table() -> str:
    """One row per suite: RLT beside what it is compared with."""
    rows: list[tuple[str, ...]] = [("suite", "compared with", "compared", "RLT", "tokens kept", "speed-up")]
    for file, name, description, compared in SUITES:
        result = load(file)
        other, rlt = (_arm(result, arm) for arm in (compared, "rlt"))
        times = (time(other["seconds_median"]), time(rlt["seconds_median"]))
        rows.append((name, description, *times, f"{rlt['tokens_kept']:.1%}", f"{rlt['speedup']:.2f}x"))
    forward = load("forward")
    caption = (
        f"{forward['settings']['model']} on {machine(forward)}; 16x224x224 clips of the bundled videos. The forward "
        f"pass takes {forward['time_ratio']:.3f} of the dense time at {forward['flop_ratio']:.3f} of the FLOPs "
        f"({forward['time_ratio_over_flop_ratio']:.3f} times the ideal).\n"
    )
    return f"{table(rows)}\n{caption}"


def suite_tables() -> str:
    """Every suite with all of its arms."""
    text = ""
    for file, name in (*(suite[:2] for suite in SUITES), *ALSO):
        result = load(file)
        text += f"### {name[0].upper()}{name[1:]}\n\n{_suite_table(result)}\n{_caption(result)}\n"
    return text


def _suite_table(result: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [
        ("arm", "median", "fastest to slowest", "tokens", "GFLOPs", "peak memory", "speed-up")
    ]
    for arm in result["arms"]:
        details = ", ".join(str(arm[key]) for key in ("pass", "runs") if key in arm)
        memory = arm["peak_memory_bytes"]
        rows.append(
            (
                f"{arm['name']} ({details})" if details else arm["name"],
                time(arm["seconds_median"]),
                " to ".join(time(seconds) for seconds in arm["seconds_spread"]),
                f"{arm['tokens_kept']:.1%}",
                f"{arm['flops'] / 1e9:,.1f}" if arm["flops"] else "",
                "" if memory is None else f"{memory / 2**20:,.0f} MiB",
                "" if arm["speedup"] is None else f"{arm['speedup']:.2f}x",
            )
        )
    return table(rows)


def _caption(result: dict[str, Any]) -> str:
    settings = result["settings"]
    numbers = [
        f"{key.replace('_', ' ')} {value:.3f}"
        for key, value in result.items()
        if isinstance(value, int | float) and key != "mask_entries_that_differ"
    ]
    said = f" {', '.join(numbers).capitalize()}." if numbers else ""
    return (
        f"{settings['model']}, {settings['clips']} clips of {settings['num_frames']} frames at {settings['size']} px, "
        f"{settings['dtype']}, on {machine(result)}.{said}\n"
    )


def targets_table() -> str:
    """What was aimed at, and what came out."""
    tokenize, forward, half = load("tokenize"), load("forward"), load("forward-bfloat16")
    train, files = load("train-step"), load("end-to-end")
    speedup = _arm(tokenize, "rlt")["speedup"]
    share = _arm(tokenize, "rlt")["seconds_median"] / _arm(forward, "rlt")["seconds_median"]
    ratio = "time_ratio_over_flop_ratio"
    targets = (
        ("tokenize: times as fast as the float32 way", "at least", 20, speedup),
        ("tokenize: share of a ViT-B forward pass with RLT", "at most", 0.01, share),
        ("tokenize: time over copying the bytes it must read", "at most", 2, tokenize["rlt_over_copy"]),
        ("forward, float32: time ratio over FLOP ratio", "at most", 1.03, forward[ratio]),
        ("forward, bfloat16: time ratio over FLOP ratio", "at most", 1.03, half[ratio]),
        ("training step: time ratio over FLOP ratio", "at most", 1.05, train[ratio]),
        ("forward: ToMe's time over RLT's at equal FLOPs", "at least", 1.2, forward["tome_over_rlt"]),
        ("end to end: speed-up over that of the forward pass", "at least", 0.85, files["end_to_end_over_forward"]),
    )
    rows: list[tuple[str, ...]] = [("target", "aim", "measured", "met")]
    for name, direction, aim, measured in targets:
        met = measured >= aim if direction == "at least" else measured <= aim
        rows.append((name, f"{direction} {aim:g}", f"{measured:.4g}", "yes" if met else "**no**"))
    return table(rows)


def decode_table() -> str:
    """Clips per second and core of our decoder, and how much slower or faster others are on the same file."""
    result = load("decode")
    others = sorted({arm["name"] for arm in result["arms"]} - {"pyav"})
    rows: list[tuple[str, ...]] = [
        ("file", "clips/s per core, PyAV", *(f"{name.replace('_', ' ')}, times as fast" for name in others))
    ]
    for video, clips in result["clips_per_second_per_core"].items():
        arms = {arm["name"]: arm for arm in result["arms"] if arm["video"] == video}
        rows.append(
            (
                video,
                f"{clips:.1f}",
                *(f"{arms[name]['speedup']:.2f}x" if name in arms else "cannot read it" for name in others),
            )
        )
    return f"{table(rows)}\n{_caption(result)}"


def skipping_table() -> str:
    """How much faster our decoder is where it leaves out frames that nobody asks for."""
    result = load("decode-skipping")
    arms = {(arm["name"], arm["video"]): arm for arm in result["arms"]}
    rows: list[tuple[str, ...]] = [("file", "every frame", "without those that nobody looks at", "times as fast")]
    for video in result["clips_per_second_per_core"]:
        whole, ours = (arms[name, video] for name in ("pyav_whole", "pyav"))
        times = (f"{arm['seconds_median'] * 1000:.0f} ms" for arm in (whole, ours))
        rows.append((video, *times, f"{1 / whole['speedup']:.2f}x"))
    return table(rows)


def frames_table() -> str:
    """Cost against the number of frames: dense and RLT for each video alone, packed and padded for all together."""
    result = load("frames")
    rows: list[tuple[str, ...]] = [
        ("frames", "video", "tokens kept", "time of dense", "memory of dense", "dense", "RLT")
    ]
    for dense in (arm for arm in result["arms"] if arm["name"] == "dense"):
        rlt = next(arm for arm in result["arms"] if arm["name"] == "rlt" and _place(arm) == _place(dense))
        memory = rlt["peak_memory_bytes"] / dense["peak_memory_bytes"]
        rows.append(
            (
                str(dense["frames"]),
                dense["video"],
                f"{rlt['tokens_kept']:.1%}",
                f"{1 / rlt['speedup']:.2f}",
                f"{memory:.2f}",
                time(dense["seconds_median"]),
                time(rlt["seconds_median"]),
            )
        )
    return f"{table(rows)}\n{_caption(result)}"


def adapters_table() -> str:
    """Each model that can be patched: exactness, tokens, FLOPs and time beside the unpatched one."""
    result = load("adapters")
    rows: list[tuple[str, ...]] = [
        (
            "model",
            "outputs, nothing dropped",
            "outputs, attention by its formula",
            "outputs, clip by clip",
            "tokens kept",
            "FLOPs of dense",
            "time of dense",
            "dense",
            "RLT",
        )
    ]
    for name, differences in result["largest_differences"].items():
        dense, rlt = (
            next(arm for arm in result["arms"] if arm["name"] == kind and arm["model"] == name)
            for kind in ("dense", "rlt")
        )
        rows.append(
            (
                name,
                *(f"{differences[key]:.1e}" for key in ("identity", "naive_twin", "one_by_one")),
                f"{rlt['tokens_kept']:.1%}",
                f"{rlt['flops'] / dense['flops']:.1%}",
                f"{1 / rlt['speedup']:.1%}",
                *(time(arm["seconds_median"]) for arm in (dense, rlt)),
            )
        )
    settings, language = result["settings"], any(name.startswith("Qwen") for name in result["largest_differences"])
    towers = " (Qwen-VL: tower and language model each)" if language else ""
    left_out = f" Not with the libraries measured: {', '.join(names)}." if (names := result.get("left_out")) else ""
    return (
        f"{table(rows)}\n{settings['clips']} clips of {settings['num_frames']} frames at {settings['size']} px of the "
        f"bundled videos, networks of ViT-S's size with random weights{towers}, {settings['dtype']}, on "
        f"{machine(result)}.{left_out}\n"
    )


def _place(arm: dict[str, Any]) -> tuple[str, int]:
    return arm["video"], arm["frames"]


def _arm(result: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(arm for arm in result["arms"] if arm["name"] == name)
    return found

"""The tables of docs/performance.md that a GPU fills, from what `make figures-gpu` left in docs/results/gpu."""

from __future__ import annotations

import json
from collections.abc import Callable
from statistics import mean
from typing import Any

from campaign import DONE
from figures_gpu import RESULTS as FOLDER
from figures_gpu import SEEDS
from markdown_tables import RESULTS, table, time

NOT_YET = "not measured yet"
RATIO = 1.10
"""Target of the time ratio over the FLOP ratio."""
HEADLINES = (
    ("forward-base-8", "forward, ViT-B, 8 clips", "+35 %"),
    ("forward-base-64", "forward, ViT-B, 64 clips", "+35 %"),
    ("forward-large-8", "forward, ViT-L, 8 clips", "+35 %"),
    ("forward-large-64", "forward, ViT-L, 64 clips", "+35 %"),
    ("forward-huge-8", "forward, ViT-H, 8 clips", "+35 %"),
    ("forward-huge-64", "forward, ViT-H, 64 clips", "+35 %"),
    ("forward-compiled", "forward, ViT-B, 8 clips, beside compiled arms", ""),
    ("train-step-base-8", "training step, ViT-B, 8 clips", "-30 % time"),
    ("train-step-large-8", "training step, ViT-L, 8 clips", "-30 % time"),
    ("train-step-compiled", "training step, ViT-B, 8 clips, beside compiled arms", ""),
    ("train-step-frames-64", "training step, ViT-B, 64 frames at stride 1", "+100 %"),
    ("forward-frames-64", "forward, ViT-B, 64 frames at stride 1", ""),
)
"""(piece, what it shows, the paper's figure)."""
BESIDE = {
    "random": "random tokens",
    "tome": "ToMe",
    "padded": "padded + mask",
    "transformers": "VideoMAE of transformers",
    "rlt_compiled": "RLT compiled",
    "rlt_cuda_graph": "RLT, CUDA graph",
}
"""Arms that RLT's time is compared with."""
ATTENTION = ("dense", "rlt", "rlt_sdpa", "rlt_nested", "rlt_flex", "padded", "block_mask")
TOWERS = ("videomae_base", "videomae_large", "vjepa2_large", "vjepa2_giant", "qwen2.5_vl_7b", "qwen3_vl_8b")
FEED = {
    "host": "chosen on the CPU, kept patches copied",
    "device": "all frames copied, chosen on the GPU",
    "on_device": "frames on the GPU already",
    "copy": "all frames copied, nothing chosen",
}


def gpu_targets_table() -> str:
    """What is aimed at on a GPU, and what came out."""
    rows: list[tuple[str, ...]] = [("target", "aim", "measured", "met")]
    for piece, what in (
        ("forward-base-8", "forward, ViT-B"),
        ("forward-large-8", "forward, ViT-L"),
        ("train-step-base-8", "training step, ViT-B"),
        ("train-step-large-8", "training step, ViT-L"),
    ):
        ratio = _value(piece, lambda result: result["time_ratio_over_flop_ratio"])
        rows.append(_target(f"{what}: time ratio over FLOP ratio", RATIO, ratio))
    rows.append(_target("tokenising on the GPU: share of a ViT-B forward pass with RLT", 0.01, _tokenizing_share()))
    for piece, what in (("forward-base-8", "a forward pass"), ("train-step-base-8", "a training step")):
        waits = _value(piece, lambda result: _arm(result, "rlt")["device_waits"])
        rows.append(_target(f"waits for the device inside {what}", 0, waits))
    return table(rows)


def gpu_tables() -> str:
    """Every table of figures, with a row for each piece whether it was measured or not."""
    parts = {
        "Tests": _tests(),
        "The paper's figures": _headlines(),
        "A long static video": _static(),
        "Attention": _attention(),
        "Choosing tokens": _feed(),
        "Patched models of real size": _towers(),
        "Training": _training(),
    }
    return "".join(f"### GPU: {title}\n\n{text}\n" for title, text in parts.items())


def gpu_counted_table() -> str:
    """FLOPs and memory of every arm, known before anything ran."""
    result = json.loads((RESULTS / "gpu-counted.json").read_text(encoding="utf-8"))
    rows: list[tuple[str, ...]] = [("piece", "arm", "tokens", "TFLOPs", "peak memory, weights included")]
    for arm in result["arms"]:
        flops = "" if arm["flops"] is None else f"{arm['flops'] / 1e12:,.2f}"
        memory = f"{arm['memory_bytes'] / 2**30:,.1f} GiB"
        rows.append((arm["piece"], arm["name"], f"{arm['tokens_kept']:.1%}", flops, memory))
    most = max(arm["memory_bytes"] for arm in result["arms"]) / 2**30
    return f"{table(rows)}\nThe most is {most:.1f} GiB.\n"


def _tests() -> str:
    found, why = _result("tests")
    if found is None:
        return f"Kernels, back ends, precisions, compiling, waits and memory: {why}.\n"
    machine = found["machine"]
    return (
        f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped, on {machine['device']}, "
        f"driver {machine.get('driver', 'none')}, torch {machine['torch']}.\n"
    )


def _headlines() -> str:
    head = ("piece", "paper", "tokens kept", "FLOPs of dense", "time of dense", "time over FLOP ratio", "speed-up")
    rows: list[tuple[str, ...]] = [(*head, *(f"{name}: time over RLT's" for name in BESIDE.values()))]
    for piece, shows, paper in HEADLINES:
        result, why = _result(piece)
        if result is None:
            rows.append((shows, paper, why, *[""] * (len(rows[0]) - 3)))
            continue
        rlt = _arm(result, "rlt")
        ratios = (f"{result[key]:.3f}" for key in ("flop_ratio", "time_ratio", "time_ratio_over_flop_ratio"))
        arms = {arm["name"]: arm for arm in result["arms"]}
        others = (
            f"{arms[name]['seconds_median'] / rlt['seconds_median']:.2f}" if name in arms else "" for name in BESIDE
        )
        rows.append((shows, paper, f"{rlt['tokens_kept']:.1%}", *ratios, f"{rlt['speedup']:.2f}x", *others))
    return f"{table(rows)}\n{_machine(HEADLINES[0][0])}"


def _static() -> str:
    rows: list[tuple[str, ...]] = [("frames", "paper", "tokens dropped", "time of dense", "memory of dense")]
    result, why = _result("static-128")
    if result is None:
        rows.append(("128", "-80 % tokens", why, "", ""))
        return table(rows)
    for dense in (arm for arm in result["arms"] if arm["name"] == "dense"):
        rlt = next(arm for arm in result["arms"] if arm["name"] == "rlt" and arm["frames"] == dense["frames"])
        memory = rlt["peak_memory_bytes"] / dense["peak_memory_bytes"]
        paper = "-80 % tokens" if dense["frames"] == max(arm["frames"] for arm in result["arms"]) else ""
        dropped = f"{1 - rlt['tokens_kept']:.1%}"
        rows.append((str(dense["frames"]), paper, dropped, f"{1 / rlt['speedup']:.2f}", f"{memory:.2f}"))
    return table(rows)


def _attention() -> str:
    rows: list[tuple[str, ...]] = [("arm", "forward", "forward and backward", "speed-up over dense, both")]
    for piece, note in (("attention", ""), ("attention-fa3", " by FA3"), ("attention-fa4", " by FA4")):
        result, why = _result(piece)
        for name in ATTENTION if piece == "attention" else ("dense", "rlt"):
            if result is None:
                rows.append((name + note, why, "", ""))
                continue
            passes = [arm for arm in result["arms"] if arm["name"] == name]
            if passes:
                speedups = ", ".join(f"{arm['speedup']:.2f}x" for arm in passes)
                rows.append((name + note, *(time(arm["seconds_median"]) for arm in passes), speedups))
    return table(rows)


def _feed() -> str:
    rows: list[tuple[str, ...]] = [("8 clips", "median", "fastest to slowest")]
    result, why = _result("feed")
    for name, what in FEED.items():
        if result is None:
            rows.append((what, why, ""))
            continue
        arm = _arm(result, name)
        rows.append(
            (what, time(arm["seconds_median"]), " to ".join(time(seconds) for seconds in arm["seconds_spread"]))
        )
    return table(rows)


def _towers() -> str:
    rows: list[tuple[str, ...]] = [("model", "part", "tokens kept", "FLOPs of dense", "time of dense", "dense", "RLT")]
    for name in TOWERS:
        result, why = _result(f"towers-{name}")
        if result is None:
            rows.append((name, "", why, "", "", "", ""))
            continue
        for dense in (arm for arm in result["arms"] if arm["name"] == "dense"):
            rlt = next(arm for arm in result["arms"] if arm["name"] == "rlt" and arm["part"] == dense["part"])
            shares = (f"{rlt['tokens_kept']:.1%}", f"{rlt['flops'] / dense['flops']:.1%}", f"{1 / rlt['speedup']:.1%}")
            rows.append((name, dense["part"], *shares, *(time(arm["seconds_median"]) for arm in (dense, rlt))))
    return table(rows)


def _training() -> str:
    rows: list[tuple[str, ...]] = [
        ("model", "trained with", "seeds", "tokens kept", "time of dense", "accuracy", "accuracy, every token")
    ]
    for size in ("small", "base"):
        results = [result for seed in SEEDS if (result := _result(f"training-{size}-{seed}")[0]) is not None]
        for name in ("dense", "rlt", "random"):
            if not results:
                rows.append((f"ViT-{size[0].upper()}", name, "", _result(f"training-{size}-0")[1], "", "", ""))
                continue
            arms = [_arm(result, name) for result in results]
            seconds = mean(
                arm["seconds_training"] / _arm(result, "dense")["seconds_training"]
                for arm, result in zip(arms, results, strict=True)
            )
            values = (mean(arm[key] for arm in arms) for key in ("top1", "top1_dense"))
            kept = f"{mean(arm['tokens_kept'] for arm in arms):.1%}"
            shown = (f"{value:.1%}" for value in values)
            rows.append((f"ViT-{size[0].upper()}", name, str(len(arms)), kept, f"{seconds:.2f}", *shown))
    return table(rows)


def _result(piece: str) -> tuple[dict[str, Any] | None, str]:
    """What a piece measured, or why there is nothing."""
    path = FOLDER / f"{piece}.json"
    if not path.exists():
        return None, NOT_YET
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return (content["result"], "") if content["state"] == DONE else (None, f"failed: {content['reason']}")


def _value(piece: str, read: Callable[[dict[str, Any]], float | None]) -> float | None:
    result, _ = _result(piece)
    return None if result is None else read(result)


def _tokenizing_share() -> float | None:
    feed = _value("feed", lambda result: _arm(result, "on_device")["seconds_median"])
    forward = _value("forward-base-8", lambda result: _arm(result, "rlt")["seconds_median"])
    return None if feed is None or forward is None else feed / forward


def _target(name: str, aim: float, measured: float | None) -> tuple[str, ...]:
    if measured is None:
        return name, f"at most {aim:g}", NOT_YET, ""
    return name, f"at most {aim:g}", f"{measured:.4g}", "yes" if measured <= aim else "**no**"


def _machine(piece: str) -> str:
    result, _ = _result(piece)
    if result is None:
        return ""
    machine, settings = result["machine"], result["settings"]
    return (
        f"{settings['num_frames']} frames of {settings['size']} px, {settings['dtype']}, on {machine['device']}, "
        f"driver {machine.get('driver', 'none')}, torch {machine['torch']}.\n"
    )


def _arm(result: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(arm for arm in result["arms"] if arm["name"] == name)
    return found

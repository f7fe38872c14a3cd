"""How results look in a terminal: rich tables, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlt.benchmark import BenchmarkResult
from rlt.checkpoints.models import MODELS
from rlt.compare import ARMS, Comparison, VideoComparison
from rlt.measure import Timing, machine_info
from rlt.network.attention import choose_backend
from rlt.tokens import Rule, rule_options
from rlt.video.geometry import Size

_MAX_CLIPS_IN_DETAIL = 4


def comparison_report(result: Comparison) -> RenderableType:
    """Everything that `rlt compare` says: what was saved, what it predicted, and on which weights and machine."""
    parts: list[RenderableType] = [Text(_settings_line(result), style="bold"), _stage_table(result)]
    clips = sum(video.num_clips for video in result.videos)
    if clips <= _MAX_CLIPS_IN_DETAIL:
        for video in result.videos:
            for index, start in enumerate(video.clip_starts):
                parts += [Text(f"Top 5 of {video.source} at {start:.2f} s"), _top_table(result, video, index)]
    else:
        parts.append(_video_table(result))
    same = round(result.top1_agreement * clips)
    parts.append(
        Text(f"Agreement: same top-1 class in {same} of {clips} clips, feature cosine {result.feature_cosine:.4f}")
    )
    if result.settings.checkpoint is None:
        parts.append(
            Text("Weights: random (no --checkpoint), so the classes mean nothing; times and tokens do.", style="yellow")
        )
    else:
        parts.append(Text(f"Weights: {result.settings.checkpoint}"))
    parts.append(Text(f"Machine: {_machine_line(result.settings.device)}, attention {result.attention}"))
    return Group(*parts)


def failed_report(failed: list[tuple[str, str]]) -> RenderableType:
    """The videos that are cut off or could not be processed, one line each."""
    return Text("\n".join([f"Bad videos: {len(failed)}", *(f"  {error}" for _, error in failed)]), style="red")


def failed_json(failed: list[tuple[str, str]]) -> list[dict[str, str]]:
    """The same as JSON values."""
    return [{"source": source, "error": error} for source, error in failed]


def benchmark_report(result: BenchmarkResult) -> RenderableType:
    """One row per arm, with its speed-up over the arm that the others are compared with."""
    settings = result.settings
    clips = f"{settings.clips} clips of {settings.num_frames}x{settings.size}x{settings.size}"
    table = Table()
    for column in ("arm", "median", "slowest", "tokens", "GFLOPs", "memory", "speed-up"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column != "arm")
    for arm in result.arms:
        speedup = result.speedup(arm)
        details = ", ".join(str(value) for value in arm.details.values())
        table.add_row(
            f"{arm.name} ({details})" if details else arm.name,
            format_seconds(arm.timing.median),
            format_seconds(arm.timing.spread[1]),
            f"{arm.tokens_kept:.1%}",
            f"{arm.flops / 1e9:,.1f}" if arm.flops else "",
            "" if arm.peak_memory_bytes is None else f"{arm.peak_memory_bytes / 2**20:,.0f} MiB",
            "" if speedup is None else f"{speedup:.2f}x",
        )
    extra = ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in result.extra.items()
        if isinstance(value, int | float)
    )
    return Group(
        Text(f"{result.suite}: {clips}, compared with {result.compared_with}", style="bold"),
        table,
        Text(extra[:1].upper() + extra[1:]),
        Text(f"Machine: {_machine_line(settings.device)}"),
    )


def models_report() -> RenderableType:
    """The named models with their sizes, and the attention back end of each device."""
    table = Table()
    for column in ("name", "width", "depth", "heads", "patch", "tokens per clip"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for name, config in MODELS.items():
        tokens = config.num_frames // config.tubelet_size * (config.image_size // config.patch_size) ** 2
        numbers = (config.width, config.depth, config.num_heads, config.patch_size, tokens)
        table.add_row(name, *map(str, numbers))
    rows = [("cpu", torch.float32), ("cuda", torch.float32), ("cuda", torch.bfloat16)]
    backends = ", ".join(
        f"{device} {str(dtype).removeprefix('torch.')}: {choose_backend(device, dtype)}" for device, dtype in rows
    )
    title = Text("Models (VideoMAE, 16 frames of 224x224)", style="bold")
    return Group(title, table, Text(f"Attention back ends: {backends}"))


def format_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    rounded = float(f"{seconds:.3g}")
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if rounded * scale >= 1:
            return f"{rounded * scale:.3g} {unit}"
    return f"{rounded * 1e6:.3g} µs"


def format_size(size: Size) -> str:
    """Pixels of a clip: "224 px", "224x384 px", or "native size"."""
    if size is None:
        return "native size"
    return f"{size} px" if isinstance(size, int) else f"{size[0]}x{size[1]} px"


def _settings_line(result: Comparison) -> str:
    settings = result.settings
    clips = sum(video.num_clips for video in result.videos)
    name = result.videos[0].source if len(result.videos) == 1 else f"{len(result.videos)} videos"
    return (
        f"{name}: {clips} clip{'s'[: clips != 1]} of {settings.num_frames} frames (stride {settings.frame_stride}) at "
        f"{format_size(settings.size)}, {settings.model}, {_rule_line(settings.rule)}"
    )


def _rule_line(rule: Rule) -> str:
    name, *options = [f"{value}" if key == "rule" else f"{key} {value}" for key, value in rule_options(rule).items()]
    return ", ".join(options if name in ("rlt", "budget") else [name, *options])


def _stage_table(result: Comparison) -> Table:
    table = Table(caption=f"median of {result.repeats} runs", caption_justify="left")
    for column in ("", "dense", "RLT", "speed-up"):
        table.add_column(column, justify="left" if not column else "right")
    dense, kept = result.total_tokens("dense"), result.total_tokens("rlt")
    table.add_row("tokens", f"{dense:,}", f"{kept:,} ({result.tokens_kept:.1%})", "")
    decode = format_seconds(result.seconds("decode").median)
    table.add_row("decode", decode, decode, "")
    table.add_row("tokenize", *_both(result.seconds("tokenize_dense"), result.seconds("tokenize_rlt")), "")
    table.add_row(
        "forward",
        *_both(result.seconds("forward_dense"), result.seconds("forward_rlt")),
        f"{result.speedup_forward:.2f}x",
    )
    table.add_row(
        "end to end", *_both(result.end_to_end("dense"), result.end_to_end("rlt")), f"{result.speedup_end_to_end:.2f}x"
    )
    flops = (f"{result.total_flops(arm) / 1e9:,.1f} G" for arm in ARMS)
    table.add_row("FLOPs of forward", *flops, f"{result.speedup_flops:.2f}x allowed")
    return table


def _both(dense: Timing, rlt: Timing) -> tuple[str, str]:
    return format_seconds(dense.median), format_seconds(rlt.median)


def _top_table(result: Comparison, video: VideoComparison, clip: int) -> Table:
    table = Table()
    for column in ("dense", "", "RLT", " "):
        table.add_column(column, justify="right" if not column.strip() else "left")
    for pair in zip(video.top("dense")[clip], video.top("rlt")[clip], strict=True):
        table.add_row(*(cell for index, value in pair for cell in (Text(_class_name(result, index)), f"{value:.1%}")))
    return table


def _video_table(result: Comparison) -> Table:
    folder = os.path.commonpath([Path(video.source).absolute().parent for video in result.videos])
    table = Table(caption=f"videos in {folder}", caption_justify="left")
    for column in ("video", "tokens kept", "same top-1", "feature cosine"):
        table.add_column(column, justify="left" if column == "video" else "right", overflow="fold")
    for video in result.videos:
        name = str(Path(video.source).absolute().relative_to(folder))
        kept = video.tokens["rlt"] / video.tokens["dense"]
        cosine = sum(video.feature_cosine) / video.num_clips
        same = f"{sum(video.same_top1)} of {video.num_clips}"
        table.add_row(Text(name), f"{kept:.1%}", same, f"{cosine:.4f}")
    return table


def _class_name(result: Comparison, index: int) -> str:
    return result.label(index) or f"class {index}"


def _machine_line(device: str) -> str:
    info = machine_info(device)
    where = "" if info["device"] == "cpu" else f", {info['device']} (driver {info['driver']})"
    return f"{info['processor']}, {info['cores']} cores{where}, torch {info['torch']}"

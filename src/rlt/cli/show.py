"""How results look in a terminal: rich tables, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlt.checkpoints.models import MODELS, size_name
from rlt.compare import ARMS, Comparison, VideoComparison
from rlt.measure import machine_info
from rlt.network.attention import choose_backend
from rlt.tokens import Everything, Threshold, rule_line, rule_name
from rlt.video.geometry import Size

if TYPE_CHECKING:  # what they need is not always installed
    from rlt.benchmark import BenchmarkResult
    from rlt.calibrate import Calibration
    from rlt.encoding import Cutter, Encoder, Encoding
    from rlt.evaluation.comparison import PairedComparison
    from rlt.evaluation.results import EvaluationResult
    from rlt.evaluation.statistics import Interval
    from rlt.frontier.results import FrontierResult

_MAX_CLIPS_IN_DETAIL = 4
_MAX_CLASSES = 10
_MAX_FAILED = 10
_WORDS = """\
Token: a square of two frames, what the network reads; dropped where it repeats.
Run length: the time steps that a kept token stands for.
Threshold: the change that keeps a token; 0.1 is 5.7 of 255 grey levels.
FLOPs: the network's arithmetic; dense: on all tokens, RLT: on those kept.
Same top-1, agreement: dense and RLT put the same class first.
Feature cosine: how alike both see a clip; 1 is the same, 0 nothing in common."""
"""What the words of `rlt compare` mean."""


def comparison_report(result: Comparison) -> RenderableType:
    """Everything that `rlt compare` says: what was saved, what it predicted, and on which weights and machine."""
    parts: list[RenderableType] = [Text(_settings_line(result), style="bold"), _stage_table(result)]
    if result.settings.more_frames:
        parts[1] = _arms_table(result)
    clips = result.num_clips
    if len(result.videos) > 1:
        parts.append(_video_table(result))
    trained = result.weights is not None  # classes of random weights say nothing
    if trained and clips <= _MAX_CLIPS_IN_DETAIL:
        for video in result.videos:
            for index, start in enumerate(video.clip_starts):
                parts += [Text(f"Top 5 of {video.source} at {start:.2f} s"), _top_table(result, video, index)]
    if _is_at_floor(result):
        floor = "Only the first time step of each clip is left: no higher threshold drops more, but more frames would."
        parts.append(Text(floor, style="yellow"))
    same = round(result.top1_agreement * clips)
    weights = Text(f"Weights: {result.weights}")
    if result.weights is None:
        random = "Weights: random (no --checkpoint), so classes would mean nothing; times and tokens do."
        weights = Text(random, style="yellow")
    return Group(
        *parts,
        Text(f"Agreement: same top-1 class in {same} of {clips} clips, feature cosine {result.feature_cosine:.4f}"),
        weights,
        Text(f"Machine: {_machine_line(result.settings.device)}, attention {result.attention}"),
        Text(_WORDS, style="dim"),
    )


def _is_at_floor(result: Comparison) -> bool:
    """Whether a threshold dropped all that it can: every clip keeps its first time step."""
    steps = result.settings.clip.num_frames // result.network.tubelet_size
    kept, dense = result.total_tokens("rlt"), result.total_tokens("dense")
    return isinstance(result.settings.rule, Threshold) and steps > 1 and kept * steps == dense


def benchmark_report(result: BenchmarkResult) -> RenderableType:
    """One row per arm, with its speed-up over the arm that the others are compared with."""
    settings = result.settings
    clips = f"{settings.clips} clips of {settings.clip.num_frames}x{settings.clip.size}x{settings.clip.size}"
    table = _table("arm", "median", "slowest", "tokens", "GFLOPs", "memory", "speed-up")
    for column in table.columns[1:]:
        column.no_wrap = True
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
    numbers = ((name, value) for name, value in result.extra.items() if isinstance(value, int | float))
    extra = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers)
    return Group(
        Text(f"{result.suite}: {clips}, compared with {result.compared_with}", style="bold"),
        table,
        _loader_limits(result) if result.suite == "loader" else Text(extra[:1].upper() + extra[1:]),
        Text(f"Machine: {_machine_line(settings.device)}"),
    )


def _loader_limits(result: BenchmarkResult) -> RenderableType:
    """How fast batches come, what limits training, and what can be done about it."""
    found: Any = result.extra
    table = _table("workers", "clips/s", "in training", "limit", left=("workers", "limit"))
    for workers, limit in found["limits"].items():
        rates = (found[name][workers] for name in ("clips_per_second", "training_clips_per_second"))
        table.add_row(workers, *(f"{rate:.1f}" for rate in rates), limit)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found["shares"].items())
    enough = [workers for workers, limit in found["limits"].items() if limit == "network" and workers != "0"]
    advice = (
        f"From data.num_workers={enough[0]} on the network is the limit."
        if enough
        else "Batches come slower than the network takes them: more data.num_workers help if cores are free."
    )
    parts: list[RenderableType] = [table, Text(f"One batch in one process: {shares}"), Text(advice)]
    if found["replaced"]:
        path, error = next(iter(found["replaced"].items()))
        parts.append(Text(f"Replaced: {len(found['replaced'])} videos, the first: {path}: {error}", style="red"))
    return Group(*parts)


def evaluation_report(result: EvaluationResult) -> RenderableType:
    """Numbers, the classes that go wrong most, and the videos that could not be read."""
    settings = result.settings
    views = f"{settings.views.num_clips}x{settings.views.num_crops} views"
    size = f"{settings.clip.num_frames} frames of {settings.clip.size} px"
    title = f"{result.num_videos:,} videos, {views} of {size}, tokenizer {rule_name(settings.rule)}"
    parts: list[RenderableType] = [Text(title, style="bold"), _numbers(result), _worst_classes(result)]
    if settings.rule != Everything() and result.tokens_kept == 1:
        parts.append(Text("The tokenizer dropped nothing: this is the dense model.", style="yellow"))
    if result.failed:
        shown = [f"  {path}: {error}" for path, error in result.failed[:_MAX_FAILED]]
        more = [f"  ... and {len(result.failed) - _MAX_FAILED} more"] if len(result.failed) > _MAX_FAILED else []
        parts.append(Text("\n".join([f"Not evaluated: {len(result.failed)}", *shown, *more]), style="red"))
    machine = result.machine
    parts.append(Text(f"Machine: {machine['processor']}, {machine['cores']} cores, device {machine['device']}"))
    return Group(*parts)


def encoding_report(result: Encoding, encoder: Encoder | Cutter) -> RenderableType:
    """The first few videos with their commonest class, the numbers, and what could not be read."""
    parts: list[RenderableType] = []
    if result.videos:
        classes = ["class of most windows"] if result.has_classes else []
        table = _table("video", "windows", "up to", "tokens kept", *classes)
        for video in result.videos.values():
            common = [f"{name} ({count})" for name, count in video.classes.most_common(1)]
            table.add_row(
                video.source, f"{video.windows:,}", f"{video.seconds:,.1f} s", f"{video.tokens_kept:.1%}", *common
            )
        parts.append(table)
        others = (
            result.num_videos - len(result.videos) - len({source for source, _ in result.failed} - {*result.videos})
        )
        if others:
            parts.append(Text(f"and {others:,} more videos"))
    before = f", {result.num_before:,} from before" if result.num_before else ""
    speed = f"{result.num_rows / result.seconds:.3g} a second" if result.seconds else ""
    parts.append(
        Text(
            f"{result.num_videos:,} videos, {result.num_rows:,} windows in {result.seconds:,.1f} s ({speed}){before}, "
            f"{result.tokens_kept:.1%} of the tokens kept"
        )
    )
    if encoder.rule == Everything() and result.num_rows:
        dense = "Every token went in, as the model was trained or rule none says: --threshold 0.1 drops what repeats."
        parts.append(Text(dense, style="yellow"))
    if encoder.is_random:
        parts.append(Text("Weights: random, so classes and features mean nothing.", style="yellow"))
    if result.failed:
        shown = [f"  {error}" for _, error in result.failed[:_MAX_FAILED]]
        more = [f"  ... and {len(result.failed) - _MAX_FAILED:,} more"] if len(result.failed) > _MAX_FAILED else []
        parts.append(Text("\n".join([f"Videos with errors: {len(result.failed):,}", *shown, *more]), style="red"))
    return Group(*parts)


def frontier_report(result: FrontierResult) -> RenderableType:
    """A row for each arm, level by level, and what counting run lengths changes against the paper's way."""
    table = _table("arm", "at", "tokens", "FLOPs", "same top-1", "KL to dense", "accuracy")
    for point in result.points:
        means = point.means
        table.add_row(
            point.arm.family,
            f"{point.arm.level[1]:g}",
            f"{means['tokens_kept']:.1%}",
            f"{means['flops_share']:.1%}",
            f"{means['agrees']:.1%}",
            f"{means['kl']:.4f}",
            f"{means['correct']:.1%}",
        )
    title = f"{len(result.videos):,} videos, dense accuracy {result.dense_accuracy:.1%}; 95 % intervals over videos"
    parts: list[RenderableType] = [Text(title, style="bold"), table]
    for row in result.differences("aware"):
        if row["minus"] == "paper":
            name, value = row["level"]
            low, high = row["kl_interval"]
            agree, (least, most) = row["top1_agreement"], row["top1_agreement_interval"]
            parts.append(
                Text(
                    f"{name} {value:g}: aware minus paper: KL {row['kl']:+.4f} ({low:+.4f} to {high:+.4f}), same top-1 "
                    f"{100 * agree:+.1f} points ({100 * least:+.1f} to {100 * most:+.1f})"
                )
            )
    if result.left_out:
        parts.append(Text(f"Left out, since this model has no such part: {', '.join(result.left_out)}"))
    if result.failed:
        parts.append(Text(f"Not measured: {len(result.failed)}, the first: {': '.join(result.failed[0])}", style="red"))
    return Group(*parts)


def calibration_report(result: Calibration) -> RenderableType:
    """What was asked for, what was found, and whether the data set is large enough to say so."""
    (name, target), found, clip = *result.asked.items(), result.found, result.settings.clip
    table = _table("", " ", show_header=False)
    table.add_row("asked for", f"{name.replace('_', ' ')} {target:g}")
    table.add_row("rule", rule_line(result.rule))
    table.add_row("tokens kept (95 % interval)", _percent(found.tokens_kept))
    if found.disagreement is not None:
        table.add_row("other class than dense (95 % interval)", _percent(found.disagreement))
    pace = f"stride {clip.frame_stride}" if clip.fps is None else f"{clip.fps:g} a second"
    clips = f"{result.settings.num_clips} clip{'s'[: result.settings.num_clips != 1]}"
    title = (
        f"{result.num_videos:,} videos, {clips} each of {clip.num_frames} frames ({pace}) at {format_size(clip.size)}"
    )
    parts: list[RenderableType] = [Text(title, style="bold"), table]
    if found.disagreement is not None:
        parts.append(_ladder(result))
        if found == result.curve[-1]:
            parts.append(Text("It is the largest threshold that was tried.", style="yellow"))
        if not result.is_certain:
            doubt = (
                f"Too few videos to be sure: the class may differ in up to {found.disagreement.high:.1%} of clips; "
                f"{result.videos_needed:,} videos without a single difference would tell"
            )
            parts.append(Text(doubt, style="yellow"))
    if result.failed:
        parts.append(Text(f"Not measured: {len(result.failed)}, the first: {': '.join(result.failed[0])}", style="red"))
    return Group(*parts)


def _ladder(result: Calibration) -> Table:
    table = _table("threshold", "tokens kept", "other class than dense")
    for step in result.curve:
        other = "" if step.disagreement is None else _percent(step.disagreement)
        table.add_row(f"{step.threshold:g}", f"{step.tokens_kept.value:.1%}", other)
    return table


def paired_report(result: PairedComparison) -> RenderableType:
    """Two runs side by side, the difference, and whether chance alone could make it."""
    table = _table("", "first", "second", caption=f"{result.counts.total:,} videos in both runs")
    table.add_row("predictions", Text(result.first), Text(result.second))
    table.add_row("top-1", _percent(result.top1_first), _percent(result.top1_second))
    table.add_row("right in this run only", f"{result.counts.only_first:,}", f"{result.counts.only_second:,}")
    table.add_row("tokens kept", f"{result.tokens_kept_first:.1%}", f"{result.tokens_kept_second:.1%}")
    difference = result.difference
    points = f"{100 * difference.value:+.2f} points ({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"
    lines = [
        f"First minus second: {points}, 95 % interval",
        f"McNemar's exact test: p = {result.p_value:.3g}",
        f"Same class predicted: {result.same_prediction:,} of {result.counts.total:,}",
    ]
    if result.left_out:
        lines.append(f"Left out, in one run only: {len(result.left_out):,}")
    return Group(table, Text("\n".join(lines)))


def models_report() -> RenderableType:
    """The named models with their sizes, and the attention back end of each device."""
    table = _table("name", "width", "depth", "heads", "patch", "tokens per clip")
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


def _table(*columns: str, left: tuple[str, ...] = (), **options: Any) -> Table:
    """Columns are aligned right, apart from those named as `left`: the first one if none is named."""
    table = Table(caption_justify="left", title_justify="left", **options)
    for column in columns:
        at_left = column in (left or columns[:1])
        table.add_column(column, justify="left" if at_left else "right", overflow="fold")
    return table


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
    settings, clip, clips = result.settings, result.settings.clip, result.num_clips
    pace = f"stride {clip.frame_stride}" if clip.fps is None else f"{clip.fps:g} a second"
    name = result.videos[0].source if len(result.videos) == 1 else f"{len(result.videos)} videos"
    return (
        f"{name}: {clips} clip{'s'[: clips != 1]} of {clip.num_frames} frames ({pace}) at {format_size(clip.size)}, "
        f"{size_name(result.network) or 'a network of its own size'}, {rule_line(settings.rule)}"
    )


def _stage_table(result: Comparison) -> Table:
    table = _table("", "dense", "RLT", "speed-up", caption=_median_of(result))
    dense, kept = result.total_tokens("dense"), result.total_tokens("rlt")
    table.add_row("tokens", f"{dense:,}", f"{kept:,} ({result.tokens_kept:.1%})", "")
    decode = format_seconds(result.seconds("decode").median)
    table.add_row("decode", decode, decode, "")
    for name, seconds, speedup in (
        ("tokenize", lambda arm: result.seconds(f"tokenize_{arm}"), ""),
        ("forward", lambda arm: result.seconds(f"forward_{arm}"), f"{result.speedup_forward:.2f}x"),
        ("end to end", result.end_to_end, f"{result.speedup_end_to_end:.2f}x"),
    ):
        table.add_row(name, *(format_seconds(seconds(arm).median) for arm in ARMS), speedup)
    flops = (f"{result.total_flops(arm) / 1e9:,.1f} G" for arm in ARMS)
    table.add_row("FLOPs of forward", *flops, f"{result.speedup_flops:.2f}x fewer")
    return table


def _median_of(result: Comparison) -> str:
    return "one run" if result.repeats == 1 else f"median of {result.repeats} runs"


def _arms_table(result: Comparison) -> Table:
    """A row for each arm, where there are more than dense and RLT."""
    table = _table(
        "",
        "frames",
        "tokens",
        "FLOPs",
        "forward",
        "end to end",
        "same top-1",
        caption=_median_of(result),
    )
    for name, arm in result.settings.arms.items():
        forward, whole = result.seconds(f"forward_{name}"), result.end_to_end(name)
        speedups = result.seconds("forward_dense").over(forward), result.end_to_end("dense").over(whole)
        times = [
            f"{format_seconds(time.median)} ({x:.2f}x)" for time, x in zip((forward, whole), speedups, strict=True)
        ]
        same = f"{round(result.agreement(name) * result.num_clips)} of {result.num_clips}"
        table.add_row(
            "dense" if name == "dense" else "RLT",
            str(arm.clip.num_frames),
            f"{result.total_tokens(name):,}",
            f"{result.total_flops(name) / 1e9:,.1f} G",
            *times,
            "" if name == "dense" else same,
        )
    return table


def _top_table(result: Comparison, video: VideoComparison, clip: int) -> Table:
    table = _table("dense", "", "RLT", "", left=("dense", "RLT"))
    for pair in zip(video.top("dense")[clip], video.top("rlt")[clip], strict=True):
        named = ((result.label(index) or f"class {index}", f"{value:.1%}") for index, value in pair)
        table.add_row(*(cell for name, share in named for cell in (Text(name), share)))
    return table


def _video_table(result: Comparison) -> Table:
    """What each video saves, the one that saves most first."""
    folder = os.path.commonpath([Path(video.source).absolute().parent for video in result.videos])
    caption = f"videos in {folder}, most saved first"
    table = _table("video", "tokens kept", "FLOPs saved", "forward", "same top-1", "cosine", caption=caption)
    for video in sorted(result.videos, key=lambda video: video.tokens_kept):
        name = str(Path(video.source).absolute().relative_to(folder))
        cosine = sum(video.feature_cosine) / video.num_clips
        same = f"{sum(video.same_top1)} of {video.num_clips}"
        saved, faster = f"{video.flops_saved:.1%}", f"{video.speedup_forward:.2f}x"
        table.add_row(Text(name), f"{video.tokens_kept:.1%}", saved, faster, same, f"{cosine:.4f}")
    return table


def _machine_line(device: str) -> str:
    info = machine_info(device)
    where = "" if info["device"] == "cpu" else f", {info['device']} (driver {info['driver']})"
    return f"{info['processor']}, {info['cores']} cores{where}, torch {info['torch']}"


def _numbers(result: EvaluationResult) -> Table:
    table = _table("", " ", show_header=False)
    table.add_row("top-1 (95 % interval)", _percent(result.top1_interval))
    table.add_row(f"top-{result.top_k} (95 % interval)", _percent(result.top5_interval))
    table.add_row("mean over classes", f"{result.mean_class_accuracy:.1%}")
    table.add_row("tokens kept (± standard deviation)", f"{result.tokens_kept:.1%} ± {result.tokens_kept_spread:.1%}")
    table.add_row("clips a second, forward", f"{result.clips_per_second:.3g}")
    table.add_row("clips a second, end to end", f"{result.clips_per_second_end_to_end:.3g}")
    share = result.flops / result.flops_dense
    table.add_row("GFLOPs a clip", f"{result.flops / result.num_clips / 1e9:,.3g} ({share:.1%} of dense)")
    if result.peak_memory is not None:
        table.add_row(f"peak memory ({result.peak_memory.meaning})", f"{result.peak_memory.bytes / 2**20:,.0f} MiB")
    return table


def _worst_classes(result: EvaluationResult) -> Table:
    rows = [(row[label_id] / sum(row), sum(row), label_id) for label_id, row in enumerate(result.confusion) if sum(row)]
    title = "classes" if len(rows) <= _MAX_CLASSES else f"the {_MAX_CLASSES} least accurate of {len(rows)} classes"
    columns = ("class", "videos", "top-1", "most often taken for")
    table = _table(*columns, left=(columns[0], columns[-1]), title=title)
    for accuracy, videos, label_id in sorted(rows)[:_MAX_CLASSES]:
        wrong = [0 if other == label_id else count for other, count in enumerate(result.confusion[label_id])]
        taken_for = f"{result.class_names[wrong.index(max(wrong))]} ({max(wrong)})" if any(wrong) else ""
        table.add_row(Text(result.class_names[label_id]), str(videos), f"{accuracy:.1%}", Text(taken_for))
    return table


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"

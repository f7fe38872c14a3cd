"""How an evaluation and a paired comparison look in a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rlt.evaluation.comparison import PairedComparison
from rlt.evaluation.results import EvaluationResult
from rlt.evaluation.statistics import Interval
from rlt.tokens import Everything, rule_name

_MAX_CLASSES = 10
_MAX_FAILED = 10


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


def comparison_report(result: PairedComparison) -> RenderableType:
    """Two runs side by side, the difference, and whether chance alone could make it."""
    table = Table(caption=f"{result.counts.total:,} videos in both runs", caption_justify="left")
    for column in ("", "first", "second"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
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


def _numbers(result: EvaluationResult) -> Table:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
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
    table = Table(title=title, title_justify="left")
    for column in ("class", "videos", "top-1", "most often taken for"):
        table.add_column(column, justify="right" if column in ("videos", "top-1") else "left", overflow="fold")
    for accuracy, videos, label_id in sorted(rows)[:_MAX_CLASSES]:
        wrong = [0 if other == label_id else count for other, count in enumerate(result.confusion[label_id])]
        taken_for = f"{result.class_names[wrong.index(max(wrong))]} ({max(wrong)})" if any(wrong) else ""
        table.add_row(Text(result.class_names[label_id]), str(videos), f"{accuracy:.1%}", Text(taken_for))
    return table


def _percent(interval: Interval) -> str:
    return f"{interval.value:.1%} ({interval.low:.1%} to {interval.high:.1%})"

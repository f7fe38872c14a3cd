"""What is kept against the threshold, as a picture."""

from __future__ import annotations

from pathlib import Path

from rlt.calibrate.results import Calibration
from rlt.files import replacing
from rlt.plots import KEPT, MARK, QUIET_INK, new_figure, save_figure, style_chart


def write_calibration_plot(result: Calibration, path: str | Path) -> None:
    """Write a PNG: the share that is kept against the threshold, and how often the class differs if that was measured.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    steps = [step for step in result.curve if step.threshold > 0]
    xs = [step.threshold for step in steps]
    for intervals, colour, name in (
        ([step.tokens_kept for step in steps], KEPT, "tokens kept"),
        ([step.disagreement for step in steps if step.disagreement is not None], QUIET_INK, "other class than dense"),
    ):
        if intervals:
            axes.plot(xs, [interval.value for interval in intervals], color=colour, linewidth=1.6, label=name)
            ends = [interval.low for interval in intervals], [interval.high for interval in intervals]
            axes.fill_between(xs, *ends, color=colour, alpha=0.15, linewidth=0)
    found = result.found
    axes.plot([found.threshold], [found.tokens_kept.value], "o", color=MARK, label=f"threshold {found.threshold:g}")
    for value in result.asked.values():
        axes.axhline(value, color=MARK, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("threshold")
    axes.set_title("share of tokens or clips, with 95 % intervals over videos", fontsize=10, loc="left")
    style_chart(axes)
    axes.legend(frameon=False, fontsize=8)
    with replacing(path) as temporary:
        save_figure(figure, temporary)

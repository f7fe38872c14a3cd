"""Two pictures of an evaluation: which classes are taken for which, and how many tokens the clips keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlt.evaluation.results import HISTOGRAM_BINS, EvaluationResult
from rlt.files import replacing_all
from rlt.plots import INK, KEPT, MARK, QUIET_INK, add_colour_bar, new_figure, save_figure, style_chart
from rlt.tokens import rule_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_NAMED_CLASSES = 40  # names of more classes cannot be read
_MAX_NUMBERED_CLASSES = 15  # counts in more cells cannot be read
_MAX_NAME = 28  # letters


def write_pictures(result: EvaluationResult, folder: str | Path) -> tuple[Path, Path]:
    """Write confusion.png and tokens.png into a folder, which is made where it does not exist.

    Raises:
        InvalidArgumentError: if they cannot be written.
        MissingDependencyError: if matplotlib is not installed.
    """
    confusion, tokens = "confusion.png", "tokens.png"
    figures = {confusion: draw_confusion(result), tokens: draw_tokens(result)}
    with replacing_all(folder, (confusion, tokens)) as staging:
        for name, figure in figures.items():
            save_figure(figure, staging / name)
    return Path(folder) / confusion, Path(folder) / tokens


def draw_confusion(result: EvaluationResult) -> Figure:
    """The confusion matrix; colour is the share of the videos of a class, so that rows of any size compare."""
    counts = np.array(result.confusion)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(100 * counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    classes = len(counts)
    side = float(np.clip(0.32 * classes, 4.2, 12))
    figure = new_figure(side + 2.4, side + 1.2)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set_xlabel("predicted class", color=QUIET_INK)
    axes.set_ylabel("class of the video", color=QUIET_INK)
    title = f"Top-1 {result.top1:.1%} of {result.num_videos:,} videos, tokenizer {rule_name(result.settings.rule)}"
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.tick_params(colors=QUIET_INK, length=0)
    if classes <= _MAX_NAMED_CLASSES:
        names = [_short(name) for name in result.class_names]
        axes.set_xticks(range(classes), names, rotation=90 if classes > 3 else 0, parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
    if classes <= _MAX_NUMBERED_CLASSES:
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 55 else INK
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour, fontsize=9)
    add_colour_bar(figure, axes, picture, "% of the videos of the class")
    return figure


def draw_tokens(result: EvaluationResult) -> Figure:
    """Histogram of the share of tokens that the clips keep, with its mean."""
    figure = new_figure(7.6, 3.4)
    axes = figure.subplots()
    style_chart(axes)
    width = 100 / HISTOGRAM_BINS
    edges = [width * index for index in range(HISTOGRAM_BINS)]
    axes.bar(edges, result.tokens_histogram, width=width, align="edge", color=KEPT, edgecolor="white")
    mean, spread = 100 * result.tokens_kept, 100 * result.tokens_kept_spread
    axes.axvline(mean, color=MARK, linewidth=1.4, label=f"mean {mean:.1f} %, standard deviation {spread:.1f} %")
    axes.set_xlim(0, 100)
    axes.set_xlabel("tokens of a clip that enter the network (%)")
    axes.set_ylabel("clips")
    axes.locator_params(axis="y", integer=True)
    figure.legend(loc="outside upper left", frameon=False, labelcolor=INK, fontsize=9)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"

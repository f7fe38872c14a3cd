"""The three charts: run lengths over the picture, tokens kept over time, tokens kept against the threshold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlt.inspection.scan import ScanResult
from rlt.inspection.views import ClipView
from rlt.plots import new_figure
from rlt.structures import IMAGENET_STD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY_LEVELS_PER_UNIT = 255 * len(IMAGENET_STD) / sum(1 / std for std in IMAGENET_STD)
"""A change of brightness by this many grey levels (of 255) in all channels is 1 in units of the threshold."""

_INK, _QUIET_INK, _RULE = "#1f2328", "#59636e", "#d8dee4"
_KEPT, _MARK = "#0072b2", "#d55e00"  # Okabe and Ito: told apart with any colour vision
_RUN_COLOURS = "viridis"
_MAX_DETAILED_CLIPS = 40  # with more, one point per time step is a smear


def draw_run_lengths(view: ClipView, scan: ScanResult) -> Figure:
    """Map of how long a token stands on average at each place, beside a frame that shows what is there."""
    height, width = view.frames.shape[1:3]
    panel = 4.4 * min(width / height, 1.6)
    figure = new_figure(2 * panel + 1.3, panel * height / width + 0.75)
    picture, heat = figure.subplots(1, 2)
    middle = view.frames[len(view.frames) // 2]
    picture.imshow(middle.numpy())
    picture.set_title(f"The video at {view.times[len(view.frames) // 2]:.1f} s", **_TITLE)
    # Pale, so that colours keep their meaning while shapes still show through.
    heat.imshow(middle.double().mean(-1).numpy(), cmap="gray", vmin=-200, vmax=255)
    seconds = scan.run_lengths * scan.seconds_per_step
    longest = scan.grid.time * scan.seconds_per_step
    overlaid = heat.imshow(
        _per_pixel(seconds, height, width).numpy(),
        cmap=_RUN_COLOURS,
        alpha=0.72,
        vmin=scan.seconds_per_step,
        vmax=max(longest, 2 * scan.seconds_per_step),  # a clip of one step has no range
    )
    heat.set_title("How long a token stands: mean over all clips", **_TITLE)
    for axes in (picture, heat):
        axes.set_axis_off()
    bar = figure.colorbar(overlaid, ax=heat, fraction=0.05, pad=0.02)
    if bar.solids is not None:
        bar.solids.set_alpha(1)
    bar.set_label(f"mean run length in seconds (a clip lasts {longest:.2f} s)", color=_QUIET_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=_QUIET_INK, length=3)
    return figure


def draw_tokens_over_time(scan: ScanResult) -> Figure:
    """Share of tokens kept by each clip along the video, and in each time step where that can still be read."""
    figure = new_figure(9.6, 3.5)
    axes = figure.subplots()
    _style(axes)
    ends = [clip.times[-1] + scan.seconds_per_step for clip in scan.clips]
    detailed = len(scan.clips) <= _MAX_DETAILED_CLIPS
    for number, (clip, end) in enumerate(zip(scan.clips, ends, strict=True)):
        first = number == 0
        share = 100 * clip.tokens_kept
        edges = [clip.start, max(end, clip.start + 1e-3)]
        axes.fill_between(edges, share, color=_KEPT, alpha=0.22 if detailed else 0.5, linewidth=0)
        axes.plot(
            edges, [share, share], color=_KEPT, linewidth=2, solid_capstyle="butt", label="per clip" if first else None
        )
        if detailed:
            centres = [time + scan.seconds_per_step / 2 for time in clip.times]
            shares = [100 * value for value in clip.shares]
            axes.plot(
                centres[1:],
                shares[1:],
                "o-",
                color=_KEPT,
                markersize=3.2,
                linewidth=0.8,
                alpha=0.75,
                clip_on=False,
                label="per time step" if first else None,
            )
            axes.plot(
                centres[:1],
                shares[:1],
                "o",
                color="white",
                markeredgecolor=_KEPT,
                markersize=4,
                clip_on=False,
                zorder=3,
                label="first step of a clip, always kept" if first else None,
            )
    mean = 100 * scan.tokens_kept
    axes.axhline(100, color=_QUIET_INK, linewidth=1, linestyle=(0, (4, 3)), label="dense: every token")
    axes.axhline(mean, color=_MARK, linewidth=1.4, label=f"mean: {mean:.1f} %")
    axes.set_xlim(scan.clips[0].start, max(max(ends), scan.clips[0].start + 1e-3))
    axes.set_ylim(0, 105)
    axes.set_xlabel("time in the video (s)")
    axes.set_ylabel("tokens kept (%)")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, labelcolor=_INK, fontsize=9)
    return figure


def draw_tokens_against_threshold(scan: ScanResult, threshold: float) -> Figure:
    """Share of tokens kept at every threshold, the chosen one marked, grey levels on a second axis."""
    figure = new_figure(9.6, 3.9)
    axes = figure.subplots()
    _style(axes)
    kept = 100 * scan.tokens_kept
    axes.plot(scan.thresholds, [100 * share for share in scan.curve], color=_KEPT, linewidth=2.2)
    axes.plot([threshold, threshold, 0], [0, kept, kept], color=_MARK, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.plot([threshold], [kept], "o", color=_MARK, markersize=7)
    end = scan.thresholds[-1]
    beyond, high = threshold > 0.6 * end, kept > 93
    axes.annotate(
        f"threshold {threshold:g} keeps {kept:.1f} %",
        (threshold, kept),
        xytext=(-10 if beyond else 10, -18 if high else 8),
        textcoords="offset points",
        ha="right" if beyond else "left",
        color=_INK,
        fontweight="bold",
    )
    axes.axhline(100 / scan.grid.time, color=_QUIET_INK, linewidth=1, linestyle=(0, (1, 2)))
    axes.annotate(
        "first step of each clip: always kept",
        (end, 100 / scan.grid.time),
        xytext=(-4, -11),
        textcoords="offset points",
        ha="right",
        color=_QUIET_INK,
        fontsize=9,
    )
    axes.set_xlim(0, end)
    axes.set_ylim(0, 105)
    axes.set_xlabel("threshold (mean absolute difference of the normalised clip)")
    axes.set_ylabel("tokens kept (%)")
    grey = axes.twiny()
    _style(grey)
    grey.set_xlim(0, end * GREY_LEVELS_PER_UNIT)
    grey.set_xlabel("the same in grey levels of 255", color=_QUIET_INK)
    for name, spine in grey.spines.items():
        spine.set_visible(name == "top")
    grey.spines["top"].set_color(_RULE)
    return figure


_TITLE = {"fontsize": 11, "color": _INK, "loc": "left"}


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color=_RULE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_RULE)
    axes.tick_params(colors=_QUIET_INK, length=3)
    axes.xaxis.label.set_color(_QUIET_INK)
    axes.yaxis.label.set_color(_QUIET_INK)


def _per_pixel(values: Tensor, height: int, width: int) -> Tensor:
    """float64 [H', W'] -> [H, W]: the value of each place on all of its pixels."""
    rows, columns = values.shape
    return torch.repeat_interleave(values, height // rows, 0).repeat_interleave(width // columns, 1)

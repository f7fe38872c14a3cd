"""The four pictures: one clip step by step, run lengths on the picture, tokens over time and by threshold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlt.inspection.report import AGAINST_THRESHOLD, CONTACT_SHEET, OVER_TIME, RUN_LENGTHS
from rlt.inspection.scan import ScanResult
from rlt.inspection.views import ClipView, per_pixel
from rlt.plots import INK, KEPT, MARK, PIXELS_PER_INCH, QUIET_INK, RULE, add_colour_bar, new_figure, style_chart
from rlt.structures import IMAGENET_STD
from rlt.tokens import Rule, Threshold, rule_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY_LEVELS_PER_UNIT = 255 * len(IMAGENET_STD) / sum(1 / std for std in IMAGENET_STD)
"""A change of brightness by this many grey levels (of 255) in all channels is 1 in units of the threshold."""
GAP, CAPTION_HEIGHT = 12, 34
"""Pixels of the contact sheet: between frames and around them, and below each frame."""

_COLUMNS = 4  # frames of the contact sheet side by side
_MAX_STEPS = 16  # more time steps than this are thinned out evenly
_CAPTION: dict[str, Any] = {"fontsize": 17 * 72 / PIXELS_PER_INCH, "va": "top"}  # 17 pixels high
_MAX_DETAILED_CLIPS = 40  # with more, one point per time step is a smear
_TITLE: dict[str, Any] = {"fontsize": 11, "color": INK, "loc": "left"}
_DASHED, _DOTTED = (0, (4, 3)), (0, (1, 2))


def draw_pictures(view: ClipView, scan: ScanResult, rule: Rule) -> Iterator[tuple[str, Figure]]:
    """All four, each with the name of its file: one clip as it is shown, and the numbers of all clips."""
    yield CONTACT_SHEET, draw_contact_sheet(view)
    yield RUN_LENGTHS, draw_run_lengths(view, scan)
    yield OVER_TIME, draw_tokens_over_time(scan)
    yield AGAINST_THRESHOLD, draw_tokens_against_threshold(scan, rule)


def shown_steps(num_steps: int) -> list[int]:
    """Which time steps the sheet shows: all of them, or 16 that are spread evenly."""
    shown = min(num_steps, _MAX_STEPS)
    return [index * (num_steps - 1) // max(shown - 1, 1) for index in range(shown)]


def draw_contact_sheet(view: ClipView) -> Figure:
    """The last frame of each time step, pixel for pixel, dropped patches dimmed, with time and share kept below."""
    steps = shown_steps(view.num_steps)
    height, width = view.frames.shape[1:3]
    columns, rows = min(_COLUMNS, len(steps)), -(-len(steps) // _COLUMNS)
    sheet_width, sheet_height = GAP + columns * (width + GAP), GAP + rows * (height + CAPTION_HEIGHT + GAP)
    figure = new_figure(sheet_width / PIXELS_PER_INCH, sheet_height / PIXELS_PER_INCH)
    figure.set_layout_engine("none")  # there is nothing to lay out
    shares = view.mask.flatten(1).double().mean(1).tolist()
    for index, step in enumerate(steps):
        row, column = divmod(index, columns)
        left = GAP + column * (width + GAP)
        bottom = sheet_height - row * (height + CAPTION_HEIGHT + GAP) - GAP - height
        frame = min((step + 1) * view.tubelet_size, len(view.frames)) - 1
        figure.figimage(view.dimmed(frame).numpy(), left, bottom, origin="upper")
        below = (bottom - 10) / sheet_height
        figure.text(left / sheet_width, below, f"{view.times[frame]:.2f} s", color=QUIET_INK, **_CAPTION)
        kept = f"{shares[step]:.0%} kept"
        right = (left + width) / sheet_width
        figure.text(right, below, kept, color=INK, ha="right", fontweight="bold", **_CAPTION)
    return figure


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
    longest = scan.grid.time * scan.seconds_per_step
    overlaid = heat.imshow(
        per_pixel(scan.run_lengths * scan.seconds_per_step, middle).numpy(),
        cmap="viridis",
        alpha=0.72,
        vmin=scan.seconds_per_step,
        vmax=max(longest, 2 * scan.seconds_per_step),  # a clip of one step has no range
    )
    heat.set_title("How long a token stands: mean over all clips", **_TITLE)
    for axes in (picture, heat):
        axes.set_axis_off()
    add_colour_bar(figure, heat, overlaid, f"mean run length in seconds (a clip lasts {longest:.2f} s)")
    return figure


def draw_tokens_over_time(scan: ScanResult) -> Figure:
    """Share of tokens kept by each clip along the video, and in each time step where that can still be read."""
    figure = new_figure(9.6, 3.5)
    axes = figure.subplots()
    style_chart(axes)
    detailed = len(scan.clips) <= _MAX_DETAILED_CLIPS
    steps: dict[str, Any] = {"linewidth": 0.8, "color": KEPT, "alpha": 0.75, "markersize": 3.2, "clip_on": False}
    firsts = {**steps, "linewidth": 0, "color": "white", "alpha": 1, "markersize": 4, "markeredgecolor": KEPT}
    names = ["per clip", "per time step", "first step of a clip, always kept"]
    end = start = scan.clips[0].start
    for clip in scan.clips:
        edges = [clip.start, max(clip.times[-1] + scan.seconds_per_step, clip.start + 1e-3)]
        end = max(end, edges[1])
        share = 100 * clip.tokens_kept
        axes.fill_between(edges, share, color=KEPT, alpha=0.22 if detailed else 0.5, linewidth=0)
        axes.plot(edges, [share, share], color=KEPT, linewidth=2, solid_capstyle="butt", label=names[0])
        if detailed:
            centres = [time + scan.seconds_per_step / 2 for time in clip.times]
            shares = [100 * value for value in clip.shares]
            axes.plot(centres[1:], shares[1:], "o-", label=names[1], **steps)
            axes.plot(centres[:1], shares[:1], "o", label=names[2], zorder=3, **firsts)
        names = ["", "", ""]  # one entry of the legend for all clips
    axes.axhline(100, color=QUIET_INK, linewidth=1, linestyle=_DASHED, label="dense: every token")
    mean = 100 * scan.tokens_kept
    axes.axhline(mean, color=MARK, linewidth=1.4, label=f"mean: {mean:.1f} %")
    axes.set_xlim(start, end)
    axes.set_ylim(0, 105)
    axes.set_xlabel("time in the video (s)")
    axes.set_ylabel("tokens kept (%)")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, labelcolor=INK, fontsize=9)
    return figure


def draw_tokens_against_threshold(scan: ScanResult, rule: Rule) -> Figure:
    """Share of tokens kept at every threshold, what was chosen marked, grey levels on a second axis."""
    figure = new_figure(9.6, 3.9)
    axes = figure.subplots()
    style_chart(axes)
    kept, end, always = 100 * scan.tokens_kept, scan.thresholds[-1], 100 / scan.grid.time
    axes.plot(scan.thresholds, [100 * share for share in scan.curve], color=KEPT, linewidth=2.2)
    if isinstance(rule, Threshold):
        threshold, name = rule.threshold, f"threshold {rule.threshold:g}"
        axes.plot([threshold, threshold, 0], [0, kept, kept], color=MARK, linewidth=1.1, linestyle=_DASHED)
        axes.plot([threshold], [kept], "o", color=MARK, markersize=7)
    else:  # it may keep other tokens than any threshold does: a height of the chart and no point of the curve
        threshold, name = end / 2, rule_line(rule)
        axes.axhline(kept, color=MARK, linewidth=1.1, linestyle=_DASHED)
    beyond, high = threshold > 0.6 * end, kept > 93
    axes.annotate(
        f"{name} keeps {kept:.1f} %",
        (threshold, kept),
        xytext=(-10 if beyond else 10, -18 if high else 8),
        textcoords="offset points",
        ha="right" if beyond else "left",
        color=INK,
        fontweight="bold",
    )
    axes.axhline(always, color=QUIET_INK, linewidth=1, linestyle=_DOTTED)
    note = "first step of each clip: always kept"
    offset: dict[str, Any] = {"xytext": (-4, -11), "textcoords": "offset points"}
    axes.annotate(note, (end, always), ha="right", color=QUIET_INK, fontsize=9, **offset)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 105)
    axes.set_xlabel("threshold (mean absolute difference of the normalised clip)")
    axes.set_ylabel("tokens kept (%)")
    grey = axes.twiny()
    grey.set_xlim(0, end * GREY_LEVELS_PER_UNIT)
    grey.set_xlabel("the same in grey levels of 255", color=QUIET_INK)
    grey.tick_params(colors=QUIET_INK, length=3)
    for name, spine in grey.spines.items():
        spine.set_visible(name == "top")
        spine.set_color(RULE)
    return figure

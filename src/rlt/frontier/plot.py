"""The frontier as a picture: fidelity against the share of tokens, a line for each family of arms."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from rlt.files import replacing
from rlt.frontier.arms import BASELINES
from rlt.frontier.results import FrontierResult, Point
from rlt.plots import new_figure, save_figure, style_chart

_COLOURS = {
    "paper": "#d55e00", "aware": "#0072b2", "pooling": "#7ab8e0", "pooling+position": "#3b91c9", "anchor": "#009e73",
    "gain": "#cc79a7", "anchor+gain": "#6a3d9a", "motion": "#b15928", "anchor+motion": "#8c564b",
}  # fmt: skip
_GREYS = ("#1f2328", "#59636e", "#8c959f", "#afb8c1", "#e69f00")


def write_frontier_plot(result: FrontierResult, path: str | Path) -> None:
    """Write a PNG with KL divergence and top-1 agreement side by side, baselines dashed.

    Raises:
        MissingDependencyError: without matplotlib.
    """
    lines: dict[str, list[Point]] = defaultdict(list)
    for point in result.points:
        lines[point.arm.family].append(point)
    colours = _COLOURS | dict(zip(BASELINES, _GREYS, strict=True))
    figure = new_figure(10, 4.6)
    for axes, column, title in zip(
        figure.subplots(1, 2), ("kl", "agrees"), ("KL to dense, nats", "top-1 agreement with dense"), strict=True
    ):
        for family, points in lines.items():
            ordered = sorted(points, key=lambda point: point.means["flops_share"])
            xs, ys = ([point.means[name] for point in ordered] for name in ("flops_share", column))
            style = "--" if family in BASELINES else "-"
            axes.plot(xs, ys, style, color=colours[family], marker="o", markersize=3.5, linewidth=1.4, label=family)
        style_chart(axes)
        axes.set_xlabel("share of the dense network's FLOPs")
        axes.set_title(title, fontsize=10, loc="left")
    figure.axes[0].set_yscale("log")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    with replacing(path) as temporary:
        save_figure(figure, temporary)

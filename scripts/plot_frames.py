"""Draw docs/images/frames.png: time and memory of the forward pass against the number of frames, log-log.

Reads docs/results/frames.json, which `rlt benchmark frames` leaves behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from markdown_tables import ROOT, load

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # the back end must be chosen before

TARGET = ROOT / "docs" / "images" / "frames.png"
PANELS = (
    ("time of a forward pass in seconds", lambda arm, _: arm["seconds_median"]),
    ("peak memory in MiB", lambda arm, _: arm["peak_memory_bytes"] / 2**20),
    ("tokens", lambda arm, tokens_per_frame: arm["tokens_kept"] * arm["frames"] * tokens_per_frame),
)


def main(target: Path = TARGET) -> None:
    """One panel each for time, memory and tokens; one line per video and arm."""
    result = load("frames")
    tokens_per_frame = (result["settings"]["size"] // 16) ** 2 / 2
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 4), layout="constrained")
    for panel, (label, value) in zip(panels, PANELS, strict=True):
        for name, arms in _lines(result["arms"]).items():
            style = "--" if name.endswith("dense") else "-"
            frames = [arm["frames"] for arm in arms]
            panel.plot(frames, [value(arm, tokens_per_frame) for arm in arms], style, marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="frames", ylabel=label)
        panel.set_xticks(frames, [str(count) for count in frames])
        panel.minorticks_off()
        panel.grid(visible=True, which="major", alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(target, dpi=110)


def _lines(arms: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Arms of one line each, by label; dense costs the same for every video, so that one line stands for all."""
    videos = list(dict.fromkeys(arm["video"] for arm in arms if arm["video"] != "all"))
    lines = {"dense": [arm for arm in arms if arm["name"] == "dense" and arm["video"] == videos[0]]}
    for video in videos:
        lines[f"RLT, {video}"] = [arm for arm in arms if arm["name"] == "rlt" and arm["video"] == video]
    return lines


if __name__ == "__main__":
    main()

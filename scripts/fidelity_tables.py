"""The tables of docs/fidelity.md, from what `rlt frontier` left in docs/results."""

from __future__ import annotations

from typing import Any

from markdown_tables import RESULTS, load, machine, table

_SHOWN_AT = (0.1, 0.4)
"""Thresholds of the short tables; the long ones have all."""


def frontier_sets() -> list[tuple[str, dict[str, Any]]]:
    """Name of each data set and its numbers."""
    return [(path.stem.removeprefix("frontier-"), load(path.stem)) for path in sorted(RESULTS.glob("frontier-*.json"))]


def cost_table() -> str:
    """What the front page says: what the paper's way and counting run lengths cost in agreement."""
    rows = [("", "tokens kept", "FLOPs of dense", "same top-1 as dense", "KL to dense")]
    for name, content in frontier_sets():
        for level in _SHOWN_AT:
            for arm, words in (("paper", "as in the paper"), ("aware", "run lengths count")):
                point = _point(content, arm, level)
                rows.append((f"{name}, threshold {level}, {words}", *_numbers(point)[:4]))
    return table(rows)


def fidelity_tables() -> str:
    """Every arm at every level, a table for each data set."""
    parts = []
    for name, content in frontier_sets():
        clips = content["views_per_video"]
        rows = [("arm", "tokens kept", "FLOPs of dense", "same top-1", "KL to dense", "cosine", "accuracy")]
        for point in content["points"]:
            kept = f"{point['kl']:.5f}"
            level = _level(point)
            rows.append((f"{level}: {point['arm']}", *_numbers(point)[:3], kept, f"{point['feature_cosine']:.4f}",
                         f"{point['accuracy']:.1%}"))  # fmt: skip
        parts.append(
            f"### {name}\n\n{content['videos']} videos, {clips} clips each; the dense network is right in "
            f"{content['dense_accuracy']:.1%} of the clips. {machine(content)}.\n\n{table(rows)}"
        )
    return "\n".join(parts)


def paired_tables() -> str:
    """What the recommended settings gain on every other arm at the same level, video by video."""
    parts = []
    for name, content in frontier_sets():
        rows = [("", "minus", "same top-1, points", "KL")]
        for row in content["differences"]:
            kind, value = row["level"]
            low, high = (100 * end for end in row["top1_agreement_interval"])
            least, most = row["kl_interval"]
            rows.append(
                (
                    f"{kind} {value:g}: {row['arm']}",
                    row["minus"],
                    f"{100 * row['top1_agreement']:+.1f} ({low:+.1f} to {high:+.1f})",
                    f"{row['kl']:+.5f} ({least:+.5f} to {most:+.5f}){'' if least <= 0 <= most else ' *'}",
                )
            )
        parts.append(f"### {name}, paired\n\n{table(rows)}")
    return "\n".join(parts)


def motion_tables() -> str:
    """The same by how much moves."""
    rows = [("data set, videos", "arm", "tokens kept", "same top-1", "KL to dense")]
    for name, content in frontier_sets():
        for group, members in content["by_motion"].items():
            for arm in ("paper", "aware", "anchor", "random with runs", "fewer frames with runs"):
                point = next(p for p in members["points"] if p["arm"] == arm and p["options"].get("threshold") == 0.1)
                kept, _, agreement, kl = _numbers(point)
                rows.append((f"{name}, {group}", arm, kept, agreement, kl))
    return table(rows)


def _point(content: dict[str, Any], arm: str, threshold: float) -> dict[str, Any]:
    found: dict[str, Any] = next(
        point for point in content["points"] if point["arm"] == arm and point["options"].get("threshold") == threshold
    )
    return found


def _level(point: dict[str, Any]) -> str:
    options = point["options"]
    name = next(name for name in ("threshold", "keep_ratio") if options.get(name) is not None)
    return f"{name} {options[name]:g}"


def _numbers(point: dict[str, Any]) -> tuple[str, str, str, str]:
    low, high = point["agreement_interval"]
    return (
        f"{point['tokens_kept']:.1%}",
        f"{point['flops_share']:.1%}",
        f"{point['top1_agreement']:.1%} ({low:.1%} to {high:.1%})",
        f"{point['kl']:.5f}",
    )

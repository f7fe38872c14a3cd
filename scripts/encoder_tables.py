"""The table of docs/adapters.md on how far features of patched image encoders are off."""

from __future__ import annotations

from markdown_tables import load, machine, table

_SHOWN_AT = (0.1, 0.4)
"""Thresholds at which all ways are shown; the plain one is at every threshold."""


def encoder_table() -> str:
    """Every way of patching at every threshold, a table for each set of videos."""
    result = load("encoder-accuracy")
    encoder, training = result["encoder"], result["training"]
    weights, losses = f"{encoder['parameters'] / 1e6:.1f} million weights", training["losses"]
    pictures, machine_words = 2 * training["pairs"], machine(result)
    parts = [
        f"A SigLIP tower of {weights} ({encoder['depth']} layers of width {encoder['width']}, patches of "
        f"{encoder['patch_size']} at {encoder['image_size']} px), trained here on frames of {training['videos']} "
        f"videos for {training['steps']} steps of {pictures} pictures to tell moments of videos apart (loss "
        f"{losses[0]:.2f} to {losses[-1]:.2f}; {machine_words}). It is small and has seen little: of a large one the "
        "figures say the order of the rows, not more.\n\nEach frame's features are held to those of the unpatched "
        f"encoder, on {result['frames']} frames at stride {result['frame_stride']} of videos that it was not trained "
        "on: their cosine (mean, and that of the worst twentieth); how often the unpatched frame itself comes first "
        "among all unpatched frames of the set, and its mean rank; and the share of the ten frames of other videos "
        "most like it that the unpatched encoder finds, too.\n"
    ]
    for name in dict.fromkeys(point["data"] for point in result["points"]):
        points = [point for point in result["points"] if point["data"] == name]
        other = next(point for point in points if point["arm"] == "another video")
        rows: list[tuple[str, ...]] = [
            ("", "tokens kept", "cosine", "worst 5%", "cosine of patches", "itself first", "its rank", "neighbours")
        ]
        rows += [
            (
                f"{point['threshold']:g}: {point['arm']}",
                f"{point['tokens_kept']:.1%}",
                f"{point['cosine']:.4f}",
                f"{point['cosine_lowest_5_percent']:.4f}",
                f"{point['patch_cosine']:.4f}",
                f"{point['own_frame_first']:.1%}",
                f"{point['own_frame_rank']:.2f}",
                f"{point['shared_neighbours']:.1%}",
            )
            for point in points
            if point is not other and (point["arm"] == "paper" or point["threshold"] in _SHOWN_AT)
        ]
        parts.append(
            f"**{name}**: {other['videos']} videos; frames of two different ones have a cosine of "
            f"{other['cosine']:.2f} on average.\n\n{table(rows)}"
        )
    return "\n".join(parts)

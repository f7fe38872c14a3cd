"""The table of docs/adapters.md on how far features of patched image encoders are off."""

from __future__ import annotations

from markdown_tables import load, machine, table


def encoder_table() -> str:
    """Every way of patching at every threshold, a table for each set of videos."""
    result = load("encoder-accuracy")
    encoder, training = result["encoder"], result["training"]
    parts = [
        f"A SigLIP tower of {encoder['parameters'] / 1e6:.1f} million weights ({encoder['depth']} layers of width "
        f"{encoder['width']}, patches of {encoder['patch_size']} at {encoder['image_size']} px), trained here on frames of "
        f"{training['videos']} videos for {training['steps']} steps to tell moments of videos apart (loss "
        f"{training['losses'][0]:.2f} to {training['losses'][-1]:.2f}, {2 * training['pairs']} pictures a step; "
        f"{machine(result)}). It is small, and it has "
        "seen little: what these figures say of a large one is the order of the rows, not more. Each frame's features are "
        f"held to those of the unpatched encoder, on {result['frames']} frames at stride {result['frame_stride']} of "
        "videos that it was not trained on: their cosine (mean, and of the worst twentieth); how often the unpatched "
        "frame itself comes first among all unpatched frames of the set, and its mean rank; and the share of the ten "
        "frames of other videos most like it that the unpatched encoder finds, too.\n"
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
            if point is not other
        ]
        parts.append(
            f"**{name}**: {other['videos']} videos; frames of two different ones have a cosine of "
            f"{other['cosine']:.2f} on average.\n\n{table(rows)}"
        )
    return "\n".join(parts)

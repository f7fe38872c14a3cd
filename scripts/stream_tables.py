"""Tables of docs/streams-and-corpora.md."""

from __future__ import annotations

from markdown_tables import load, machine, table


def stored_tokens_table() -> str:
    """Bytes of tokens beside videos and frames, and how fast batches come of them."""
    result = load("stored-tokens")
    sizes = [
        (name, result[f"bytes_{key}"])
        for name, key in (
            ("the videos (mp4)", "videos"),
            ("all frames of the windows", "frames"),
            ("kept patches", "kept"),
            ("file of `rlt tokens`", "file"),
        )
    ]
    rows = [("", "bytes", "of the videos'", "of the frames'")]
    for name, num_bytes in sizes:
        shares = f"{num_bytes / sizes[0][1]:.2f}", f"{num_bytes / sizes[1][1]:.3f}"
        rows.append((name, f"{num_bytes / 1e6:,.1f} MB", *shares))
    seconds = result["seconds"]
    ratio = seconds["videos"]["median"] / seconds["tokens"]["median"]
    clips = result["settings"]["clips"]
    spread = ", ".join(
        f"{clips / seconds[way]['median']:.1f} clips a second from {way} "
        f"({clips / seconds[way]['spread'][1]:.1f} to {clips / seconds[way]['spread'][0]:.1f})"
        for way in ("tokens", "videos")
    )
    return (
        table(rows)
        + f"\nThe loader of `rlt train` gives {ratio:.0f} times as many clips a second from the file as from the "
        f"videos: {spread}. {result['videos']} surveillance videos, {result['windows']} windows of 16 frames at stride "
        f"4 and 224 pixels, {result['tokens_kept']:.1%} of the tokens kept; one process, one thread, median of "
        f"{result['settings']['rounds']} turns ({machine(result)}).\n"
    )


def long_videos_table() -> str:
    """Peak memory and time against length."""
    result = load("long-videos")
    runs = {(run["kind"], run["minutes"], run["way"]): run for run in result["runs"]}
    minutes = sorted({length for _, length, _ in runs})
    rows = [
        ("scene and way", *(f"memory, {length} min" for length in minutes), *(f"{length} min" for length in minutes))
    ]
    for kind, way in dict.fromkeys((kind, way) for kind, _, way in runs):
        found = [runs.get((kind, length, way)) for length in minutes]
        memory = (f"{run['peak_memory_bytes'] / 2**20:,.0f} MiB" if run else "-" for run in found)
        seconds = (f"{run['seconds']:,.0f} s" if run else "-" for run in found)
        rows.append((f"{kind}, {'RLT' if way == 'rlt' else way}", *memory, *seconds))
    settings = result["settings"]
    return (
        table(rows) + f"\n`rlt features {settings['model']} VIDEO --every {settings['every']:g} --batch-tokens "
        f"{settings['batch_tokens']}` of 1080p at {settings['rate']} frames a second, every process as the kernel "
        f"counts it, with Python, torch and the network ({machine(result)}, busy with other work too, "
        "so the times are rough).\n"
    )

"""Features of every window of a folder of videos by `datasets.Dataset.map`: a row for each video in, a window out.

    python examples/datasets_features.py [--output FILE] [MODEL [VIDEO...]]

Needs `pip install datasets`. MODEL is what `rlt features` takes, a size with random weights without it. A VIDEO is a
file, a folder, a list or a manifest; without any they are the bundled clips. A video that cannot be read is a row with
an error. A column of `datasets.Video(decode=False)` does as well as one of paths.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import datasets

import rlt
from rlt import assets
from rlt.encoding import list_sources


def main(arguments: list[str] | None = None) -> None:
    """Print how many rows came of how many videos, and the first few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vit_micro")
    parser.add_argument("videos", nargs="*", default=[assets.path(name) for name in assets.names()])
    parser.add_argument("--output", help="Parquet file")
    options = parser.parse_args(arguments)

    encoder = rlt.Encoder(options.model, outputs=["embedding"])
    videos = datasets.Dataset.from_dict({"video": list(list_sources(options.videos))})
    columns = datasets.Features.from_arrow_schema(encoder.schema)  # else a first batch without errors decides
    rows = videos.map(encoder, batched=True, batch_size=8, remove_columns=["video"], features=columns)
    if options.output:
        rows.to_parquet(options.output)
    print(f"{len(rows)} rows of {len(videos)} videos")
    for row in rows.take(5):
        said = row["error"] or f"{row['tokens_kept']:.1%} of the tokens, {len(row['embedding'])} features"
        print(f"{Path(row['source']).name}, window {row['window']}: {said}")


if __name__ == "__main__":
    main()

"""Features of every window of a folder of videos in Daft: a row for each video in, a row for each window out.

    python examples/daft_features.py [--output FOLDER] [MODEL [VIDEO...]]

Needs `pip install daft`. MODEL is what `rlt features` takes, a size with random weights without it. A VIDEO is a file,
a folder, a list or a manifest; without any they are the bundled clips. Daft runs the function where it has room for it,
on other machines too; a video that cannot be read is a row with an error.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import daft

import rlt
from rlt import assets
from rlt.encoding import list_sources


def main(arguments: list[str] | None = None) -> None:
    """Print how many rows came of how many videos, and the first few."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="vit_micro")
    parser.add_argument("videos", nargs="*", default=[assets.path(name) for name in assets.names()])
    parser.add_argument("--output", help="folder for Parquet files")
    options = parser.parse_args(arguments)
    os.environ.setdefault("DAFT_ANALYTICS_ENABLED", "0")  # else Daft reports over the network that it runs

    encoder = rlt.Encoder(options.model, outputs=["embedding"])
    columns = daft.Schema.from_pyarrow_schema(encoder.schema)

    @daft.func(return_dtype=daft.DataType.struct({column.name: column.dtype for column in columns}), unnest=True)
    def windows(video: str) -> Iterator[dict[str, Any]]:
        rows = encoder({"video": [video]})
        for values in zip(*rows.values(), strict=True):
            yield dict(zip(rows, values, strict=True))

    videos = daft.from_pydict({"video": list(list_sources(options.videos))})
    rows = videos.select(windows(daft.col("video"))).collect()
    if options.output:
        rows.write_parquet(options.output)
    found = rows.select("source", "window", "tokens_kept", "embedding", "error").to_pylist()
    print(f"{len(found)} rows of {len(videos)} videos")
    for row in found[:5]:
        said = row["error"] or f"{row['tokens_kept']:.1%} of the tokens, {len(row['embedding'])} features"
        print(f"{Path(row['source']).name}, window {row['window']}: {said}")


if __name__ == "__main__":
    main()

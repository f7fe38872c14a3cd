"""`rlt.Encoder` runs in Daft and in `datasets`, by the files of examples/: the rows are those that it gives itself."""

from __future__ import annotations

import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest

import rlt
from models import tiny_model
from rlt import Threshold
from rlt.data.tables import read_table
from rlt.video import ClipSpec
from video_factory import write_video

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    network = tiny_model(patch_size=16, labels=tuple("abcdefg"))
    network.config = network.config.replace(clip=ClipSpec(4, 2, size=32), rule=Threshold(0.2))
    network.save_pretrained(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos of one to four windows; the first one is none."""
    root = tmp_path / "videos"
    root.mkdir()
    (root / "0.mp4").write_text("no video")
    for number in range(1, 5):
        write_video(root / f"{number}.mp4", 8 * number)
    return root


def by_place(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Rows in the order of their videos and windows, as those of engines may come in any."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return sorted(rows, key=lambda row: (row["source"], row["window"]))


@pytest.mark.parametrize("engine", ["daft", "datasets"])
def test_the_rows_are_those_of_the_encoder(
    engine: str,
    run_dir: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(engine)
    monkeypatch.setenv("DAFT_ANALYTICS_ENABLED", "0")
    output = tmp_path / ("rows" if engine == "daft" else "rows.parquet")
    main = runpy.run_path(str(EXAMPLES / f"{engine}_features.py"))["main"]
    main(["--output", str(output), str(run_dir), str(folder)])
    parts = sorted(output.glob("*.parquet")) if output.is_dir() else [output]
    columns = [read_table(path)[0] for path in parts]
    ours = by_place({name: [value for part in columns for value in part[name]] for name in columns[0]})
    encoder = rlt.Encoder(run_dir, outputs=["embedding"])
    theirs = by_place(encoder({"video": sorted(map(str, folder.iterdir()))}))
    assert len(ours) == len(theirs) == 11
    for row, expected in zip(ours, theirs, strict=True):
        assert row.pop("embedding") == pytest.approx(expected.pop("embedding"), abs=1e-5)
        assert row == expected
    printed = capsys.readouterr().out
    assert "11 rows of 5 videos" in printed
    assert "0.mp4, window 0: " in printed
    assert "% of the tokens, 32 features" in printed


def test_rows_of_datasets_videos(run_dir: Path, folder: Path) -> None:
    """As they are stored, in a data set whose feature is a video: paths and bytes without a decoder."""
    datasets = pytest.importorskip("datasets")
    paths = sorted(map(str, folder.iterdir()))
    videos = datasets.Dataset.from_dict({"video": paths}).cast_column("video", datasets.Video(decode=False))
    encoder = rlt.Encoder(run_dir, outputs=["embedding"])
    schema = datasets.Features.from_arrow_schema(encoder.schema)
    rows = videos.map(encoder, batched=True, batch_size=2, remove_columns=["video"], features=schema)
    expected = encoder({"video": paths})
    assert rows["source"][:] == expected["source"]
    assert rows["tokens_kept"][:] == expected["tokens_kept"]


@pytest.mark.parametrize("outputs", [["classes"], ["embedding"], ["tokens", "classes"]])
def test_the_schema_is_that_of_the_rows(outputs: list[str], run_dir: Path, folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    encoder = rlt.Encoder(run_dir, outputs=outputs)
    rows = encoder({"video": sorted(folder.iterdir())})
    assert encoder.schema.names == list(rows)
    assert pyarrow.table(rows, schema=encoder.schema).column("error").null_count == len(rows["error"]) - 1


def test_a_pickle_says_which_weights(run_dir: Path) -> None:
    """`datasets` keeps the answers of a function by its pickle."""
    encoder = rlt.Encoder(run_dir)
    before = pickle.dumps(encoder)
    assert encoder.network.config.num_classes == 7  # loading it is no change
    assert pickle.dumps(encoder) == before
    tiny_model(patch_size=16, num_classes=9).save_pretrained(run_dir)
    assert pickle.dumps(encoder) != before

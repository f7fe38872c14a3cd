"""Lists of videos by somebody else: whatever is wrong with one is one line, soon, with the place where it stands."""

from __future__ import annotations

import io
import json
import os
import random
import struct
from pathlib import Path

import pytest

from rlt import assets
from rlt.data.augment import AugmentConfig
from rlt.data.dataset import TrainingDataset
from rlt.data.labels import read_class_names
from rlt.data.listings import folder_listing
from rlt.data.manifest import COLUMNS, Manifest, VideoEntry, read_manifest, write_manifest
from rlt.data.prepare import prepare
from rlt.data.sampler import SampleKey
from rlt.data.sources import kinetics_listing, ssv2_listing
from rlt.errors import InvalidArgumentError
from rlt.video import ClipSpec
from video_factory import write_video


def refused(call, *words: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        call()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    for word in words:
        assert word in message


def write_csv(path: Path, **changed: object) -> Path:
    row = {**dict.fromkeys(COLUMNS, 1), "path": "v.mp4", "label": "a", "status": "ok", "label_id": 0, **changed}
    path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    return path


@pytest.mark.parametrize("label_id", ["99999999999999999999999", "20000000", "100000", "9" * 5000])
def test_label_ids_that_name_no_class(tmp_path, label_id):
    """Names of classes were made up to the largest id, for 300 s or in 1.7 GB."""
    refused(lambda: read_manifest(write_csv(tmp_path / "m.csv", label_id=label_id)), "label_id")
    (tmp_path / "list.txt").write_text(f"v.mp4 {label_id}\n")
    refused(lambda: folder_listing(tmp_path / "list.txt"), "no label id")


def test_parquet_of_somebody_else(tmp_path):
    """Metadata that is no UTF-8 was a UnicodeDecodeError, deeply nested class names a RecursionError."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {**{name: [1] for name in COLUMNS}, "path": ["v.mp4"], "label": ["a"], "status": ["ok"], "label_id": [0]}
    for metadata in ({b"class_names": b"\xff\xfe"}, {b"\xff": b"x"}, {"class_names": "[" * 100_000}):
        parquet.write_table(arrow.table(columns, metadata=metadata), tmp_path / "m.parquet")
        refused(lambda: read_manifest(tmp_path / "m.parquet"), "m.parquet")
    parquet.write_table(arrow.table({**columns, "label_id": [2**62]}), tmp_path / "m.parquet")
    refused(lambda: read_manifest(tmp_path / "m.parquet"), "label_id")


def test_mutated_parquet_is_a_manifest_or_one_line(tmp_path):
    """2 of 300 fuzzed files were raw exceptions."""
    pytest.importorskip("pyarrow")
    path, rng = tmp_path / "m.parquet", random.Random(6)
    write_manifest(Manifest((VideoEntry("/v.mp4", 0, "a", 10, 25.0, 8, 8, 0.4, "ok", 0.5),) * 5, ("a", "b")), path)
    data = path.read_bytes()
    for _ in range(100):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 4))):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            read_manifest(path)
        except InvalidArgumentError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017 (either end is right)


def test_a_length_beyond_all_integers_does_not_lose_the_work(tmp_path):
    """A video of 9e17 s ended `rlt prepare` with an OverflowError after all files were looked at."""
    buffer = io.BytesIO()
    write_video(buffer, 20, container="matroska")
    data = buffer.getvalue()
    at = data.find(b"DURATION") + len(b"DURATION") + 3
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "long.mkv").write_bytes(data[:at] + b"0:0:9e17".ljust(19, b"\0") + data[at + 19 :])
    (tmp_path / "data" / "a" / "box.mp4").write_bytes(
        assets.path(assets.names()[0]).read_bytes() + struct.pack(">I4sQ", 1, b"free", 2**62)
    )
    os.mkfifo(tmp_path / "data" / "a" / "pipe.mp4")
    report = prepare(folder_listing(tmp_path / "data"), tmp_path / "m.csv", workers=1)
    found = {Path(entry.path).name: entry for entry in report.manifest.entries}
    assert (found["long.mkv"].frames, found["long.mkv"].status) == (20, "ok")
    assert "cut off" in found["box.mp4"].status
    assert "a named pipe" in found["pipe.mp4"].status
    with pytest.raises(InvalidArgumentError, match="is the same file as"):
        prepare(folder_listing(tmp_path / "data"), tmp_path / "m.csv", other_split=tmp_path / "m.csv")


def test_one_bad_video_does_not_end_a_training(tmp_path):
    """A box of 2^63 bytes was a raw exception, and only a VideoError is replaced."""
    good = assets.path(assets.names()[0]).read_bytes()
    end = int.from_bytes(good[:4], "big")  # of the first box
    (tmp_path / "bad.mp4").write_bytes(good[:end] + struct.pack(">I4sQ", 1, b"free", 2**63 - 1) + good[end:])
    (tmp_path / "good.mp4").write_bytes(good)
    entries = [VideoEntry(str(tmp_path / name), 0, "a") for name in ("bad.mp4", "good.mp4")]
    sample = TrainingDataset(entries, ClipSpec(4, 2, size=32), augment=AugmentConfig())[SampleKey(0, 0)]
    assert sample.path.endswith("good.mp4")
    assert [Path(path).name for path, _ in sample.failed] == ["bad.mp4"]


def test_lists_that_no_parser_takes(tmp_path):
    """RecursionError, OverflowError, csv.Error and OSError of lists are one line, too."""
    (tmp_path / "deep.json").write_text("[" * 100_000)
    refused(lambda: read_class_names(tmp_path / "deep.json"), "not a JSON file")
    refused(lambda: ssv2_listing(tmp_path / "deep.json", tmp_path), "not a JSON file")
    (tmp_path / "wide.txt").write_text("x" * 200_000 + ",a\n" * 2)
    refused(lambda: folder_listing(tmp_path / "wide.txt"), "line 1")
    header = "label,youtube_id,time_start,time_end,split\n"
    (tmp_path / "k.csv").write_text(header + f"a,{'x' * 200_000},0,10,val\n")
    refused(lambda: kinetics_listing("kinetics400", tmp_path, csv_file=tmp_path / "k.csv"), "line 2")
    (tmp_path / "k.csv").write_text(header + "abseiling,x,inf,10,val\n")
    refused(lambda: kinetics_listing("kinetics400", tmp_path, csv_file=tmp_path / "k.csv"), "seconds are needed")
    (tmp_path / "long.txt").write_text(f"{'n' * 300}.mp4 0\nnul\0.mp4 0\n")
    assert len(folder_listing(tmp_path / "long.txt", videos=tmp_path).videos) == 2
    os.mkfifo(tmp_path / "pipe.csv")
    refused(lambda: read_manifest(tmp_path / "pipe.csv"), "no regular file")
    refused(lambda: folder_listing(tmp_path / "pipe.csv"), "a pipe")


def test_many_class_names_are_read_in_a_moment(tmp_path):
    """Names were counted anew for each name: 100,000 of them took minutes."""
    (tmp_path / "names.json").write_text(json.dumps([f"class {number}" for number in range(100_000)]))
    assert len(read_class_names(tmp_path / "names.json")) == 100_000

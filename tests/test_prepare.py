"""Manifests, and `rlt prepare` from every kind of source."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlt.cli import main
from rlt.data import manifest as manifest_module
from rlt.data.duplicates import compare_splits
from rlt.data.labels import ClassIndex, class_names, read_class_names
from rlt.data.listings import Listing, folder_listing, videos_below
from rlt.data.manifest import Manifest, VideoEntry, read_manifest, write_manifest
from rlt.data.prepare import prepare
from rlt.data.probing import ProbeRecord, probe_video
from rlt.data.sources import kinetics_listing, ssv2_listing
from rlt.data.splitting import group_of, split_listing
from rlt.data.tables import read_table, write_table
from rlt.errors import InvalidArgumentError, MissingDependencyError
from video_factory import write_video

NUM_VIDEOS = 6
"""Videos 0 to 5 have 16 to 21 frames."""


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    for number in range(NUM_VIDEOS):
        write_video(folder / f"{number}.mp4", 16 + number, options={"preset": "ultrafast"})
    return [folder / f"{number}.mp4" for number in range(NUM_VIDEOS)]


Put = Callable[..., Path]


@pytest.fixture
def put(clips: list[Path], tmp_path: Path) -> Put:
    """Copies the next clip to a path below tmp_path."""
    count = 0

    def copy(*parts: str, clip: int | None = None) -> Path:
        nonlocal count
        target = tmp_path.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(clips[count % NUM_VIDEOS if clip is None else clip], target)
        count += clip is None
        return target

    return copy


def cli(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def entry(path: str, label_id: int = 0, label: str = "a", **values: object) -> VideoEntry:
    numbers = {"frames": 16, "fps": 25.0, "width": 160, "height": 96, "duration": 0.64}
    return VideoEntry(path=path, label_id=label_id, label=label, **{**numbers, **values})  # type: ignore[arg-type]


# ---- manifests -----------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12) | st.sampled_from(
    ['a, "b"', "line\nbreak", "carriage\rreturn", "\r\n", "'", "тест 視頻", " blank ", "-1", "nan", ""]
)
SHARES = st.none() | st.floats(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(NAMES, min_size=1, max_size=4),
    rows=st.lists(st.tuples(NAMES, st.integers(0, 3), st.floats(0, 1e6), SHARES, NAMES), min_size=1, max_size=5),
    extension=st.sampled_from([".csv", ".parquet"]),
)
def test_manifests_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    rows: list[tuple[str, int, float, float | None, str]],
    extension: str,
) -> None:
    entries = tuple(
        entry(f"/v/{name}", number % len(names), names[number % len(names)], fps=fps, tokens_kept=share, status=status)
        for name, number, fps, share, status in rows
    )
    manifest = Manifest(entries, tuple(names))
    path = tmp_path_factory.getbasetemp() / f"round_trip{extension}"
    write_manifest(manifest, path)
    assert read_manifest(path) == manifest


def test_numbers_that_are_not_known_are_written_as_the_others(tmp_path: Path) -> None:
    gone = VideoEntry("/b", 0, "a", status="missing")
    write_manifest(Manifest((entry("/a"), gone), ("a", "b")), tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_text().splitlines()[1:] == [
        '"/a",0,"a",16,25.0,160,96,0.64,"ok",""',
        '"/b",0,"a",0,0.0,0,0,0.0,"missing",""',
        '"",1,"b",0,0.0,0,0,0.0,"class without videos",""',
    ]
    write_manifest(Manifest((gone,), ("a",)), tmp_path / "m.parquet")
    columns, _ = read_table(tmp_path / "m.parquet")
    assert [type(columns[name][0]) for name in ("frames", "fps", "width", "height", "duration")] == [
        int, float, int, int, float,
    ]  # fmt: skip


def test_usable_entries_have_status_ok(tmp_path: Path) -> None:
    manifest = Manifest((entry("/a"), entry("/b", status="missing")), ("a", "b"))
    assert [found.path for found in manifest.usable] == ["/a"]
    assert len(manifest) == 2


def test_a_manifest_made_by_hand_may_have_relative_paths_and_no_class_list(tmp_path: Path) -> None:
    header = "label,label_id,path,frames,fps,width,height,duration,status"
    path = tmp_path / "m.csv"
    path.write_text(f"\ufeff{header}\nwalk,2,videos/x.mp4,16,25,160,96,0.64,ok\n")
    manifest = read_manifest(path)
    assert manifest.entries[0].path == str(tmp_path / "videos" / "x.mp4")
    assert manifest.class_names == ("class 0", "class 1", "walk")


GOOD_ROW = "/x.mp4,0,walk,16,25.0,160,96,0.64,ok,"
HEADER = "path,label_id,label,frames,fps,width,height,duration,status,tokens_kept"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEADER}\n", "holds no video"),
        ("", "no column path, label_id"),
        (f"path,label\n{GOOD_ROW}", "no column label_id, frames"),
        (f"{HEADER}\n{GOOD_ROW}\n{GOOD_ROW.replace(',0,walk', ',x,walk')}", "row 2 (line 3), column label_id: 'x'"),
        (f"{HEADER}\n{GOOD_ROW.replace(',0,walk', ',-1,walk')}", "column label_id: '-1'"),
        (
            f"{HEADER}\n{GOOD_ROW.replace(',0,walk', ',100000,walk')}",
            "column label_id: 100000 is no label id; 0 to 99999",
        ),
        (f"{HEADER}\n{GOOD_ROW.replace('25.0', 'nan')}", "column fps: 'nan'"),
        (f"{HEADER}\n{GOOD_ROW.replace('16', '16.5')}", "column frames: '16.5'; a whole number of 0 or more is needed"),
        (f"{HEADER}\n{GOOD_ROW}x", "column tokens_kept: 'x'; a number of 0 or more is needed"),
        (f"{HEADER}\n{GOOD_ROW},more", "has 11 columns"),
        (f"{HEADER}\n{GOOD_ROW}\n{GOOD_ROW.replace('walk', 'run')}", "one label_id stands for one label"),
    ],
)
def test_errors_of_a_csv_manifest_name_row_and_column(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.csv"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=re.escape(message)) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": None}, "no column frames"),
        ({"label_id": [0, -1]}, "row 2, column label_id: -1; a whole number of 0 or more is needed"),
        ({"label_id": [0, 2**40]}, "column label_id: 1099511627776 is no label id"),
        ({"label_id": [0, 0]}, "row 2, column label: 'b', but label_id 0 was 'a' before"),
        ({"label": [1, 2]}, "row 1, column label: 1; a text is needed"),
        ({"fps": [None, 25.0]}, "row 1, column fps: None; a number of 0 or more is needed"),
        ({"path": ["", ""]}, "holds no video"),
    ],
)
def test_errors_of_a_parquet_manifest_name_row_and_column(
    tmp_path: Path, changes: dict[str, list[object] | None], message: str
) -> None:
    columns: dict[str, list[object] | None] = {
        "path": ["/x.mp4", "/y.mp4"], "label_id": [0, 1], "label": ["a", "b"], "frames": [16, 17], "fps": [25.0, 30.0],
        "width": [8, 8], "height": [8, 8], "duration": [0.64, 0.6], "status": ["ok", "ok"], "of_no_use": [1, 2],
    }  # fmt: skip
    path = tmp_path / "m.parquet"
    write_table(path, {name: values for name, values in columns.items() if values is not None})
    assert read_manifest(path).class_names == ("a", "b")
    write_table(path, {name: values for name, values in (columns | changes).items() if values is not None})
    with pytest.raises(InvalidArgumentError, match=re.escape(message)) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_of_manifest_files(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no Parquet")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "binary.csv").write_bytes(b"\x00\xff\xfe\n" * 9)
    for name, message in {
        "none.parquet": "no such file",
        "text.parquet": "not a whole Parquet file",
        "folder.csv": "is a folder",
        "binary.csv": "binary.csv: ",
        "m.txt": "ends in .parquet or .csv",
    }.items():
        with pytest.raises(InvalidArgumentError, match=message):
            read_manifest(tmp_path / name)
    with pytest.raises(InvalidArgumentError, match="would hold no video"):
        write_manifest(Manifest((), ("a",)), tmp_path / "m.csv")


@pytest.mark.parametrize(("label_id", "label"), [(2, "a"), (-1, "a"), (1, "a")])
def test_labels_of_a_manifest_exist(label_id: int, label: str) -> None:
    with pytest.raises(InvalidArgumentError, match="row 1 "):
        Manifest((entry("/x", label_id, label),), ("a", "b"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install "rlt[train]"')):
        write_manifest(Manifest((entry("/x"),), ("a",)), tmp_path / "m.parquet")
    write_manifest(Manifest((entry("/x"),), ("a",)), tmp_path / "m.csv")


# ---- class names ---------------------------------------------------------------------------------------------------


def test_class_names_ship_with_the_package() -> None:
    kinetics, ssv2 = class_names("kinetics400"), class_names("ssv2")
    assert (len(kinetics), kinetics[0], kinetics[-1]) == (400, "abseiling", "zumba")
    assert (len(ssv2), ssv2[0]) == (174, "Approaching something with your camera")
    assert len(set(kinetics)) == 400
    assert len(set(ssv2)) == 174
    with pytest.raises(InvalidArgumentError, match="kinetics400, ssv2"):
        class_names("ucf101")


@pytest.mark.parametrize(
    ("dataset", "digest"),
    [
        ("kinetics400", "a8dafb93a1204d4ecfa904f943ce5ee0c62ddeeb1df71aa1f96983fca17d777e"),
        ("ssv2", "a31a2ad624a558d609762c50f4d5d4778246d3ace6717cf24b993b0bf2d9a68b"),
    ],
)
def test_shipped_names_hash_as_the_published_ones(dataset: str, digest: str) -> None:
    assert hashlib.sha256("\n".join(class_names(dataset)).encode()).hexdigest() == digest


def test_shipped_names_are_the_published_ones(video_data: Path) -> None:
    assert class_names("ssv2") == read_class_names(video_data / "labels" / "something-something-v2-labels.json")
    assert class_names("kinetics400") == read_class_names(video_data / "labels" / "kinetics400.txt")


@pytest.mark.parametrize(
    "spelling",
    [
        lambda name: name.replace(" ", "_"),
        lambda name: name.replace("(", "-").replace(")", "-").replace(" ", "_"),
        lambda name: name.replace("'", "").replace("(", "").replace(")", "").upper(),
        lambda name: f'"{name}"',
        lambda name: re.sub("something", "[something]", name),
    ],
)
@pytest.mark.parametrize("dataset", ["kinetics400", "ssv2"])
def test_other_spellings_are_found(spelling: Callable[[str], str], dataset: str) -> None:
    index = ClassIndex(class_names(dataset), origin=dataset)
    assert [index.find(spelling(name)) for name in index.names] == list(range(len(index.names)))
    assert index.find("no such class") is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "\n\n", "no class name"),
        ("l.txt", "a\nb\na\n", "'a' stands in it twice"),
        ("l.json", "{", "not a JSON file"),
        ("l.json", '{"a": "0", "b": "2"}', "not 0 to 1"),
        ("l.json", '{"a": "x"}', "not a JSON file of class names"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_errors_of_class_lists(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        read_class_names(tmp_path / name)


# ---- folders and list files ----------------------------------------------------------------------------------------


def labelled(listing: Listing, root: Path) -> list[tuple[str, int, str]]:
    return [(os.path.relpath(path, root), number, listing.class_names[number]) for path, number in listing.videos]


def label_ids(listing: Listing) -> list[int]:
    return [label_id for _, label_id in listing.videos]


def test_class_folders_at_any_depth(put: Put, tmp_path: Path) -> None:
    for parts in [("run", "a.mp4"), ("jump", "2020", "b.AVI"), ("jump", "2020", "deep", "c.webm"), ("run", ".d.mp4")]:
        put("data", *parts)
    put("elsewhere", "e.mp4")
    (tmp_path / "data" / "run" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "run" / "loop").symlink_to(tmp_path / "data" / "run")
    (tmp_path / "data" / "run" / "notes.txt").touch()
    (tmp_path / "data" / "sit").mkdir()
    listing = folder_listing(tmp_path / "data")
    assert listing.class_names == ("jump", "run", "sit")
    assert labelled(listing, tmp_path / "data") == [
        ("jump/2020/b.AVI", 0, "jump"),
        ("jump/2020/deep/c.webm", 0, "jump"),
        ("run/a.mp4", 1, "run"),
        ("run/linked/e.mp4", 1, "run"),
    ]
    given = folder_listing(tmp_path / "data", names=["sit", "Run", "jump"])
    assert label_ids(given) == [2, 2, 1, 1]
    with pytest.raises(InvalidArgumentError, match="'jump', 'sit' are not among the 1 classes of --labels"):
        folder_listing(tmp_path / "data", names=["run"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no videos in class folders"),
        (["a.mp4"], "no videos in class folders"),
        (["train/run/a.mp4", "val/run/b.mp4"], r"holds splits \(train, val\), not classes; .* such as .*/data/train$"),
        (["train/run/a.mp4", "val/run/b.mp4", "labels/list.txt"], r"holds splits \(train, val\)"),
    ],
)
def test_folders_that_are_no_class_folders(put: Put, tmp_path: Path, files: Sequence[str], message: str) -> None:
    (tmp_path / "data").mkdir()
    for name in files:
        put("data", *name.split("/"))
    with pytest.raises(InvalidArgumentError, match=message):
        folder_listing(tmp_path / "data")
    with pytest.raises(InvalidArgumentError, match="no such folder or list file"):
        folder_listing(tmp_path / "none")


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (
            ["one/run/a.mp4", "two/sit/b.mp4"],
            r"lies in one, two itself, .* \(one/run, two/sit\); .* such as .*/one$",
        ),
        (["videos/run/a.mp4", "videos/sit/b.mp4"], r"no video lies in videos itself"),
        (["run/2020/a.mp4", "sit/b.mp4"], None),
        (["run/a.mp4", "sit/b.mp4"], None),
    ],
)
def test_classes_that_lie_deeper_are_hinted_at(put: Put, tmp_path: Path, files: list[str], hint: str | None) -> None:
    for name in files:
        put("data", *name.split("/"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(folder_listing(tmp_path / "data").videos) == len(files)
    said = [str(warning.message) for warning in caught]
    assert [bool(hint and re.search(hint, text)) for text in said] == [True] * bool(hint)


@pytest.mark.parametrize(
    ("unknown", "message"),
    [
        (["zumbaa"], "'zumbaa' is not among the 400 classes .*; did you mean 'zumba' for 'zumbaa'\\?$"),
        (["hugging (not baby)"], "did you mean 'hugging' for"),
        (["Air-Druming", "beeKeepin"], "did you mean 'air drumming' for 'Air-Druming', 'bee keeping' for 'beeKeepin'"),
        (["xyzzy"], "--labels$"),
    ],
)
def test_unknown_classes_are_told_the_nearest(unknown: list[str], message: str) -> None:
    index = ClassIndex(class_names("kinetics400"), origin="kinetics400")
    with pytest.raises(InvalidArgumentError, match=message):
        index.find_all([*unknown, "archery"], source="list")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b.mp4 1\nc.mp4 0\n", [("a b.mp4", 1, "class 1"), ("c.mp4", 0, "class 0")]),
        ("a b.mp4,1\r\nc.mp4,0\r\n", [("a b.mp4", 1, "class 1"), ("c.mp4", 0, "class 0")]),
        ("a b.mp4\t2\nc.mp4\t0", [("a b.mp4", 2, "class 2"), ("c.mp4", 0, "class 0")]),
        ("path,label\na b.mp4,run fast\nc.mp4,jump", [("a b.mp4", 1, "run fast"), ("c.mp4", 0, "jump")]),
        ('"a, b.mp4","run, fast"\nc.mp4,jump', [("a, b.mp4", 1, "run, fast"), ("c.mp4", 0, "jump")]),
        ("\na b.mp4 run\n\nc.mp4 jump\n", [("a b.mp4", 1, "run"), ("c.mp4", 0, "jump")]),
    ],
)
def test_list_files(tmp_path: Path, text: str, expected: list[tuple[str, int, str]]) -> None:
    (tmp_path / "list.csv").write_text(text)
    assert labelled(folder_listing(tmp_path / "list.csv"), tmp_path) == expected


def test_a_list_finds_videos_that_lie_elsewhere_on_this_machine(put: Put, tmp_path: Path) -> None:
    put("videos", "run", "a.mp4")
    put("videos", "b.mp4")
    (tmp_path / "list.txt").write_text("/data/k400/train/run/a.mp4 0\ntrain/b.mp4 1\ntrain/none.mp4 0\n")
    listing = folder_listing(tmp_path / "list.txt", videos=tmp_path / "videos", names=["x", "y"])
    assert labelled(listing, tmp_path / "videos") == [
        ("run/a.mp4", 0, "x"),
        ("b.mp4", 1, "y"),
        ("train/none.mp4", 0, "x"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line with a path"),
        ("videos/12345 40 7\n", "line 1: a folder of raw frames"),
        ("a.mp4 1\nb.mp4\n", "line 2: 'b.mp4'; a path and a label"),
        ("a.mp4,\nb.mp4,\n", "line 1: 'a.mp4,'; a path and a label"),
        ("a.mp4 123456789\n", "label 123456789 is no label id"),
    ],
)
def test_errors_of_list_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        folder_listing(tmp_path / "list.txt")


# ---- Kinetics and Something-Something v2 ---------------------------------------------------------------------------

KINETICS_CSV = "label,youtube_id,time_start,time_end,split\n"


def test_official_kinetics_csv(put: Put, tmp_path: Path) -> None:
    put("videos", "-abc_DEF123_000010_000020.mp4")
    put("videos", "zumba", "whole.mkv")
    (tmp_path / "train.csv").write_text(
        f'{KINETICS_CSV}zumba,whole,3,13,train\n"massaging person\'s head",-abc_DEF123,10,20,train\n'
        "air drumming,gone,1,11,train\n"
    )
    listing = kinetics_listing("kinetics400", tmp_path / "videos", csv_file=tmp_path / "train.csv")
    assert labelled(listing, tmp_path / "videos") == [
        ("zumba/whole.mkv", 399, "zumba"),
        (
            "-abc_DEF123_000010_000020.mp4",
            class_names("kinetics400").index("massaging person's head"),
            "massaging person's head",
        ),
        ("gone_000001_000011.mp4", 1, "air drumming"),
    ]
    assert cli("prepare", "kinetics400", "--csv", tmp_path / "train.csv", "--videos", tmp_path / "videos", "--output",
               tmp_path / "train.parquet", "--json", tmp_path / "report.json") == 0  # fmt: skip
    manifest = read_manifest(tmp_path / "train.parquet")
    assert [found.status for found in manifest.entries] == ["ok", "ok", "missing"]
    assert manifest.class_names == class_names("kinetics400")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["missing"] == [str(tmp_path / "videos" / "gone_000001_000011.mp4")]
    assert len(report["empty_classes"]) == 398


def test_kinetics_700_takes_its_classes_from_csv_or_labels(put: Put, tmp_path: Path) -> None:
    put("videos", "x_000001_000011.mp4")
    (tmp_path / "k.csv").write_text(f"{KINETICS_CSV}b,x,1,11,train\na,y,1,11,train\na,z,1,11,validate\n")
    with pytest.raises(InvalidArgumentError, match="splits train, validate; choose one with --split"):
        kinetics_listing("kinetics700", tmp_path / "videos", csv_file=tmp_path / "k.csv")
    listing = kinetics_listing("kinetics700", tmp_path / "videos", csv_file=tmp_path / "k.csv", split="train")
    assert label_ids(listing) == [1, 0]
    listing = kinetics_listing(
        "kinetics600", tmp_path / "videos", csv_file=tmp_path / "k.csv", split="train", names=["c", "b", "a"]
    )
    assert label_ids(listing) == [1, 2]


def test_kinetics_class_folders(put: Put, tmp_path: Path) -> None:
    put("videos", "passing_American_football_-in_game-", "a.mp4")
    put("videos", "air drumming", "b.mp4")
    listing = kinetics_listing("kinetics400", tmp_path / "videos")
    assert [label for *_, label in labelled(listing, tmp_path)] == [
        "air drumming",
        "passing American football (in game)",
    ]
    assert label_ids(listing) == [1, 209 - 1]
    listing = kinetics_listing("kinetics700", tmp_path / "videos")
    assert listing.class_names == ("air drumming", "passing American football -in game-")
    put("videos", "unheard of", "c.mp4")
    with pytest.raises(InvalidArgumentError, match="'unheard of' is not among the 400 classes"):
        kinetics_listing("kinetics400", tmp_path / "videos")


def test_kinetics_list_of_paths_and_labels(put: Put, tmp_path: Path) -> None:
    put("videos", "a.mp4")
    (tmp_path / "train.csv").write_text("/original/place/a.mp4 399\n")
    listing = kinetics_listing("kinetics400", tmp_path / "videos", csv_file=tmp_path / "train.csv")
    assert labelled(listing, tmp_path / "videos") == [("a.mp4", 399, "zumba")]
    (tmp_path / "train.csv").write_text("/original/place/a.mp4 400\n")
    with pytest.raises(InvalidArgumentError, match="line 1: label 400 is not among the 400 classes"):
        kinetics_listing("kinetics400", tmp_path / "videos", csv_file=tmp_path / "train.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("youtube_id,time_start,time_end,split\nx,1,2,test\n", "no column label, as in lists of test videos"),
        ("label,youtube_id\nzumba,x\n", "no column time_start, time_end"),
        (f"{KINETICS_CSV}zumba,x,one,2,train\n", "line 2: time_start 'one'"),
        (f"{KINETICS_CSV}zumba,x,1,2\n", "line 2: 4 columns"),
        (f"{KINETICS_CSV}zumbaa,x,1,2,train\n", "'zumbaa' is not among the 400 classes"),
        (KINETICS_CSV, "no video in it"),
    ],
)
def test_errors_of_kinetics_csv(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "k.csv").write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        kinetics_listing("kinetics400", tmp_path, csv_file=tmp_path / "k.csv")
    with pytest.raises(InvalidArgumentError, match="no such folder"):
        kinetics_listing("kinetics400", tmp_path / "none", csv_file=tmp_path / "k.csv")


@pytest.fixture(params=["written", "published"])
def ssv2_files(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Annotations and labels of Something-Something V2: written as the published ones are, and those themselves."""
    if request.param == "published":
        folder = request.getfixturevalue("video_data") / "labels"
        names = "something-something-v2-validation-first50.json", "something-something-v2-labels.json"
        return folder / names[0], folder / names[1]
    annotations, labels = tmp_path / "validation.json", tmp_path / "labels.json"
    classes = class_names("ssv2")
    labels.write_text(json.dumps({name: str(label_id) for label_id, name in enumerate(classes)}))
    videos = [
        {
            "id": str(1000 - number),
            "label": re.sub("something", "a cup", name, flags=re.IGNORECASE),
            "template": re.sub("(something)", r"[\1]", name, flags=re.IGNORECASE),
            "placeholders": ["a cup"] * name.lower().count("something"),
        }
        for number, name in enumerate(classes[::-3])
    ]
    annotations.write_text(json.dumps(videos))
    return annotations, labels


def test_something_something_with_the_official_files(ssv2_files: tuple[Path, Path], put: Put, tmp_path: Path) -> None:
    annotations, labels = ssv2_files
    official = json.loads(annotations.read_text())
    put("videos", f"{official[0]['id']}.mp4")
    put("videos", "part_00", f"{official[1]['id']}.mp4")
    put("videos", f"{official[2]['id']}.mp4").write_bytes(b"broken")
    assert cli("prepare", "ssv2", "--annotations", annotations, "--labels", labels, "--videos", tmp_path / "videos",
               "--output", tmp_path / "val.parquet") == 0  # fmt: skip
    manifest = read_manifest(tmp_path / "val.parquet")
    numbers = json.loads(labels.read_text())
    assert [found.label_id for found in manifest.entries] == [
        int(numbers[found["template"].replace("[", "").replace("]", "")]) for found in official
    ]
    assert [found.status for found in manifest.entries[:2]] == ["ok", "ok"]
    assert "not a video" in manifest.entries[2].status
    assert {found.status for found in manifest.entries[3:]} == {"missing"}
    assert manifest.entries[3].path == str(tmp_path / "videos" / f"{official[3]['id']}.webm")
    # The labels are the shipped ones too.
    assert ssv2_listing(annotations, tmp_path / "videos").class_names == manifest.class_names


def test_something_something_lists_of_paths_and_labels(put: Put, tmp_path: Path) -> None:
    put("videos", "7.mp4")
    (tmp_path / "val.csv").write_text("videos/7.mp4 5\n")
    listing = ssv2_listing(tmp_path / "val.csv", tmp_path / "videos")
    assert labelled(listing, tmp_path / "videos") == [("7.mp4", 5, "Closing something")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": "1"}]', "entry 1 has no template, as in the test annotations"),
        ("[", "not a JSON file"),
        ("[]", "no video in it"),
        ('{"Closing something": "5"}', "not the annotations"),
        ('[{"id": "1", "template": "Eating [something]"}]', r"'Eating \[something\]' is not among the 174"),
    ],
)
def test_errors_of_something_something(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        ssv2_listing(tmp_path / "a.json", tmp_path)


# ---- looking into the videos ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", [".parquet", ".csv"])
def test_folder_from_another_working_directory(
    put: Put, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extension: str
) -> None:
    good = put("data", "run", "good.mp4")
    put("data", "run", "broken.mp4").write_bytes(b"not a video")
    cut = put("data", "run", "cut.mp4")
    write_video(cut, 40, container_options={"movflags": "faststart"})
    cut.write_bytes(cut.read_bytes()[:-500])
    put("data", "jump", "same.mp4", clip=0)
    write_video(tmp_path / "data" / "jump" / "short.mp4", 5)
    (tmp_path / "data" / "sit").mkdir()
    monkeypatch.chdir(tmp_path / "data" / "run")
    assert cli("prepare", "folder", "../../data", "--output", f"../../out/m{extension}") == 0
    manifest = read_manifest(tmp_path / "out" / f"m{extension}")
    by_name = {Path(found.path).name: found for found in manifest.entries}
    assert all(Path(found.path).is_absolute() for found in manifest.entries)
    assert by_name["good.mp4"] == VideoEntry(str(good), 1, "run", 16, 25.0, 160, 96, 0.64)
    assert by_name["short.mp4"].frames == 5
    assert by_name["short.mp4"].usable
    assert "not a video" in by_name["broken.mp4"].status
    assert by_name["cut.mp4"].status == "the file is cut off; download or copy it again"
    shown = capsys.readouterr().out
    assert "5 videos of 3 classes (jump, run, sit), 3 can be used" in shown
    assert "cannot be used: 2" in shown
    assert "under 16 frames: 1" in shown
    assert "Classes without a video that can be used: 1\n  sit" in shown
    assert "good.mp4 = " in shown
    assert "(same content)" in shown
    assert not list((tmp_path / "out").glob("*.partial"))


def test_real_videos(video_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = video_data / "surveillance" / "val"
    if not source.is_dir():
        pytest.skip(f"{source} is not there")
    monkeypatch.chdir(tmp_path)
    assert cli("prepare", "folder", source, "--output", "val.parquet") == 0
    manifest = read_manifest("val.parquet")
    assert manifest.class_names == ("fight", "noFight")
    assert len(manifest) == len(manifest.usable) == len(list(videos_below(source)))


def test_measured_tokens_are_stored(put: Put, tmp_path: Path) -> None:
    put("data", "run", "a.mp4", clip=5)
    assert cli("prepare", "folder", tmp_path / "data", "--output", tmp_path / "m.csv", "--measure-tokens") == 0
    (found,) = read_manifest(tmp_path / "m.csv").entries
    assert found.tokens_kept is not None
    assert 1 / 8 <= found.tokens_kept < 1


def test_limit_and_numbers_out_of_range(put: Put, tmp_path: Path) -> None:
    for name in "abc":
        put("data", "run", f"{name}.mp4")
    report = prepare(folder_listing(tmp_path / "data"), tmp_path / "m.csv", limit=2, workers=1)
    assert (report.num_videos, report.num_probed) == (2, 2)
    for values in ({"limit": 0}, {"workers": 0}):
        with pytest.raises(InvalidArgumentError, match="at least 1"):
            prepare(folder_listing(tmp_path / "data"), tmp_path / "m.csv", **values)


def test_progress_counts_every_video(put: Put, tmp_path: Path) -> None:
    for number in range(NUM_VIDEOS):
        put("data", "run", f"{number}.mp4")
    calls: list[tuple[int, int, str]] = []
    prepare(folder_listing(tmp_path / "data"), tmp_path / "m.csv", on_progress=lambda *values: calls.append(values))
    assert calls == [(number + 1, NUM_VIDEOS, f"{number}.mp4") for number in range(NUM_VIDEOS)]


def test_splits_are_compared(put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("train", "run", "001.mp4", clip=0)
    put("train", "run", "002.mp4", clip=1)
    put("train", "sit", "003.mp4", clip=2)
    put("val", "run", "copy.mp4", clip=0)
    put("val", "run", "002.mp4", clip=3)
    assert cli("prepare", "folder", tmp_path / "train", "--output", tmp_path / "train.csv") == 0
    options = ("prepare", "folder", tmp_path / "val", "--output", tmp_path / "val.csv", "--json", tmp_path / "r.json")
    assert cli(*options, "--other-split", tmp_path / "train.csv") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert {
        (Path(found["path"]).name, Path(found["other"]).name, found["reason"]) for found in report["between_splits"]
    } == {
        ("copy.mp4", "001.mp4", "same content"),
        ("002.mp4", "002.mp4", "same name"),
    }
    assert report["class_names_differ"] is True
    assert "prepare one with --labels of the other" in capsys.readouterr().out
    labels = ("--labels", tmp_path / "train.csv")
    assert cli(*options, "--other-split", tmp_path / "train.csv", *labels) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report) == [
        "output", "num_videos", "num_classes", "num_usable", "num_probed", "num_resumed", "missing", "unreadable",
        "short", "empty_classes", "duplicates", "other_split", "between_splits", "class_names_differ", "tokens_kept",
    ]  # fmt: skip
    assert report["class_names_differ"] is False
    assert report["empty_classes"] == ["sit"]


def test_the_same_file_in_both_splits_is_told_once(put: Put) -> None:
    path = put("a.mp4")
    found = compare_splits({str(path): path.stat().st_size}, [str(path)])
    assert [duplicate.reason for duplicate in found] == ["same file"]


# ---- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("v_Archery_g07_c02.avi", "v_Archery_g07"),
        ("v_Archery_g07.avi", "v_Archery_g07"),
        ("-3B32lodo2M_000059_000069.mp4", "-3B32lodo2M"),
        ("April_09_brush_hair_u_nm_np1_ba_goo_0.avi", None),
        ("fi001.mp4", None),
        ("run_g.mp4", None),
    ],
)
def test_names_tell_what_a_clip_was_cut_from(name: str, group: str | None) -> None:
    assert group_of(f"/data_g01_c01/{name}") == group


def files_of(class_sizes: Sequence[Sequence[int]], root: str = "/data") -> Listing:
    """Classes of groups of so many clips each; a group of 0 is a file whose name tells nothing."""
    videos = []
    for label_id, sizes in enumerate(class_sizes):
        for group, size in enumerate(sizes):
            names = [f"v_{label_id}_g{group:02}_c{clip:02}.avi" for clip in range(size)] or [f"plain{group}.avi"]
            videos += [(f"{root}/{label_id}/{name}", label_id) for name in names]
    return Listing(root, tuple(videos), tuple(f"class {label_id}" for label_id in range(len(class_sizes))))


@settings(max_examples=100, deadline=None)
@given(
    class_sizes=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=12), min_size=1, max_size=4).filter(
        lambda classes: any(len(sizes) > 1 for sizes in classes)
    ),
    val_fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
def test_every_class_is_split_near_the_fraction_and_no_group_is(
    class_sizes: list[list[int]], val_fraction: float, seed: int
) -> None:
    listing = files_of(class_sizes)
    split = split_listing(listing, val_fraction, seed)
    assert Counter(split.training.videos) + Counter(split.validation.videos) == Counter(listing.videos)
    assert split.training.class_names == split.validation.class_names == listing.class_names
    groups, others = ({group_of(path) or path for path, _ in part.videos} for part in split[1::-1])
    assert not groups & others
    assert split.num_groups == sum(size > 0 for sizes in class_sizes for size in sizes)
    for label_id, sizes in enumerate(class_sizes):
        clips = [max(size, 1) for size in sizes]
        taken, left = (
            sum(found == label_id for _, found in part.videos) for part in (split.validation, split.training)
        )
        assert taken + left == sum(clips)
        assert left
        assert (taken > 0) == (len(clips) > 1)
        off = abs(taken - val_fraction * sum(clips))
        assert off <= max(clips) / 2 + 1e-9 or taken == min(clips) or left == min(clips)


def test_a_split_is_a_function_of_seed_and_names() -> None:
    def names(seed: int, root: str) -> list[str]:
        split = split_listing(files_of([[4] * 25] * 3, root), 0.28, seed)
        assert (len(split.validation.videos), len(split.training.videos)) == (84, 216)  # 7 of 25 groups a class
        return [path.removeprefix(root) for path, _ in split.validation.videos]

    assert names(0, "/data") == names(0, "/other/place")
    assert names(0, "/data") != names(1, "/data")


def test_clips_of_one_video_stay_together_across_classes() -> None:
    videos = tuple((f"/k/{label}/{name}_000001_000011.mp4", label) for label in (0, 1) for name in "abcdefghij")
    split = split_listing(Listing("k", videos, ("x", "y")), 0.3)
    held = [{Path(path).name for path, label in split.validation.videos if label == label_id} for label_id in (0, 1)]
    assert held[0] == held[1]
    assert len(held[0]) == 3


def test_a_folder_without_splits_is_split(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run", "sit"):
        for group in range(1, 4):
            for clip in range(1, 3):
                write_video(put("data", name, f"v_{name}_g{group:02}_c{clip:02}.mp4"), 16 + group + 4 * clip)
    monkeypatch.chdir(tmp_path)
    command = ["prepare", "folder", "data", "--output", "all.csv", "--val-fraction", "0.3", "--json", "report.json"]
    assert cli(*command) == 0
    shown = capsys.readouterr().out
    assert "Split by 6 groups that names tell" in shown
    train, val = read_manifest("all_train.csv"), read_manifest("all_val.csv")
    assert (len(train.usable), len(val.usable)) == (8, 4)
    assert train.class_names == val.class_names == ("run", "sit")
    assert not {group_of(found.path) for found in train.entries} & {group_of(found.path) for found in val.entries}
    assert not Path("all.csv").exists()
    report = json.loads(Path("report.json").read_text())
    assert {part: report[part]["num_videos"] for part in report} == {"train": 8, "val": 4}
    assert report["val"]["other_split"] == report["train"]["output"]
    written = [Path(name).read_bytes() for name in ("all_train.csv", "all_val.csv")]
    assert cli(*command, "--seed", "0") == 0
    assert [Path(name).read_bytes() for name in ("all_train.csv", "all_val.csv")] == written


def test_strict_takes_no_video_that_cannot_be_used(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put("data", "run", "a.mp4")
    command = ["prepare", "folder", tmp_path / "data", "--output", tmp_path / "m.csv", "--strict"]
    assert cli(*command) == 0
    put("data", "run", "b.mp4").write_bytes(b"no video")
    assert cli(*command[:-1]) == 0
    capsys.readouterr()
    assert cli(*command) == 2
    assert "m.csv: 1 of 2 videos cannot be used; its column status says why" in capsys.readouterr().err
    assert [found.usable for found in read_manifest(tmp_path / "m.csv").entries] == [True, False]


def test_a_part_of_a_large_data_set_does_not_list_all_other_classes(
    put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put("k400", "zumba", "a.mp4")
    assert cli("prepare", "kinetics400", "--videos", tmp_path / "k400", "--output", tmp_path / "m.csv") == 0
    shown = capsys.readouterr().out
    assert "Classes with a video that can be used: 1\n" in shown
    assert "without" not in shown


# ---- interruption --------------------------------------------------------------------------------------------------

KILLED_AFTER_3 = """
import os, signal, sys
from rlt.data.listings import folder_listing
from rlt.data.prepare import prepare
def stop(done, total, name):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
prepare(folder_listing(sys.argv[1]), sys.argv[2], workers=2, on_progress=stop)
"""


def recorded(partial: Path) -> list[str]:
    return [Path(json.loads(line)["path"]).name for line in partial.read_text().splitlines()]


def test_a_killed_run_goes_on_where_it_was(put: Put, tmp_path: Path) -> None:
    paths = [put("data", "run", f"{number}.mp4") for number in range(NUM_VIDEOS)]
    output, partial = tmp_path / "m.parquet", tmp_path / "m.parquet.partial"
    killed = subprocess.run([sys.executable, "-c", KILLED_AFTER_3, tmp_path / "data", output], check=False)
    assert killed.returncode == -9
    assert not output.exists()
    assert recorded(partial) == ["0.mp4", "1.mp4", "2.mp4"]
    partial.write_text(partial.read_text() + '{"path": "/torn')  # as if it was killed while it wrote
    write_video(paths[1], 30)  # changed since
    names: list[str] = []
    report = prepare(folder_listing(tmp_path / "data"), output, on_progress=lambda *step: names.append(step[2]))
    assert names == ["1.mp4", "3.mp4", "4.mp4", "5.mp4"]
    assert (report.num_resumed, report.num_probed) == (2, 4)
    assert [found.frames for found in read_manifest(output).entries] == [16, 30, 18, 19, 20, 21]
    assert not partial.exists()


def test_an_interrupt_keeps_the_record_and_the_old_manifest(put: Put, tmp_path: Path) -> None:
    for number in range(NUM_VIDEOS):
        put("data", "run", f"{number}.mp4")
    output = tmp_path / "m.csv"
    write_manifest(Manifest((entry("/old"),), ("a",)), output)
    listing = folder_listing(tmp_path / "data")

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(listing, output, on_progress=interrupt)
    assert read_manifest(output).entries[0].path == "/old"
    assert len(recorded(tmp_path / "m.csv.partial")) == 4
    # Tokens were not measured then, so that run must look at all files again.
    put("data", "run", "broken.mp4").write_bytes(b"not a video")
    with ProbeRecord(tmp_path / "m.csv.partial") as record:
        record.add(probe_video(str(tmp_path / "data" / "run" / "broken.mp4")))  # which has none to measure
    listing = folder_listing(tmp_path / "data")
    report = prepare(listing, output, measure_tokens=True)
    assert (report.num_probed, report.num_resumed) == (NUM_VIDEOS, 1)
    assert 0 < (report.tokens_kept or 0) < 1


def test_tokens_that_were_measured_stay(put: Put, tmp_path: Path) -> None:
    path, other = put("data", "run", "a.mp4", clip=5), put("data", "run", "b.mp4", clip=5)
    output = tmp_path / "m.csv"
    with ProbeRecord(tmp_path / "m.csv.partial") as record:
        record.add(probe_video(str(path), measure_tokens=True))
    report = prepare(folder_listing(tmp_path / "data"), output)
    assert report.num_resumed == 1
    first, second = read_manifest(output).entries
    assert first.tokens_kept is not None
    assert second.tokens_kept is None

    report = prepare(folder_listing(tmp_path / "data"), output, measure_tokens=True)
    measured = [entry.tokens_kept for entry in report.manifest.entries]
    assert None not in measured
    report = prepare(folder_listing(tmp_path / "data"), output)
    assert [entry.tokens_kept for entry in read_manifest(output).entries] == measured
    later = output.stat().st_mtime_ns + 10**9
    os.utime(other, ns=(later, later))  # another video of the same name
    prepare(folder_listing(tmp_path / "data"), output)
    assert [entry.tokens_kept for entry in read_manifest(output).entries] == [measured[0], None]


def test_a_partial_file_of_anything_else_is_passed_over(put: Put, tmp_path: Path) -> None:
    put("data", "run", "a.mp4")
    (tmp_path / "m.csv.partial").write_text(
        'hello\n[1]\n"a"\nnull\n{"path": 1}\n{"path": [], "size": 1, "modified": 1}\n'
    )
    assert prepare(folder_listing(tmp_path / "data"), tmp_path / "m.csv").num_resumed == 0
    (tmp_path / "n.csv.partial").mkdir()
    with pytest.raises(InvalidArgumentError, match="cannot be used"):
        prepare(folder_listing(tmp_path / "data"), tmp_path / "n.csv")


def test_missing_videos_are_not_remembered(put: Put, tmp_path: Path) -> None:
    path = put("a.mp4")
    with ProbeRecord(tmp_path / "m.partial") as record:
        record.add(probe_video(str(tmp_path / "none.mp4")))
        record.add(probe_video(str(path)))
    assert recorded(tmp_path / "m.partial") == ["a.mp4"]


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["folder", "kinetics400", "kinetics600", "kinetics700", "ssv2"])
def test_all_commands_share_their_options(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert cli("prepare", command, "--help") == 0
    shown = capsys.readouterr().out
    shared = ("videos", "output", "labels", "workers", "limit", "measure-tokens", "other-split", "json",
              "val-fraction", "seed", "strict")  # fmt: skip
    own = {"folder": [], "ssv2": ["annotations"]}.get(command, ["csv", "split"])
    assert set(re.findall(r"^  --([a-z-]+) ", shown, re.MULTILINE)) == {*shared, *own, "help"}


# ---- errors of the command -----------------------------------------------------------------------------------------


def test_errors_are_one_line_and_exit_code_2(put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("data", "run", "a.mp4")
    put("broken", "run", "a.mp4").write_bytes(b"no")
    (tmp_path / "gone.txt").write_text("x.mp4 0\n")
    (tmp_path / "test.json").write_text('[{"id": "1"}]')
    data, out = str(tmp_path / "data"), ["--output", str(tmp_path / "m.csv")]
    for arguments, message in [
        (["folder", str(tmp_path / "none"), *out], "no such folder or list file"),
        (["folder", data, "--output", str(tmp_path / "m.txt")], "ends in .parquet or .csv"),
        (["folder", data, "--output", "/proc/none/m.csv"], "/proc/none/m.csv"),
        (["folder", data, "--videos", data, *out], "leave it out"),
        (["folder", data, *out, "--other-split", "none.csv"], "no such file"),
        (["folder", data, *out, "--labels", "none.txt"], "cannot be read"),
        (["folder", data, *out, "--limit", "0"], "limit is 0"),
        (["folder", data, *out, "--seed", "1"], "seed is 1, which is of a split; add --val-fraction"),
        (["folder", data, *out, "--val-fraction", "1"], "val_fraction is 1.0; above 0 and below 1 is needed"),
        (["folder", data, *out, "--val-fraction", "0.5"], "no class has two videos or two groups of them"),
        (["folder", data, *out, "--val-fraction", "0.5", "--limit", "0"], "limit is 0"),
        (["folder", data, *out, "--val-fraction", "0.5", "--other-split", "x.csv"], "give one of them"),
        (["folder", str(tmp_path / "broken"), *out], "no video can be used"),
        (["folder", str(tmp_path / "gone.txt"), *out], "no video of 1 exists"),
        (["kinetics400", "--csv", "none.csv", "--videos", data, *out], "none.csv: cannot be read"),
        (["kinetics400", "--videos", str(tmp_path / "none"), *out], "no such folder"),
        (["ssv2", "--annotations", str(tmp_path / "test.json"), "--videos", data, *out], "as in the test annotations"),
    ]:
        assert cli("prepare", *arguments) == 2
        shown = capsys.readouterr().err
        assert message in shown, arguments
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1


def test_names_that_are_no_text_go_to_csv_only(put: Put, tmp_path: Path) -> None:
    path = put("data", "run", "a.mp4")
    strange = Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff.mp4"))
    try:
        path.rename(strange)
    except OSError:
        pytest.skip("this file system takes Unicode names only")
    listing = folder_listing(tmp_path / "data")
    with pytest.raises(InvalidArgumentError, match="not valid UTF-8"):
        prepare(listing, tmp_path / "m.parquet")
    prepare(listing, tmp_path / "m.csv")
    assert read_manifest(tmp_path / "m.csv").entries[0].path == str(strange)


def test_a_path_that_stands_twice_is_looked_at_once(put: Put, tmp_path: Path) -> None:
    path = str(put("a.mp4"))
    listing = Listing("list", ((path, 0), (path, 0)), ("x",))
    report = prepare(listing, tmp_path / "m.csv")
    assert (report.num_videos, report.num_probed, report.num_resumed) == (2, 1, 0)
    assert [duplicate.reason for duplicate in report.duplicates] == ["same file"]

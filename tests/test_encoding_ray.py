"""Ray Data runs the same encoder: the same rows, also where a worker is killed and where a run goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from models import tiny_model
from rlt import Threshold, assets
from rlt.data.tables import read_table
from rlt.encoding import Cutter, Encoder, WindowSpec, encode_videos, parts
from rlt.video import ClipSpec
from video_factory import write_video

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of the surveillance set where it is there, else made ones; and one that is none."""
    root = tmp_path_factory.mktemp("videos")
    data = os.environ.get("RLT_TEST_DATA", "")
    real = sorted(Path(data, "surveillance").rglob("*.mp4"))[:5] if data else []
    for number in range(5):
        if number < len(real):
            (root / f"{number}.mp4").symlink_to(real[number])
        else:
            write_video(root / f"{number}.mp4", 40 + 20 * number)
    (root / "3_bad.mp4").write_text("no video")
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    network = tiny_model(patch_size=16, labels=tuple("abcdefg"))
    network.config = network.config.replace(clip=ClipSpec(4, 2, size=32), rule=Threshold(0.2))
    network.save_pretrained(tmp_path_factory.mktemp("run") / "model")
    return Encoder(tmp_path_factory.getbasetemp() / "run0" / "model", outputs=["embedding"])


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    yield
    ray.shutdown()


@contextmanager
def killing(*kinds: str) -> Iterator[list[int]]:
    """Kill the first worker of Ray that is seen at each kind of work, -9, while the block runs."""
    killed: list[int] = []
    wanted, over = list(kinds), threading.Event()

    def watch() -> None:
        while wanted and not over.wait(0.02):
            for process in descendants():
                title = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
                for kind in [kind for kind in wanted if title.startswith(f"ray::{kind}")]:
                    os.kill(process, signal.SIGKILL)
                    killed.append(process)
                    wanted.remove(kind)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def descendants() -> list[int]:
    """Processes that this one started, and theirs."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for parent in found:
        found += [process for process, its in parents.items() if its == parent]
    return found[1:]


def assert_same(path: Path, other: Path) -> None:
    ours, theirs = read_table(path)[0], read_table(other)[0]
    assert ours.keys() == theirs.keys()
    for name, column in ours.items():
        if name == "embedding":
            for row, expected in zip(column, theirs[name], strict=True):
                assert (row is None) == (expected is None)
                assert row is None or row == pytest.approx(expected, abs=1e-5)
        else:
            assert column == theirs[name], name


def test_the_same_rows_with_a_worker_killed_and_going_on(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_ROWS", 2)
    encode_videos(encoder, [folder], output=tmp_path / "local.parquet")
    with killing("FlatMap", "MapWorker") as killed:
        result = encode_videos(encoder, [folder], output=tmp_path / "ray.parquet", engine="ray")
    assert len(killed) == 2  # what decodes, and what holds the network
    assert_same(tmp_path / "ray.parquet", tmp_path / "local.parquet")
    assert [Path(source).name for source, _ in result.failed] == ["3_bad.mp4"]

    told: list[int] = []

    def stop(done: int, total: int, what: str) -> None:
        told.append(done)
        if len(told) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_videos(encoder, [folder], output=tmp_path / "on.parquet", engine="ray", on_progress=stop)
    result = encode_videos(encoder, [folder], output=tmp_path / "on.parquet")  # by another engine, which is no setting
    assert result.num_before >= 5
    assert_same(tmp_path / "on.parquet", tmp_path / "local.parquet")


def test_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    cutter = Cutter(WindowSpec(ClipSpec(4, 2, size=32)), Threshold(0.2))
    for engine in ("local", "ray"):
        encode_videos(cutter, [folder], output=tmp_path / f"{engine}.parquet", engine=engine)
    assert_same(tmp_path / "ray.parquet", tmp_path / "local.parquet")


def test_an_encoder_is_a_function_of_ray_data_itself(encoder: Encoder) -> None:
    """As in the documentation, without the job around it."""
    paths = [str(assets.path(name)) for name in assets.names()]
    data = ray.data.from_items([{"video": path, "number": number} for number, path in enumerate(paths)])
    found = data.map_batches(encoder, batch_size=1).take_all()
    expected = encoder({"video": paths, "number": [0, 1]})
    assert sorted((row["source"], row["window"], row["number"]) for row in found) == sorted(
        zip(expected["source"], expected["window"], expected["number"], strict=True)
    )
    assert all(row["error"] is None for row in found)

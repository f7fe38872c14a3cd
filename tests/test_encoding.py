"""A network over whole videos: which windows, the same answers as clip by clip, each row once, whatever happens."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlt
from models import tiny_model
from rlt import Everything, Threshold, assets, cli
from rlt.data.manifest import Manifest, VideoEntry, write_manifest
from rlt.data.tables import read_table
from rlt.encoding import Encoder, WindowSpec, encode_videos, list_sources, parts, windows_of
from rlt.encoding.rows import kinds_of
from rlt.errors import InvalidArgumentError, VideoError
from rlt.structures import RunLengthTokens, TokenGrid
from rlt.video import ClipSpec, fit_frames, iter_clips, read_clip
from rlt.video._reading import _schedule
from video_factory import damage_packet, read_number, write_video

LABELS = tuple("abcdefg")
CLIP, RULE = ClipSpec(4, 3, size=32), Threshold(0.2)


@pytest.fixture(scope="module")
def model() -> rlt.VisionTransformer:
    network = tiny_model(patch_size=16, labels=LABELS)
    network.config = network.config.replace(clip=CLIP, rule=RULE)
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos that are whole: of 50, 7 and 13 frames."""
    root = tmp_path_factory.mktemp("videos")
    for name, num_frames in (("a", 50), ("b", 7), ("c", 13)):
        write_video(root / f"{name}.mp4", num_frames, options={"g": "8"})
    return root


@pytest.fixture(scope="module")
def stored(model: rlt.VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    model.save_pretrained(folder)
    return folder


def expected_windows(num_frames: int, size: int, step: Fraction, hop: Fraction) -> list[list[Fraction]]:
    """Places of all windows that show something new, by going through them one by one."""
    found: list[list[Fraction]] = []
    number = 0
    while number * hop <= num_frames - 1:
        places = [number * hop + index * step for index in range(size)]
        inside = [place for place in places if place <= num_frames - 1]
        if not found or inside[-1] > max(map(max, found)) or len(inside) == size:
            found.append(inside)
        number += 1
        if len(inside) < size and number * hop <= inside[-1]:
            break  # those that follow begin within it
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.fractions(Fraction(1, 3), 4, max_denominator=4),
    st.fractions(Fraction(1, 2), 9, max_denominator=3),
)
def test_the_schedule_is_every_moment_once_in_order(size: int, step: Fraction, hop: Fraction) -> None:
    moments: list[Fraction] = []
    windows: dict[int, list[Fraction]] = {}
    for moment, numbers in _schedule(size, step, hop):
        if moment > 30:
            break
        assert not moments or moment > moments[-1]
        moments.append(moment)
        for number in numbers:
            windows.setdefault(number, []).append(moment)
    for number, places in windows.items():
        assert places == [number * hop + index * step for index in range(len(places))]
        assert len(places) == size or number * hop + len(places) * step > 30
    assert len(windows) == 30 // hop + 1


@pytest.mark.parametrize(
    ("clip", "overlap", "every"),
    [
        (ClipSpec(4, 3, size=None), 0, None),
        (ClipSpec(4, 3, size=None), 3, None),
        (ClipSpec(8, 1, size=None), 6, None),
        (ClipSpec(4, fps=25, size=None), 2, None),
        (ClipSpec(2, 1, size=None), 0, 0.4),
        (ClipSpec(4, 2, size=None), 0, 0.12),
    ],
)
def test_windows_hold_the_frames_that_they_say(folder: Path, clip: ClipSpec, overlap: int, every: float | None) -> None:
    for name, num_frames in (("a", 50), ("b", 7), ("c", 13)):
        spec = WindowSpec(clip, overlap, every)
        found = list(windows_of(folder / f"{name}.mp4", spec))
        step = clip.step(Fraction(25))
        hop = Fraction((clip.num_frames - overlap) * step if every is None else Fraction(str(every)) * 25)
        wanted = expected_windows(num_frames, clip.num_frames, Fraction(step), hop)
        shown = [
            [read_number(frame.numpy()) for frame in window.frames[: clip.num_frames - window.num_repeated]]
            for window in found
        ]
        assert shown == [list(map(int, places)) for places in wanted]
        for window, places in zip(found, wanted, strict=True):
            assert window.times[: len(places)].tolist() == pytest.approx([float(place) / 25 for place in places])
        if not overlap and every is None:
            same = iter_clips(
                folder / f"{name}.mp4",
                num_frames=clip.num_frames,
                frame_stride=clip.frame_stride,
                fps=clip.fps,
                size=None,
            )
            assert all(torch.equal(ours.frames, theirs.frames) for ours, theirs in zip(found, same, strict=True))


def test_a_network_of_whole_videos_has_one_window(folder: Path) -> None:
    spec = WindowSpec(ClipSpec(4, size=None, sampling="uniform"))
    [window] = windows_of(folder / "a.mp4", spec)
    assert [read_number(frame.numpy()) for frame in window.frames] == [6, 18, 31, 43]
    with pytest.raises(InvalidArgumentError, match="takes its frames from the whole video"):
        WindowSpec(spec.clip, overlap=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": -1}, "overlap is -1; at least 0"),
        ({"overlap": 4}, "overlap is 4; below the 4 of a window is needed"),
        ({"overlap": 1, "every": 2.0}, "overlap is 1 and every is 2.0; give one of them"),
        ({"every": 0}, "every is 0; seconds above 0"),
        ({"outputs": ["class"]}, "outputs is 'class'; allowed are classes, embedding, tokens"),
        ({"outputs": []}, "outputs are none"),
        ({"window": 5}, "5 frames are not a multiple of tubelet_size=2"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"fps": 5, "frame_stride": 2}, "frame_stride is 2 and fps is 5; give one of them"),
        ({"windows": 4}, "has no option 'windows'; allowed are .*did you mean 'window'"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    model: rlt.VisionTransformer, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Encoder(model, **options)


def test_rows_are_what_the_network_says_clip_by_clip(model: rlt.VisionTransformer, folder: Path) -> None:
    files = [str(folder / f"{name}.mp4") for name in "abc"]
    rows = Encoder(model)({"video": files, "id": [7, 8, 9]})
    place = 0
    for number, file in enumerate(files):
        clips = list(iter_clips(file, num_frames=4, frame_stride=3, size=32))
        for window, clip in enumerate(clips):
            tokens = model.tokenize(clip, rule=RULE)
            with torch.inference_mode():
                features, logits = model.forward_features(tokens)[0], model(tokens)[0]
            best = logits.softmax(0).topk(5)
            assert (rows["source"][place], rows["window"][place], rows["id"][place]) == (file, window, 7 + number)
            assert rows["last"][place] == (window == len(clips) - 1)
            assert rows["start"][place] == pytest.approx(float(clip.times[0]))
            assert rows["end"][place] == pytest.approx(float(clip.times[3 - clip.num_repeated]))
            assert (rows["tokens_kept"][place], rows["num_tokens"][place]) == (tokens.share_kept, tokens.num_tokens)
            assert torch.allclose(torch.from_numpy(rows["embedding"][place]), features, atol=1e-5)
            assert rows["top_ids"][place] == best.indices.tolist()
            assert rows["top_names"][place] == [LABELS[label] for label in best.indices]
            assert rows["top_probabilities"][place] == pytest.approx(best.values.tolist(), abs=1e-6)
            assert rows["error"][place] is None
            place += 1
    assert {len(column) for column in rows.values()} == {place}


def embeddings(rows: dict[str, list[object]]) -> np.ndarray:
    return np.stack(rows["embedding"])


def test_what_windows_are_packed_with_changes_nothing(stored: Path, folder: Path) -> None:
    batch = {"video": sorted(map(str, folder.iterdir()))}
    rows = [Encoder(stored, outputs=["embedding"], token_budget=budget)(batch) for budget in (1, 20, 10**6)]
    for other in rows[1:]:
        assert np.allclose(embeddings(rows[0]), embeddings(other), atol=1e-5)
        assert other["tokens_kept"] == rows[0]["tokens_kept"]
    again = pickle.loads(pickle.dumps(Encoder(stored, outputs=["embedding"], token_budget=1)))
    assert np.array_equal(embeddings(again(batch)), embeddings(rows[0]))
    assert len(pickle.dumps(again)) < 20_000  # the name, not the weights


def places_of(sources: list[str]) -> dict[str, list[int]]:
    return {name: [place for place, other in enumerate(sources) if other == name] for name in sources}


class VideoDecoder:
    """What torchcodec's decoder of this name offers, over frames that are there."""

    __module__ = "torchcodec.decoders"

    class _Metadata:
        average_fps = 25.0

    class _Batch:
        def __init__(self, data: torch.Tensor, pts_seconds: torch.Tensor) -> None:
            self.data, self.pts_seconds = data, pts_seconds

    def __init__(self, frames: torch.Tensor) -> None:
        self.frames, self.metadata = frames, self._Metadata()
        self.metadata.num_frames = len(frames)

    def get_frames_at(self, indices: list[int]) -> _Batch:
        places = torch.tensor(indices)
        return self._Batch(self.frames[places].permute(0, 3, 1, 2), places / 25)


def test_every_kind_of_source(model: rlt.VisionTransformer, folder: Path) -> None:
    encoder, path = Encoder(model, overlap=1), folder / "a.mp4"
    whole = read_clip(path, num_frames=17, frame_stride=3, size=32, start=0)  # 0, 3, .., 48
    native = read_clip(path, num_frames=50, frame_stride=1, size=None, start=0)
    videos = [
        path,
        path.read_bytes(),
        path.open("rb"),
        whole,
        whole.frames,
        whole.frames.numpy(),
        VideoDecoder(native.frames),
    ]
    fitted = fit_frames(native.frames[::3], 32)  # from RGB, where a file is scaled as it is stored
    rows = encoder({"video": videos, "source": [str(number) for number in range(len(videos))]})
    assert not any(rows["error"])
    by_source = places_of(rows["source"])
    first = by_source["0"]
    for name, places in by_source.items():
        assert len(places) == len(first) == 6, name
        same = encoder({"video": [fitted]}) if name == "6" else {"embedding": [rows["embedding"][at] for at in first]}
        assert np.allclose(embeddings(rows)[places], embeddings(same), atol=1e-5), name
        if name not in "45":  # bare frames are counted
            assert [rows["start"][place] for place in places] == pytest.approx([rows["start"][at] for at in first])
    assert [rows["start"][place] for place in by_source["4"]] == [0, 3, 6, 9, 12, 15]
    named = encoder({"video": [path.read_bytes(), whole, whole.frames, path]})["source"]
    assert list(dict.fromkeys(named)) == ["<bytes>", str(path), "<frames>"]
    with pytest.raises(InvalidArgumentError, match="the batch has columns path; 'video' is needed"):
        encoder({"path": [path]})


def test_a_bad_video_is_a_row(model: rlt.VisionTransformer, folder: Path, tmp_path: Path) -> None:
    content = (folder / "a.mp4").read_bytes()
    write_video(tmp_path / "long.ts", 60, container="mpegts", options={"g": "10"})
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "damaged.mp4").write_bytes(damage_packet(content, 24))  # a key frame, which is never left out
    write_video(tmp_path / "fast.mp4", 50, options={"g": "8"}, container_options={"movflags": "faststart"})
    fast = (tmp_path / "fast.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(fast[: len(fast) * 2 // 3])
    files = [
        folder / "b.mp4",
        *(tmp_path / name for name in ("none.mp4", "text.mp4", "damaged.mp4", "cut.mp4")),
        folder / "c.mp4",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = Encoder(model, outputs=["embedding"])({"video": [*files, torch.zeros(3, 20, 20, 3)]})
    found = places_of(rows["source"])
    for place, error in enumerate(rows["error"]):
        assert (error is None) == (rows["embedding"][place] is not None)
    for name, message, least in (
        (str(files[1]), "no such file", 1),
        (str(files[2]), "not a video|text file", 1),
        (str(files[3]), "damaged", 2),
        (str(files[4]), "cut off", 2),
        ("<frames>", "torch.float32", 1),
    ):
        places = found[name]
        assert len(places) >= least, name
        assert pytest.approx([None] * (len(places) - 1)) == [rows["error"][place] for place in places[:-1]]
        assert any(word in rows["error"][places[-1]] for word in message.split("|")), rows["error"][places[-1]]
        assert [rows["last"][place] for place in places] == [False] * (len(places) - 1) + [True]
        assert [rows["window"][place] for place in places] == list(range(len(places)))
    assert [len(found[str(file)]) for file in (files[0], files[-1])] == [1, 2]


def test_features_of_each_token(model: rlt.VisionTransformer, folder: Path) -> None:
    rows = Encoder(model, outputs=["tokens", "embedding"])({"video": [folder / "c.mp4"]})
    clips = list(iter_clips(folder / "c.mp4", num_frames=4, frame_stride=3, size=32))
    for place, clip in enumerate(clips):
        packed = model.tokenize(clip, rule=RULE)
        with torch.inference_mode():
            features = model.forward_tokens(packed)
        assert torch.allclose(torch.from_numpy(np.stack(rows["features"][place])), features, atol=1e-5)
        tokens = RunLengthTokens(
            packed.patches,
            torch.from_numpy(np.stack(rows["coords"][place])),
            torch.from_numpy(rows["run_lengths"][place]),
            TokenGrid(*rows["grid"][place]),
            packed.spec,
        ).validate()
        assert tokens.expand(features).shape[:3] == tokens.grid
    assert rows["embedding"][0].dtype == np.float32


def test_what_is_typed_wins_over_what_is_stored(stored: Path, folder: Path) -> None:
    assert Encoder(stored).windows.clip == CLIP
    assert Encoder(stored).rule == RULE
    typed = Encoder(stored, window=8, fps=5, size=48, threshold=0.4, exposure="gain")
    assert (typed.windows.clip, typed.rule) == (ClipSpec(8, fps=5, size=48), Threshold(0.4, exposure="gain"))
    assert Encoder(stored, rule="none").rule == Everything()
    kept = Encoder(stored, rule="none")({"video": [folder / "b.mp4"]})["tokens_kept"]
    assert kept == [1.0]
    assert Encoder("vit_micro").is_random
    assert not Encoder(stored).is_random


def test_sources(folder: Path, tmp_path: Path) -> None:
    files = [str(folder / f"{name}.mp4") for name in "abc"]
    entries = (VideoEntry(files[0], 0, "x", 50), VideoEntry(str(tmp_path / "gone.mp4"), 0, "x", status="missing"))
    write_manifest(Manifest(entries, ("x",)), tmp_path / "m.csv")
    (tmp_path / "list.txt").write_text(f"# mine\n{files[1]}\n\nnone.mp4\n")
    assert list_sources([folder]) == dict.fromkeys(files)
    assert list_sources([tmp_path / "m.csv", tmp_path / "list.txt", files[1]]) == {
        files[0]: None, str(tmp_path / "gone.mp4"): "missing", files[1]: None, str(tmp_path / "none.mp4"): None,
    }  # fmt: skip
    address = folder.as_uri()
    assert list(list_sources([address])) == [f"{address}/{name}.mp4" for name in "abc"]
    assert list(list_sources([f"{address}/b.mp4"])) == [f"{address}/b.mp4"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (
        (tmp_path / "none", "no such file"),
        (tmp_path / "empty.txt", "names no video"),
        ("nowhere://x/y", "no address of a store"),
        (tmp_path.as_uri() + "/none", "no videos there"),
    ):
        with pytest.raises((VideoError, InvalidArgumentError), match=message):
            list_sources([name])


def test_a_store_by_its_address(model: rlt.VisionTransformer, folder: Path) -> None:
    encoder = Encoder(model, outputs=["embedding"])
    rows = encoder({"video": [f"{folder.as_uri()}/c.mp4", folder / "c.mp4", f"{folder.as_uri()}/none.mp4"]})
    ours, theirs = (
        embeddings({"embedding": rows["embedding"][:4]})[:2],
        embeddings({"embedding": rows["embedding"][2:4]}),
    )
    assert np.array_equal(ours, theirs)
    assert "cannot be opened" in rows["error"][4]


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("ending", [".parquet", ".json"])
def test_a_run_goes_on_exactly_once(
    stored: Path, folder: Path, tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_ROWS", 2)
    outputs = ("embedding",) if ending == ".parquet" else ("classes",)
    encoder = Encoder(stored, outputs=outputs, token_budget=1)
    (tmp_path / "list.txt").write_text(f"{folder}/a.mp4\nnone.mp4\n{folder}/b.mp4\n{folder}/c.mp4\n")
    videos, whole, target = [tmp_path / "list.txt"], tmp_path / f"whole{ending}", tmp_path / f"f{ending}"
    at_once = encode_videos(encoder, videos, output=whole)
    stops = 0
    told: list[int] = []

    def stop_after_three(done: int, total: int, what: str) -> None:
        told.append(done)
        assert 0 <= done <= total == 400
        if len(told) % 4 == 0:
            raise StoppedError

    for _ in range(20):
        try:
            result = encode_videos(encoder, videos, output=target, on_progress=stop_after_three)
            break
        except StoppedError:
            stops += 1
            assert not target.exists()
            with pytest.raises(InvalidArgumentError, match="has rows of a run with another rule; give"):
                encode_videos(Encoder(stored, outputs=outputs, threshold=0.7), videos, output=target)
    assert stops >= 2
    assert result.num_before > 0
    assert result.num_before + result.num_rows == at_once.num_rows
    assert [source for source, _ in result.failed] == [str(tmp_path / "none.mp4")]
    assert not (tmp_path / f"f{ending}.parts").exists()
    if ending == ".parquet":
        ours, about = read_table(target)
        theirs, _ = read_table(whole)
        assert json.loads(about["summary"])["failed"][0]["source"] == str(tmp_path / "none.mp4")
        assert list(ours) == list(kinds_of(outputs))
    else:
        ours, theirs = (json.loads(path.read_text())["rows"] for path in (target, whole))
    assert ours == theirs
    again = encode_videos(encoder, videos, output=target)  # nothing is left to go on with: anew
    assert again.num_rows == at_once.num_rows


def test_a_file_is_written_by_one_process_and_by_the_same_weights(
    model: rlt.VisionTransformer, folder: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    encoder, target = Encoder(tmp_path / "model", outputs=["embedding"]), tmp_path / "f.parquet"
    with parts.Parts(target, encoder.outputs, encoder.settings()) as mine:
        with pytest.raises(InvalidArgumentError, match="is being written by another process"):
            encode_videos(encoder, [folder], output=target)
        mine.add(next(encoder.run(encoder.cut({"video": [folder / "b.mp4"]}))).row)
        mine.write()
    [part] = mine.paths()
    content = part.read_bytes()
    part.write_bytes(b"PAR1")
    with pytest.raises(InvalidArgumentError, match="not a whole Parquet file"):
        encode_videos(encoder, [folder], output=target)
    part.write_bytes(content)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InvalidArgumentError, match="has rows of a run with another weights; give"):
        encode_videos(Encoder(tmp_path / "model", outputs=["embedding"]), [folder], output=target)


def test_exact_forms(
    stored: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stop:
            cli.main(list(map(str, arguments)))
        return int(stop.value.code or 0)

    assert command("predict", stored, folder, "--json", "p.json") == 0
    rows = json.loads(Path("p.json").read_text())["rows"]
    assert {row["top_names"][0] for row in rows} <= set(LABELS)
    assert "3 videos, 8 windows" in " ".join(capsys.readouterr().out.split())
    assert command("features", stored, folder, "--window", "8", "--output", "f.parquet", "--json", "n.json") == 0
    columns = read_table("f.parquet")[0]
    assert {"source", "start", "end", "tokens_kept", "embedding", "error"} <= columns.keys()
    assert len(columns["source"]) == json.loads(Path("n.json").read_text())["num_rows"] == 5
    assert command("features", stored, folder, "--per-token", "--every", "1", "--output", "t.parquet") == 0
    assert [len(row) for row in read_table("t.parquet")[0]["features"]] == read_table("t.parquet")[0]["num_tokens"]
    capsys.readouterr()
    (tmp_path / "bad.mp4").write_text("x")
    assert command("predict", stored, "bad.mp4") == 2
    for arguments, message in (
        (["predict", "none", folder], "model is 'none'; allowed are vit_micro"),
        (["predict", "runs/none", folder, "--output", "x.parquet", "--json", "y.json"], "give one of them"),
        (["predict", stored, folder, "--output", "x.txt"], "a file that ends in .parquet or .json is needed"),
        (["predict", stored, folder, "--workers", "2"], "engine is local and workers is 2"),
        (["features", stored, folder, "--output", folder / "a.mp4"], "ends in .parquet"),
        (["predict", stored, folder, "--json", folder / "a.mp4"], "ends in .parquet or .json"),
        (["predict", stored, tmp_path / "p.json", "--json", "p.json"], "is the same file as"),
        (["predict", stored, folder, "--engine", "dask"], "engine is 'dask'; allowed are local, ray"),
    ):
        assert command(*arguments) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert command("predict", "vit_micro", folder / "b.mp4") == 0
    assert "Weights: random" in capsys.readouterr().out


def test_a_full_disk_is_one_line_and_loses_nothing(stored: Path, folder: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from rlt import cli\n"
        "from rlt.encoding import parts\n"
        "parts._ROWS = 2\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "cli.main(sys.argv[1:])\n"
    )
    arguments = ["features", str(stored), str(folder), "--output", str(tmp_path / "f.parquet"), "--batch-tokens", "1"]
    full = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "cannot be written" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "f.parquet").exists()
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert not stop.value.code
    columns = read_table(tmp_path / "f.parquet")[0]
    assert len(set(zip(columns["source"], columns["window"], strict=True))) == len(columns["source"]) == 8


def test_a_row_of_a_data_set() -> None:
    """As those of Hugging Face keep videos that are not decoded."""
    path = str(assets.path("traffic.mp4"))
    videos = [path, {"bytes": None, "path": path}, {"bytes": Path(path).read_bytes(), "path": None}]
    encoder = Encoder("vit_micro", outputs=["embedding"], size=64, window=8)
    rows, *others = (encoder({"video": [video]}) for video in videos)
    assert [other["tokens_kept"] for other in others] == [rows["tokens_kept"]] * 2
    assert [other["source"][0] for other in others] == [path, "<bytes>"]
    assert rows["start"] == sorted(rows["start"])
    assert all(0 < share < 1 for share in rows["tokens_kept"])

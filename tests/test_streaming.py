"""Sources that may never end: files that grow, pipes, addresses that drop connections, slow and fast ones."""

from __future__ import annotations

import io
import os
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import rlt
from models import TINY
from rlt import assets
from rlt.cli.main import main
from rlt.errors import InvalidArgumentError, VideoError
from rlt.streaming import _newest
from rlt.structures import Clip
from rlt.video import ClipSpec, iter_clips
from rlt.video.live import LiveClip, LiveSettings, is_live, live_clips
from video_factory import numbered_picture, read_number, write_video

SPEC = ClipSpec(4, 3, size=(48, 80))
QUICK = LiveSettings(stall_seconds=0.4, reconnects=2)


def made(container: str, num_frames: int = 40, **options: object) -> bytes:
    file = io.BytesIO()
    write_video(file, num_frames, container=container, **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.fixture(scope="module")
def transport() -> bytes:
    return made("mpegts", options={"g": "10"})


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, as far as the command looks at it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    rlt.VisionTransformer(TINY.replace(labels=tuple("abcdefg"))).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def model() -> rlt.VisionTransformer:
    torch.manual_seed(0)
    return rlt.VisionTransformer(TINY).eval()


def numbers(clips: Iterator[LiveClip]) -> list[int]:
    """Which pictures were taken, those that repeat at the end left out."""
    found = []
    for live in clips:
        count = len(live.clip.frames) - live.clip.num_repeated
        found += [read_number(picture.numpy()) for picture in live.clip.frames[:count]]
    return found


@pytest.mark.parametrize("spec", [SPEC, ClipSpec(5, fps=7, size=32), ClipSpec(16, 1, size=32)])
@pytest.mark.parametrize("name", assets.names())
def test_a_file_gives_the_clips_of_iter_clips(name: str, spec: ClipSpec) -> None:
    path = assets.path(name)
    rate = {"frame_stride": spec.frame_stride} if spec.fps is None else {"fps": spec.fps}
    theirs = list(islice(iter_clips(path, num_frames=spec.num_frames, size=spec.size, num_threads=1, **rate), 6))
    ours = list(islice(live_clips(path, spec), 6))
    assert len(ours) == len(theirs)
    for live, clip in zip(ours, theirs, strict=True):
        assert torch.equal(live.clip.frames, clip.frames)
        assert torch.equal(live.clip.times, clip.times)
        assert live.clip.num_repeated == clip.num_repeated
    assert [live.goes_on for live in ours] == [False, *[True] * (len(ours) - 1)]


@pytest.mark.parametrize("carry", [False, True])
def test_windows_are_those_of_tokenize_and_of_the_network(model: rlt.VisionTransformer, carry: bool) -> None:
    path = assets.path()
    spec = ClipSpec(4, 4, size=32)
    windows = list(rlt.stream(path, model, clip=spec, carry=carry, max_windows=3))
    state = rlt.TokenStream(spec=TINY.patches)
    for index, (window, clip) in enumerate(zip(windows, iter_clips(path, num_frames=4, size=32), strict=False)):
        tokens = state.push(clip.frames) if carry else rlt.tokenize(clip, spec=TINY.patches)
        assert isinstance(tokens, rlt.RunLengthTokens)
        assert torch.equal(window.tokens.patches, tokens.patches)
        assert torch.equal(window.tokens.lengths, tokens.lengths)
        assert window.logits is not None
        with torch.inference_mode():
            torch.testing.assert_close(window.logits, model(rlt.pack(tokens))[0])
            torch.testing.assert_close(window.features, model.forward_features(rlt.pack(tokens))[0])
        assert (window.index, window.start, window.num_dropped) == (index, float(clip.times[0]), 0)
        assert window.latency_seconds >= 0
    assert len(windows) == 3


@pytest.mark.parametrize("rule", [rlt.Everything(), rlt.Budget(keep_ratio=0.5)])
def test_rules_that_look_at_a_whole_clip_go_without_carry(model: rlt.VisionTransformer, rule: rlt.Rule) -> None:
    spec = ClipSpec(4, 4, size=32)
    [window] = rlt.stream(assets.path(), model, clip=spec, rule=rule, max_windows=1)
    clip = next(iter_clips(assets.path(), num_frames=4, size=32))
    assert torch.equal(window.tokens.coords, rlt.tokenize(clip, rule=rule, spec=TINY.patches).coords)
    with pytest.raises(InvalidArgumentError, match="does not go on from window to window"):
        rlt.stream(assets.path(), model, clip=spec, rule=rule, carry=True)


def piped(data: bytes, *, chunk: int = 5000, pause: float = 0.0, hang: float = 0.0) -> int:
    """A pipe that the bytes come through, and its reading end."""
    read_end, write_end = os.pipe()

    def write() -> None:
        try:
            for begin in range(0, len(data), chunk):
                os.write(write_end, data[begin : begin + chunk])
                time.sleep(pause)
            time.sleep(hang)
        except BrokenPipeError:
            pass
        os.close(write_end)

    threading.Thread(target=write, daemon=True).start()
    return read_end


@pytest.mark.parametrize("container", ["mpegts", "matroska", "mp4", "fragmented"])
def test_pipes_of_any_container(container: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"container_options": {"movflags": "frag_keyframe+empty_moov"}} if container == "fragmented" else {}
    data = made("mp4" if flags else container, **flags)
    with open(piped(data), "rb") as pipe:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        assert numbers(live_clips("-", SPEC)) == list(range(0, 40, 3))


def test_a_named_pipe_and_a_source_slower_than_the_network(transport: bytes, tmp_path: Path) -> None:
    path = tmp_path / "camera"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb") as file:
            for begin in range(0, len(transport), 4000):
                file.write(transport[begin : begin + 4000])
                file.flush()
                time.sleep(0.01)

    threading.Thread(target=write, daemon=True).start()
    assert numbers(live_clips(path, SPEC)) == list(range(0, 40, 3))


def test_a_pipe_that_stalls_is_one_line(transport: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(piped(transport[: len(transport) // 2], hang=3), "rb") as pipe:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        with pytest.raises(VideoError, match=r"^standard input: stalled, nothing came for 0\.4 s"):
            list(live_clips("-", SPEC, QUICK))


def test_a_pipe_that_brings_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(piped(b""), "rb") as pipe:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(pipe))
        with pytest.raises(VideoError, match="0 bytes"):
            next(live_clips("-", SPEC))


def test_a_file_that_still_grows_is_followed(transport: bytes, tmp_path: Path) -> None:
    path, half = tmp_path / "recording.ts", len(transport) // 2
    path.write_bytes(transport[:half])

    def write() -> None:
        time.sleep(0.3)
        with path.open("ab") as file:
            file.write(transport[half:])

    threading.Thread(target=write, daemon=True).start()
    assert numbers(live_clips(path, SPEC, LiveSettings(follow_seconds=2))) == list(range(0, 40, 3))


class Server(ThreadingHTTPServer):
    """Gives a file, and drops each of the first `drops` connections in the middle of what it still has to give."""

    daemon_threads = True

    def __init__(self, data: bytes, *, drops: int = 0, ranges: bool = True, stalls: bool = False) -> None:
        self.data, self.drops, self.ranges, self.stalls = data, drops, ranges, stalls
        self.requests = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/video"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests += 1
        asked = self.headers.get("Range", "")
        begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked and self.server.ranges else 0
        data = self.server.data[begin:]
        self.send_response(206 if asked and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(data)))
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
            total = len(self.server.data)
            self.send_header("Content-Range", f"bytes {begin}-{total - 1}/{total}")
        self.end_headers()
        try:
            if self.server.stalls:
                time.sleep(2)
            elif self.server.drops:
                self.server.drops -= 1
                self.wfile.write(data[: len(data) * 2 // 3])
            else:
                self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve() -> Iterator[type[Server]]:
    servers: list[Server] = []

    def start(*args: object, **options: object) -> Server:
        servers.append(Server(*args, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start  # type: ignore[misc]
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_address_and_one_that_drops_its_connection_lose_nothing(serve: type[Server], transport: bytes) -> None:
    assert numbers(live_clips(serve(transport).address, SPEC)) == list(range(0, 40, 3))
    dropping = serve(transport, drops=1)
    assert numbers(live_clips(dropping.address, SPEC)) == list(range(0, 40, 3))
    assert dropping.requests > 1


def test_a_source_that_cannot_go_on_where_it_was_is_opened_again_and_says_so(
    serve: type[Server], transport: bytes
) -> None:
    server = serve(transport, drops=1, ranges=False)
    clips = list(live_clips(server.address, SPEC, LiveSettings(stall_seconds=4)))
    begins = [index for index, live in enumerate(clips) if not live.goes_on]
    assert len(begins) == 2
    assert numbers(iter(clips[begins[1] :])) == list(range(0, 40, 3))
    assert [bool(live.notes) for live in clips] == [index == begins[1] for index in range(len(clips))]
    assert "opened again" in clips[begins[1]].notes[0]


def test_a_source_that_does_not_come_back_is_one_line(serve: type[Server], transport: bytes) -> None:
    server = serve(transport, stalls=True)
    with pytest.raises(VideoError, match="127"):
        list(live_clips(server.address, SPEC, LiveSettings(stall_seconds=0.3, reconnects=1)))
    with pytest.raises(VideoError, match="cannot be opened as video"):
        list(live_clips("http://127.0.0.1:9/none", SPEC, LiveSettings(reconnects=0)))


class Camera(socketserver.ThreadingTCPServer):
    """As much RTSP as it takes to give a transport stream over one TCP connection, which is dropped at its end."""

    daemon_threads = allow_reuse_address = True

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.requests = 0
        super().__init__(("127.0.0.1", 0), _Conversation)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"rtsp://127.0.0.1:{self.server_address[1]}/camera"


class _Conversation(socketserver.StreamRequestHandler):
    server: Camera

    def handle(self) -> None:
        self.server.requests += 1
        description = (
            "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:one\r\n"
        )
        answers = {
            "OPTIONS": ("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n", ""),
            "DESCRIBE": ("Content-Type: application/sdp\r\n", description),
            "SETUP": ("Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n", ""),
            "PLAY": ("Session: 1\r\n", ""),
        }
        while line := self.rfile.readline().decode():
            method, number = line.split()[0], "0"
            while (header := self.rfile.readline().decode().strip()) != "":
                number = header.split(":")[1].strip() if header.lower().startswith("cseq") else number
            if method not in answers:
                return
            headers, body = answers[method]
            text = f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\n{headers}Content-Length: {len(body)}\r\n\r\n{body}"
            self.wfile.write(text.encode())
            if method == "PLAY":
                with suppress(OSError):
                    self._play()
                return

    def _play(self) -> None:
        for number, begin in enumerate(range(0, len(self.server.data), 7 * 188)):
            payload = self.server.data[begin : begin + 7 * 188]
            packet = struct.pack(">BBHII", 0x80, 33, number & 0xFFFF, number * 900, 7) + payload
            self.wfile.write(struct.pack(">cBH", b"$", 0, len(packet)) + packet)


def test_a_camera_is_opened_again_when_it_stops(transport: bytes) -> None:
    camera = Camera(transport)
    try:
        clips = live_clips(camera.address, SPEC, LiveSettings(reconnects=1))
        came = list(islice(clips, 6))
        clips.close()  # type: ignore[attr-defined]
    finally:
        camera.shutdown()
        camera.server_close()
    assert is_live(camera.address)
    assert camera.requests == 2
    begins = [index for index, live in enumerate(came) if not live.goes_on]
    assert begins[0] == 0
    assert len(begins) == 2
    assert numbers(iter(came[: begins[1]])) == numbers(live_clips(io.BytesIO(transport), SPEC))
    assert "opened again" in came[begins[1]].notes[0]
    assert "a camera has no end" in came[begins[1]].notes[0]


def test_an_address_gives_no_file_of_this_machine(serve: type[Server], tmp_path: Path, transport: bytes) -> None:
    (tmp_path / "secret.ts").write_bytes(transport)
    playlist = f"#EXTM3U\n#EXTINF:1,\nfile:{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n".encode()
    with pytest.raises(VideoError, match="cannot be opened as video"):
        list(live_clips(serve(playlist).address, SPEC, LiveSettings(reconnects=0)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ftp://host/x", "addresses may begin with http"),
        ("concat://a|b", "addresses may begin with http"),
        ("none.mp4", "no such file or device"),
        (".", "is a folder"),
        (__file__, "cannot be opened as video"),
    ],
)
def test_what_is_no_source_is_one_line(source: str, message: str) -> None:
    with pytest.raises((VideoError, InvalidArgumentError), match=message):
        list(live_clips(source, SPEC))


def test_resolution_and_rate_may_change_in_the_middle() -> None:
    def wide(number: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return numbered_picture(number + 20).repeat(2, 0).repeat(2, 1)

    first = made("mpegts", 20)
    file = io.BytesIO()
    times = [20 * 3600 + number * 1800 for number in range(20)]  # 50 instead of 25 frames a second
    write_video(file, 20, container="mpegts", rate=50, pts=times, time_base=Fraction(1, 90_000), picture=wide)
    clips = list(live_clips(io.BytesIO(first + file.getvalue()), SPEC))
    assert all(live.clip.frames.shape == (4, 48, 80, 3) for live in clips)
    assert any("the picture is 320x192 now" in note for live in clips for note in live.notes)
    found = numbers(iter(clips))
    assert found[:6] == [0, 3, 6, 9, 12, 15]
    assert max(found) > 33


def test_times_that_jump_begin_a_new_row() -> None:
    times = [*range(20), *range(100_000, 100_020), *range(100, 110)]
    frames = iter(times)
    clips = list(live_clips(io.BytesIO(made("matroska", 40, pts=times[:40], time_base=Fraction(1, 25))), SPEC))
    begins = [live.goes_on for live in clips].count(False)
    assert begins == 2
    assert numbers(iter(clips)) == [*range(0, 20, 3), *range(20, 40, 3)]
    assert next(frames) == 0


def test_the_oldest_are_dropped_and_counted_where_the_network_is_too_slow() -> None:
    seen = threading.Event()

    def fast() -> Iterator[LiveClip]:
        for index in range(9):
            frames, times = torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.full((2,), index, dtype=torch.float64)
            yield LiveClip(Clip(frames, times), 0.0, notes=("lost",) if index == 3 else ())
            if index == 0:
                seen.wait(5)

    taken = _newest(fast())
    live, dropped = next(taken)
    assert (float(live.clip.times[0]), dropped) == (0, 0)
    seen.set()
    while threading.active_count() > 1 and any(
        thread.is_alive() and thread.name.endswith("(read)") for thread in threading.enumerate()
    ):
        time.sleep(0.01)
    rest = list(taken)
    assert [(float(live.clip.times[0]), dropped) for live, dropped in rest] == [(7, 6), (8, 0)]
    assert rest[0][0].notes == ("lost",)


def test_waiting_loses_nothing_and_a_failure_in_the_reader_is_raised(model: rlt.VisionTransformer) -> None:
    spec = ClipSpec(4, 4, size=32)
    waited = list(rlt.stream(assets.path(), model, clip=spec, when_late="wait", max_windows=5))
    assert [window.index for window in waited] == [0, 1, 2, 3, 4]
    with pytest.raises(VideoError, match="no such file"):
        list(rlt.stream("none.mp4", model, clip=spec, when_late="drop_oldest"))
    with pytest.raises(InvalidArgumentError, match="when_late is 'skip'"):
        rlt.stream("none.mp4", model, when_late="skip")


def test_watch_reads_a_pipe_and_shows_a_line_a_window(run_dir: Path, tmp_path: Path) -> None:
    code = "import sys; from rlt.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "watch", "-", str(run_dir), "--max-windows", "3"]
    with assets.path().open("rb") as video:
        done = subprocess.run(
            [*command, "--json", str(tmp_path / "sums.json")], stdin=video, capture_output=True, text=True, check=True
        )
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert "tokens/s" in lines[0]
    assert "saved), latency" in lines[0]
    assert lines[-1].startswith("3 windows, 0 dropped, ")
    assert '"windows": 3' in (tmp_path / "sums.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.mp4"], "no such file or device"),
        (["none.mp4", "--max-windows", "0"], "max_windows is 0"),
        (["none.mp4", "--stall", "0"], "stall_seconds is 0"),
        (["none.mp4", "--when-late", "skip"], "when_late is 'skip'"),
    ],
)
def test_bad_input_of_watch_is_one_line(
    run_dir: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(["watch", arguments[0], str(run_dir), *arguments[1:]])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err

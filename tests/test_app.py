"""The page of `rlt app` without a browser: what it shows held against the jobs that it stands on, and its server."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlt
from optional_packages import import_or_skip
from rlt import assets, cli
from rlt.app import AppSettings, looking, page, words
from rlt.app.looking import Session, load_clip, look_at, measure, savings
from rlt.compare import CompareSettings, compare
from rlt.errors import InvalidArgumentError, RltError, VideoError
from rlt.network.flops import forward_flops
from rlt.tokens import PatchView
from rlt.video import ClipSpec

TRAFFIC = str(assets.path("traffic.mp4"))
SETTINGS = AppSettings()


@pytest.fixture(scope="module")
def loaded() -> looking.LoadedClip:
    return load_clip(TRAFFIC, "vit_micro", 16, 4, SETTINGS)


@pytest.mark.parametrize(
    "rule",
    [
        rlt.Threshold(0.1),
        rlt.Threshold(0.3, reference="anchor"),
        rlt.Threshold(exposure="gain"),
        rlt.Budget(keep_ratio=0.3),
    ],
)
def test_what_is_kept_is_what_the_rule_keeps(loaded: looking.LoadedClip, rule: rlt.Rule) -> None:
    look = look_at(loaded, rule)
    clip = rlt.read_clip(TRAFFIC, num_frames=16, frame_stride=4)
    tokens = rlt.tokenize(clip.frames[None], rule=rule)[0]
    assert int(look.view.mask.sum()) == len(tokens.patches)
    assert look.kept_flops == forward_flops(loaded.config, len(tokens.patches))
    assert look.dense_flops == forward_flops(loaded.config, tokens.grid.num_tokens)
    assert f"{len(tokens.patches):,} of {tokens.grid.num_tokens:,}" in words.summary(loaded, look)


def test_differences_are_computed_once_for_all_thresholds(
    loaded: looking.LoadedClip, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at(loaded, rlt.Threshold(0.1))

    def again(_: PatchView) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(PatchView, "_compute_differences", again)
    shares = [look_at(loaded, rlt.Threshold(at)).scan.tokens_kept for at in (0.0, 0.05, 0.2, 0.4)]
    assert shares == sorted(shares, reverse=True)
    assert len(set(shares)) == 4


def test_measuring_is_rlt_compare(loaded: looking.LoadedClip) -> None:
    rule = rlt.Threshold(0.2)
    found = measure(loaded, rule, "cpu")
    expected = compare([TRAFFIC], CompareSettings(model="vit_micro", rule=rule, clip=ClipSpec(16, 4), repeats=1))
    assert found.videos[0].tokens == expected.videos[0].tokens
    assert found.videos[0].tokens["rlt"] == int(look_at(loaded, rule).view.mask.sum())
    assert found.videos[0].feature_cosine == pytest.approx(expected.videos[0].feature_cosine)
    said = words.measured(found)
    assert f"{found.speedup_forward:.2f}×" in said
    assert "random" in said
    assert "five best" not in said


def test_a_checkpoint_shows_its_classes_escaped(tmp_path: Path) -> None:
    model = rlt.create_model("vit_micro", num_classes=6)
    model.config = model.config.replace(labels=("<i>walk</i>", *"abcde"), rule=rlt.Threshold(0.2))
    model.save_pretrained(tmp_path / "run")
    settings = AppSettings(checkpoints=(str(tmp_path / "run"),), any_checkpoint=False)
    loaded = load_clip(TRAFFIC, str(tmp_path / "run"), 8, 2, settings)
    result = measure(loaded, rlt.Threshold(0.2), "cpu")
    said = words.measured(result)
    assert "five best with all tokens" in said
    assert said.count("<tr>") == 1 + 2 + 1 + 5
    assert "<i>" not in said
    assert {label for pair in result.videos[0].top("dense")[0] for label in [result.label(pair[0])]} <= set(
        model.config.labels
    )


def test_savings_are_hours_times_price(loaded: looking.LoadedClip) -> None:
    look = look_at(loaded, rlt.Threshold(0.1))
    found = savings(loaded, look, 10.0, 3.0, 50.0)
    seconds_per_clip = 16 * 4 / loaded.info.fps
    hours = 10 * 3600 / seconds_per_clip * look.dense_flops / 50e12 / 3600
    assert found.dense_hours == pytest.approx(hours)
    assert found.saved == pytest.approx(3 * hours * (1 - 1 / look.speedup))
    assert f"{found.saved:,.2f}" in words.saved(found)
    for numbers, message in (((-1, 1, 1), "hours of video is -1"), ((1, -2, 1), "price is -2"), ((1, 1, 0), "TFLOP/s")):
        with pytest.raises(InvalidArgumentError, match=message):
            savings(loaded, look, *numbers)


def test_what_visitors_may_not_do_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    cases: list[tuple[type[RltError], str, tuple[Any, ...], AppSettings]] = [
        (VideoError, r"text\.mp4", (str(tmp_path / "text.mp4"), "vit_micro", 16, 4), SETTINGS),
        (VideoError, "up to 2 s are taken", (TRAFFIC, "vit_micro", 16, 4), AppSettings(max_seconds=2)),
        (InvalidArgumentError, "frames is 66; 1 to 64", (TRAFFIC, "vit_micro", 66, 4), SETTINGS),
        (InvalidArgumentError, "stride is 0; 1 to 32", (TRAFFIC, "vit_micro", 16, 0), SETTINGS),
        (InvalidArgumentError, "7 frames are not a multiple", (TRAFFIC, "vit_micro", 7, 4), SETTINGS),
        (
            InvalidArgumentError,
            "model is '/etc'; allowed are",
            (TRAFFIC, "/etc", 16, 4),
            AppSettings(any_checkpoint=False),
        ),
    ]
    for kind, message, arguments, settings in cases:
        with pytest.raises(kind, match=message) as error:
            load_clip(*arguments, settings)
        assert "\n" not in str(error.value)
    large = tmp_path / "large.mp4"
    with large.open("wb") as file:
        file.truncate(1_000_001)
    with pytest.raises(VideoError, match="1 MB; up to 1 MB are taken"):
        load_clip(str(large), "vit_micro", 16, 4, AppSettings(max_megabytes=1))
    for options in ({"max_seconds": 0.0}, {"max_megabytes": 0}):
        with pytest.raises(InvalidArgumentError):
            AppSettings(**options)
    assert "<b>" not in words.problem("a <b>\n c")
    assert "\n" not in words.problem("a <b>\n c")


def test_a_session_takes_its_files_along() -> None:
    session = Session()
    (session.folder / "overlay.mp4").write_bytes(b"x")
    folder = session.folder
    session.close()
    assert not folder.exists()


def test_the_command_names_what_is_wrong_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import_or_skip("gradio")
    for given, message in (
        (["--checkpoint", str(tmp_path / "none")], "none"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--max-seconds", "0"], "max_seconds is 0.0"),
        (["--max-megabytes", "0"], "max_megabytes is 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["app", *given])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a server that keeps its files in a folder of its own."""
    import_or_skip("gradio")
    place, before = tmp_path_factory.mktemp("temporary"), tempfile.tempdir
    tempfile.tempdir = str(place)
    try:
        with page.serving(AppSettings(max_megabytes=2)) as address:
            yield address, place
    finally:
        tempfile.tempdir = before
    assert list(place.iterdir()) == []  # uploads, pictures and overlays are gone with the server


def test_the_server_shows_measures_and_refuses(server: tuple[str, Path], tmp_path: Path) -> None:
    client_of = import_or_skip("gradio_client")
    address, place = server
    port = int(re.findall(r"\d+", address)[-1])
    with pytest.raises(InvalidArgumentError, match=f"port is {port}, which cannot be served"), page.serving(port=port):
        pass
    assert address.startswith("http://127.0.0.1:")
    client = client_of.Client(address, verbose=False, analytics_enabled=False, download_files=str(tmp_path / "got"))

    def show(source: Path, threshold: float = 0.1) -> Any:
        video = client_of.handle_file(str(source))
        options = ("threshold", threshold, 0.3, "previous", "none", "none", 24, 2, 100)
        job = client.submit(video, "vit_micro", 16, 4, *options, api_name="/show")
        job.result()
        return job.outputs()  # first what is read at once, then the pictures

    mine = tmp_path / "mine.mp4"
    shutil.copyfile(TRAFFIC, mine)
    first = show(mine)
    loaded = load_clip(TRAFFIC, "vit_micro", 16, 4, SETTINGS)
    assert f"{look_at(loaded, rlt.Threshold(0.1)).scan.tokens_kept:.1%}" in str(first)
    assert f"{look_at(loaded, rlt.Threshold(0.3)).scan.tokens_kept:.1%}" in str(show(mine, 0.3))
    assert any(place.rglob("*.mp4"))
    assert "speed-up" in str(client.predict(api_name="/measure"))
    (tmp_path / "text.mp4").write_text("not a video")
    refused = str(show(tmp_path / "text.mp4"))
    assert re.search(r"text\.mp4: [^<]*</div>", refused)
    (tmp_path / "large.mp4").write_bytes(bytes(2_100_000))
    with pytest.raises(Exception, match=r"(?i)size|large|413"):
        show(tmp_path / "large.mp4")

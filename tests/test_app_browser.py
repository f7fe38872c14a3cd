"""The pages of `rlt app` and `rlt inspect` in a real browser: Chromium of Playwright, or what CHROMIUM names."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optional_packages import import_or_skip
from rlt import assets

sync_api = import_or_skip("playwright.sync_api")
import_or_skip("gradio")

from rlt.app import AppSettings, page  # noqa: E402
from rlt.checkpoints import model_config  # noqa: E402
from rlt.inspection import inspect_video  # noqa: E402
from rlt.inspection.charts import GREY_LEVELS_PER_UNIT  # noqa: E402
from rlt.network.flops import forward_flops  # noqa: E402

NETWORK = "vit_micro"
TIMEOUT = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; every test of the module skips without one."""
    named = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=named or None, args=["--no-sandbox"])
        except sync_api.Error:
            pytest.skip("no browser: run make test-browser, or name one in CHROMIUM")
        yield found
        found.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with page.serving(AppSettings(max_seconds=60)) as address:
        yield address


@pytest.fixture
def shown(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page after the bundled clip was drawn. A parameter changes the window."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 900}}))
    tab = context.new_page()
    tab.set_default_timeout(TIMEOUT)
    hosts: set[str] = set()
    tab.on("request", lambda sent: hosts.add(sent.url.split("/")[2] if sent.url.startswith("http") else "127.0.0.1"))
    tab.goto(address)
    tab.wait_for_selector("#sheet img")
    tab.wait_for_selector("#curve img")
    yield tab
    context.close()
    assert {host.partition(":")[0] for host in hosts} == {"127.0.0.1"}  # nothing came from elsewhere


def test_the_browser_refuses_what_is_elsewhere(shown: Any) -> None:
    blocked = shown.evaluate(
        """() => new Promise(resolve => {
            document.addEventListener("securitypolicyviolation", event => resolve(event.blockedURI));
            fetch("https://example.org/").catch(() => setTimeout(() => resolve("not refused"), 2000));
        })"""
    )
    assert blocked.startswith("https://example.org")


def kept(tab: Any) -> str:
    return str(tab.inner_text("#summary strong >> nth=0"))


def wait_for_other(tab: Any, before: str) -> str:
    tab.wait_for_function("before => document.querySelector('#summary strong')?.innerText !== before", arg=before)
    return kept(tab)


def test_the_slider_changes_what_is_kept(shown: Any) -> None:
    before = kept(shown)
    slider = shown.locator("#threshold input[type=range]")
    slider.fill("0.4")
    after = wait_for_other(shown, before)
    assert float(after.rstrip("%")) < float(before.rstrip("%"))
    assert "threshold 0.4" in shown.inner_text("#summary")
    slider.focus()
    slider.press("Home")
    assert float(wait_for_other(shown, after).rstrip("%")) > float(before.rstrip("%"))


def test_a_video_is_uploaded_and_a_bad_one_is_one_sentence(shown: Any, tmp_path: Path) -> None:
    before = kept(shown)
    shown.locator("#source button[aria-label='Clear']").click()
    shown.wait_for_selector("#problem [role=alert]")
    video = tmp_path / "my <b>.mp4"
    shutil.copyfile(assets.path(next(name for name in assets.names() if name != "traffic.mp4")), video)
    shown.locator("#source input[type=file]").set_input_files(str(video))
    shown.wait_for_selector("#summary strong")
    assert kept(shown) != before
    assert shown.locator("#problem [role=alert]").count() == 0
    assert shown.locator("#summary b").count() == 0
    shown.locator("#source button[aria-label='Clear']").click()
    shown.wait_for_selector("#problem [role=alert]")
    (tmp_path / "text.mp4").write_text("not a video")
    shown.locator("#source input[type=file]").set_input_files(str(tmp_path / "text.mp4"))
    shown.get_by_text("text.mp4:").wait_for()
    said = shown.inner_text("#problem")
    assert "\n" not in said.strip()
    assert shown.locator("#summary strong").count() == 0


def test_the_button_measures(shown: Any) -> None:
    shown.get_by_text("Clip, rule and network").click()
    network = shown.locator("#model input")
    network.fill(NETWORK)
    network.press("Enter")
    flops = forward_flops(model_config(NETWORK), 8 * 14 * 14) / 1e9
    shown.get_by_text(f"GFLOPs of {flops:,.1f}").wait_for()
    shown.locator("#measure").click()
    shown.wait_for_selector("#timing table")
    assert "from file to answer" in shown.inner_text("#timing")
    assert f"{NETWORK} on cpu" in shown.inner_text("#timing")
    assert "random" in shown.inner_text("#timing")


@pytest.mark.parametrize(
    "shown",
    [
        {"viewport": {"width": 390, "height": 844}},
        {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    ],
    indirect=True,
    ids=["phone", "dark"],
)
def test_nothing_lies_beside_a_window(shown: Any) -> None:
    wide, window = shown.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= window
    ink = shown.evaluate("getComputedStyle(document.querySelector('#summary strong')).color")
    bright = sum(int(value) for value in re.findall(r"\d+", ink)[:3]) > 3 * 128
    assert bright == (window == 1280)  # light letters in the dark, dark ones in the light


def test_the_threshold_of_an_inspection_moves_without_a_server(browser: Any, tmp_path: Path) -> None:
    report = inspect_video(assets.path(), tmp_path, size=64)
    tab = browser.new_page()
    tab.goto(report.paths["index.html"].as_uri())
    before = " ".join(tab.inner_text("#kept").split())
    assert f"keeps {report.tokens_kept:.1%}: {report.scan.num_kept:,} of {report.scan.num_tokens:,} tokens" in before
    slider = tab.locator("#threshold")
    for place in (0, 20, len(report.threshold_curve) - 1):
        threshold, share = report.threshold_curve[place]
        slider.fill(str(place))
        said = tab.inner_text("#kept")
        grey = threshold * GREY_LEVELS_PER_UNIT
        count = f"{round(share * report.scan.num_tokens):,} of {report.scan.num_tokens:,} tokens."
        assert said == f"Threshold {threshold:g} ({grey:.1f} grey levels of 255) keeps {100 * share:.1f}%: {count}"
    tab.close()

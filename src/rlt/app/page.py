"""The page itself. The only module that imports Gradio, and only when a page is built.

Nothing leaves the machine: Gradio's usage reports, its look for updates and its fonts from elsewhere are off.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlt import assets
from rlt.app import words
from rlt.app.looking import (
    MAX_FRAMES,
    MAX_STRIDE,
    AppSettings,
    Session,
    encode_overlay,
    load_clip,
    look_at,
    measure,
    savings,
)
from rlt.checks import one_of
from rlt.errors import InvalidArgumentError, MissingDependencyError, RltError
from rlt.inspection.charts import draw_contact_sheet, draw_tokens_against_threshold, draw_tokens_over_time
from rlt.loading import dropping_rule
from rlt.measure import check_device
from rlt.plots import figure_pixels, require_viz
from rlt.tokens import Rule, Threshold, choose_rule

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Hosts that only this machine can reach."""
_RULES = {"threshold": "What differs by more than a threshold", "keep_ratio": "A share of the tokens"}
_SHOWN = ("problem", "summary", "sheet", "overlay", "over_time", "curve", "timing", "money")
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_NOTHING_FROM_ELSEWHERE = f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
"""Holds the browser to it, whatever a component of Gradio would fetch."""
_SECONDS_KEPT = 3600  # files of visitors


def build(settings: AppSettings = AppSettings()) -> Any:
    """The page as a `gradio.Blocks`, not yet served. See `serve`.

    Raises:
        InvalidArgumentError: for an unknown device, or a checkpoint that is not there.
        CheckpointError: for a checkpoint that cannot be read.
        MissingDependencyError: if Gradio or matplotlib is not installed.
    """
    gr = _gradio()
    check_device(settings.device)
    for checkpoint in settings.checkpoints:
        settings.config_of(checkpoint)
    first = settings.checkpoints[0] if settings.checkpoints else "vit_base"
    stored = settings.config_of(first)
    clip, trained = stored.clip_spec, dropping_rule(stored)
    begin = trained if isinstance(trained, Threshold) else Threshold()
    clips = [(name.removesuffix(".mp4"), str(assets.path(name))) for name in assets.names()]
    with gr.Blocks(title="rlt", analytics_enabled=False, delete_cache=(600, _SECONDS_KEPT)) as page:
        session = gr.State(Session(), time_to_live=_SECONDS_KEPT, delete_callback=Session.close)
        gr.Markdown("# What repeats in a video\nPatches that stand still are dropped before the network sees them.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_id="controls"):
                limits = f"up to {settings.max_megabytes} MB and {settings.max_seconds:g} s"
                source = gr.Video(
                    str(assets.path()), label=f"Video ({limits})", sources=["upload"], elem_id="source", height=260
                )
                bundled = gr.Dropdown(clips, value=str(assets.path()), label="or a bundled clip", elem_id="bundled")
                threshold = gr.Slider(
                    0, max(0.5, begin.threshold), begin.threshold, step=0.005, label="Threshold", elem_id="threshold"
                )
                keep_ratio = gr.Slider(
                    0.05, 1, 0.3, step=0.05, label="Share of the tokens", visible=False, elem_id="keep_ratio"
                )
                with gr.Accordion("Clip, rule and network", open=False):
                    frames = gr.Slider(2, MAX_FRAMES, clip.num_frames, step=2, label="Frames", elem_id="frames")
                    stride = gr.Slider(1, MAX_STRIDE, clip.frame_stride or 4, step=1, label="Stride", elem_id="stride")
                    kind = gr.Radio([(text, name) for name, text in _RULES.items()], value="threshold", label="Keep")
                    reference = gr.Radio(["previous", "anchor"], value=begin.reference, label="Compared with")
                    exposure = gr.Radio(["none", "gain"], value=begin.exposure, label="Changes of exposure undone")
                    motion = gr.Radio(["none", "global"], value=begin.motion, label="Motion of the camera undone")
                    model = gr.Dropdown(
                        settings.models,
                        value=first,
                        label="Network or checkpoint",
                        info="Sizes have random weights." + " Or type a path or a hub id." * settings.any_checkpoint,
                        allow_custom_value=settings.any_checkpoint,
                        elem_id="model",
                    )
            with gr.Column(scale=5, min_width=300):
                problem = gr.HTML(elem_id="problem", padding=False)
                summary = gr.HTML(elem_id="summary")
                gr.Markdown("### Kept patches in colour, dropped ones dark")
                sheet = _picture(gr, "One frame per time step", format="jpeg", elem_id="sheet")
                gr.Markdown("### The same as a video, half as fast")
                overlay = gr.Video(
                    label="Overlay", show_label=False, loop=True, autoplay=True, height=300, buttons=["download"]
                )
                gr.Markdown("### Tokens over time")
                over_time = _picture(gr, "Share of tokens kept in each time step", elem_id="over_time")
                gr.Markdown("### Tokens against the threshold")
                curve = _picture(gr, "Share of tokens kept at every threshold", elem_id="curve")
                button = gr.Button("Measure the speed-up on this machine", variant="primary", elem_id="measure")
                timing = gr.HTML(elem_id="timing")
                gr.Markdown("## What would it save?")
                with gr.Row():
                    hours = gr.Number(10_000, label="Hours of video a day", minimum=0, min_width=140)
                    price = gr.Number(2, label="Price of an hour of the GPU", minimum=0, min_width=140)
                    speed = gr.Number(100, label="TFLOP/s that it reaches (assumed)", minimum=0.001, min_width=140)
                money = gr.HTML(elem_id="money")
        rule = [kind, threshold, keep_ratio, reference, exposure, motion]
        costs = [hours, price, speed]
        asked = [session, source, model, frames, stride, *rule, *costs]
        shown = [problem, summary, sheet, overlay, over_time, curve, timing, money]

        def show(session: Session, source: str | None, model: str, frames: int, stride: int, *options: Any) -> Any:
            """Everything but what is measured. What is wrong is one sentence, and the pictures go."""
            try:
                for values in _shown(session, settings, source, model, int(frames), int(stride), *options):
                    yield [values.get(name, gr.skip()) for name in _SHOWN]
            except (RltError, OSError) as error:
                session.look = None
                yield [words.problem(error), "", None, None, None, None, "", ""]

        def time_it(session: Session, progress: Any = gr.Progress()) -> Any:  # noqa: B008
            if session.loaded is None or session.look is None:
                return words.problem("there is no clip to measure; give a video first")
            try:
                tell = lambda done, total, what: progress((done, total), desc=what)  # noqa: E731
                return words.measured(measure(session.loaded, session.look.rule, settings.device, tell))
            except (RltError, OSError) as error:
                return words.problem(error)

        def cost(session: Session, *values: float | None) -> str:
            return _money(session, *values)

        quick: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden", "concurrency_limit": 2}
        events = [page.load, source.change, model.change, frames.release, stride.release, threshold.input]
        events += [keep_ratio.input, *(choice.input for choice in (kind, reference, exposure, motion))]
        gr.on(events, show, asked, shown, api_name="show", **quick)
        gr.on([number.input for number in costs], cost, [session, *costs], money, api_name="savings", **quick)
        bundled.input(lambda path: path, bundled, source, api_visibility="private", **quick)
        kind.input(_sliders_of, kind, [threshold, keep_ratio], api_visibility="private", **quick)
        button.click(time_it, session, timing, api_name="measure", concurrency_limit=1)
    return page.queue(max_size=32)


def _shown(
    session: Session,
    settings: AppSettings,
    source: str | None,
    model: str,
    frames: int,
    stride: int,
    *options: Any,
) -> Iterator[dict[str, Any]]:
    """What is shown by the names in `_SHOWN`: first what can be read at once, then what takes longer to draw."""
    if source is None:
        raise InvalidArgumentError("no video is chosen; drop one on the page or pick a bundled clip")
    rule, costs = _rule_of(*options[:6]), options[6:]
    loaded = session.loaded
    if loaded is None or (loaded.source, loaded.model, loaded.settings.num_frames, loaded.settings.frame_stride) != (
        source,
        model,
        frames,
        stride,
    ):
        loaded = load_clip(source, model, frames, stride, settings)
    look = look_at(loaded, rule)
    session.loaded, session.look = loaded, look
    said = {"summary": words.summary(loaded, look), "money": _money(session, *costs)}
    yield {"problem": "", "timing": "", **said, "sheet": figure_pixels(draw_contact_sheet(look.view))}
    yield {
        "over_time": figure_pixels(draw_tokens_over_time(look.scan)),
        "curve": figure_pixels(draw_tokens_against_threshold(look.scan, look.rule)),
        "overlay": str(encode_overlay(loaded, look, session.folder)),
    }


def _rule_of(kind: str, threshold: float, keep_ratio: float, reference: str, exposure: str, motion: str) -> Rule:
    one_of(_RULES, kind=kind)
    amount: dict[str, Any] = {"threshold": threshold} if kind == "threshold" else {"keep_ratio": keep_ratio}
    return choose_rule(**amount, reference=reference, exposure=exposure, motion=motion)


def _money(session: Session, *costs: float | None) -> str:
    if session.loaded is None or session.look is None:
        return ""
    try:
        hours, price, teraflops = (0.0 if value is None else value for value in costs)
        return words.saved(savings(session.loaded, session.look, hours, price, teraflops))
    except RltError as error:
        return words.problem(error)


def _sliders_of(kind: str) -> list[Any]:
    gr = _gradio()
    return [gr.update(visible=kind == name) for name in ("threshold", "keep_ratio")]


def _picture(gr: Any, says: str, format: str = "png", **options: Any) -> Any:  # noqa: A002
    buttons = ["fullscreen", "download"]  # the third one publishes
    return gr.Image(label=says, alt_text=says, show_label=False, format=format, buttons=buttons, **options)


@contextmanager
def serving(
    settings: AppSettings = AppSettings(),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
) -> Iterator[str]:
    """Serve the page while the block runs; gives its address. Files of visitors are gone afterwards.

    Args:
        settings: what it offers.
        host: of the network interface; 127.0.0.1 is reached from this machine alone.
        port: None takes the first free one from 7860.
        open_browser: whether to show the page in the browser of this machine.

    Raises:
        InvalidArgumentError: if the port is taken, and as `build`.
    """
    gr = _gradio()
    with tempfile.TemporaryDirectory(prefix="rlt-app-", ignore_cleanup_errors=True) as folder, _temporary_files(folder):
        page = build(settings)
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                inbrowser=open_browser,
                prevent_thread_lock=True,
                share=False,
                quiet=True,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size=settings.max_megabytes * 1_000_000,
                allowed_paths=[str(assets.path().parent)],
                theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=words.STYLE,
                head=_NOTHING_FROM_ELSEWHERE,
            )
        except (OSError, OverflowError) as error:
            raise InvalidArgumentError(f"port is {port}, which cannot be served ({error}); give another") from error
        try:
            yield address
        finally:
            page.close(verbose=False)


def serve(
    settings: AppSettings = AppSettings(),
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
) -> None:
    """Serve the page until Ctrl-C. Arguments and errors are those of `serving`."""
    with serving(settings, host=host, port=port, open_browser=open_browser):
        threading.Event().wait()


@contextmanager
def _temporary_files(folder: str) -> Iterator[None]:
    """Have Gradio, and sessions, keep their files in a folder of our own."""
    changed = {"GRADIO_TEMP_DIR": str(Path(folder) / "gradio")}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    earlier, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = earlier
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _gradio() -> Any:
    """Gradio, after it was told to keep to itself.

    Raises:
        MissingDependencyError: if it, or matplotlib, cannot be imported.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="True")
    try:
        import gradio
    except ImportError:
        raise MissingDependencyError(
            'the page needs gradio, which cannot be imported; install with: pip install "rlt[app]"'
        ) from None
    require_viz()
    return gradio

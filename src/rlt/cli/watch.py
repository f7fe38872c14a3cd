"""`rlt watch`: what a network says about a source that may never end, a line for each window."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from rlt.cli.console import messages, say, show
from rlt.cli.options import Device, JsonFile, Options, rule_options, with_options
from rlt.files import refuse_inputs, write_json

if TYPE_CHECKING:
    from rlt.streaming import StreamWindow


@with_options(asked=rule_options)
def watch(
    *,
    source: Annotated[
        str,
        typer.Argument(
            help="A file, - for standard input, an address (http, https, rtsp, rtsps), or a camera such as /dev/video0."
        ),
    ],
    model: Annotated[str, typer.Argument(help="A run's folder, a checkpoint, a model of transformers, or a hub id.")],
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    asked: Options,
    carry: Annotated[
        bool,
        typer.Option("--carry", help="Let patches that do not change keep their pixels from window to window."),
    ] = False,
    when_late: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="When the network is too slow: wait, or drop_oldest; cameras drop if it is not given, all else waits.",
        ),
    ] = None,
    follow: Annotated[float, typer.Option(help="Seconds to wait at the end of a file that is still written.")] = 0.0,
    stall: Annotated[float, typer.Option(help="Seconds without data after which a source counts as stalled.")] = 10.0,
    reconnects: Annotated[int, typer.Option(help="How often in a row an address or camera is opened again.")] = 5,
    device: Device = "cpu",
    json: JsonFile = None,
) -> None:
    """Run a network over a camera, a pipe, an address or a file, and show each window as it comes."""
    from rlt.streaming import load_trained, stream
    from rlt.tokens import choose_rule
    from rlt.video.live import LiveSettings

    if json is not None:
        refuse_inputs([json], [source, model])
    settings = LiveSettings(stall_seconds=stall, follow_seconds=follow, reconnects=reconnects)
    with messages.status(f"Loading {model}"):
        network = load_trained(model)
    windows = stream(
        source,
        network,
        rule=choose_rule(**asked, stored=network.config.rule),
        carry=carry,
        when_late=when_late,
        max_windows=max_windows,
        settings=settings,
        device=device,
    )
    tally = _Tally()
    try:
        for window in windows:
            tally.add(window)
            for note in window.notes:
                say(f"warning: {note}", "yellow")
            show(f"{window_line(window, network.config.labels)}, {tally.tokens_per_second:,.0f} tokens/s")
    finally:  # also of a source that fails, and after Ctrl-C
        if tally.windows:
            show(tally.line())
        if json is not None:
            write_json(json, tally.to_json())


def window_line(window: StreamWindow, labels: tuple[str, ...]) -> str:
    """A window in one line."""
    tokens, seen = window.tokens, len(window.tokens) - window.num_reused
    parts = [
        f"{window.start:.2f}-{window.end:.2f} s",
        f"{seen:,} of {tokens.grid.num_tokens:,} tokens ({1 - seen / tokens.grid.num_tokens:.0%} saved)",
        f"latency {window.latency_seconds:.2f} s",
    ]
    if window.logits is not None:
        share, label = window.logits.softmax(0).max(0)
        parts.append(f"{labels[int(label)] if labels else f'class {int(label)}'} {float(share):.0%}")
    parts += [f"scene change at {seconds:.2f} s" for seconds in window.scene_changes]
    if window.num_dropped:
        parts.append(f"{window.num_dropped} dropped before")
    return ", ".join(parts)


class _Tally:
    """Sums over all windows."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.windows = self.dropped = self.tokens = self.tokens_dense = self.scene_changes = 0
        self.latency = 0.0

    def add(self, window: StreamWindow) -> None:
        """Count a window."""
        self.windows += 1
        self.dropped += window.num_dropped
        self.tokens += len(window.tokens) - window.num_reused
        self.tokens_dense += window.tokens.grid.num_tokens
        self.scene_changes += len(window.scene_changes)
        self.latency = max(self.latency, window.latency_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Since the beginning, with what was waited."""
        return self.tokens / max(time.monotonic() - self.begin, 1e-9)

    def line(self) -> str:
        """All of it in one line."""
        saved = 1 - self.tokens / self.tokens_dense
        return (
            f"{self.windows} windows, {self.dropped} dropped, {self.tokens:,} of {self.tokens_dense:,} tokens "
            f"({saved:.0%} saved), {self.tokens_per_second:,.0f} tokens/s, latency up to {self.latency:.2f} s"
        )

    def to_json(self) -> dict[str, float]:
        """Numbers by name; times in seconds."""
        return {
            "windows": self.windows,
            "windows_dropped": self.dropped,
            "tokens": self.tokens,
            "tokens_dense": self.tokens_dense,
            "scene_changes": self.scene_changes,
            "tokens_per_second": self.tokens_per_second,
            "latency_seconds_max": self.latency,
        }

"""`rlt app`: the page that a video is dropped on."""

from __future__ import annotations

from typing import Annotated

import typer

from rlt.cli.console import messages, say, show


def app(
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(help="Offer this checkpoint too (folder of a run, file, folder or hub id); may stand repeatedly."),
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to serve on; this machine alone if not given.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port; the first free one from 7860 if not given.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="Where speed is measured: cpu or cuda.")] = "cpu",
    max_seconds: Annotated[float, typer.Option(help="Longest video that is taken.")] = 600.0,
    max_megabytes: Annotated[int, typer.Option(help="Largest file that is taken.")] = 200,
    open_browser: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Serve a page on this machine: drop a video on it, move a threshold, see what is saved."""
    import signal
    import threading
    from contextlib import ExitStack

    from rlt.app.looking import AppSettings
    from rlt.app.page import LOCAL, serving

    settings = AppSettings(
        checkpoints=tuple(checkpoint or ()),
        any_checkpoint=host in LOCAL,
        device=device,
        max_seconds=max_seconds,
        max_megabytes=max_megabytes,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does, and takes its files along
    with ExitStack() as running:
        with messages.status("Starting"):
            address = running.enter_context(serving(settings, host=host, port=port, open_browser=open_browser))
        show(f"Serving {address} until Ctrl-C; videos stay on this machine.")
        if host not in LOCAL:
            say(f"warning: whoever reaches {host} can use this machine for it", "yellow")
        threading.Event().wait()

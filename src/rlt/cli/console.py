"""Results on standard output, progress and messages on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

output = Console()
"""Results: standard output."""
messages = Console(stderr=True)
"""Progress, warnings and errors: standard error."""

_SECONDS_BETWEEN_LINES = 5.0  # of progress, where there is no terminal


def show(text: str) -> None:
    """Print a line of results as it is; a path that is broken cannot be copied."""
    output.print(text, markup=False, highlight=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """Print a message as it is, in one line."""
    messages.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far work is while the block runs: a bar, or a line every few seconds where there is no terminal.

    The function that it gives is called with (steps done, steps in all, what is worked on).
    """
    if not messages.is_terminal:
        yield _progress_lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Progress(*columns, console=messages, transient=True) as bar:
        task = bar.add_task(title, total=None, what="")
        yield lambda done, total, what: bar.update(task, completed=done, total=total, what=what)


@contextmanager
def kept_after_ctrl_c(folder: str | Path | None) -> Iterator[None]:
    """Say, where Ctrl-C ends the block, what is left of the work: what lies in `folder`, or nothing without one."""
    try:
        yield
    except KeyboardInterrupt:
        kept = (
            "nothing is kept" if folder is None else f"what was measured lies in {folder}; the same line goes on there"
        )
        say(f"stopped: {kept}", "yellow")
        raise


def _progress_lines(title: str) -> Callable[[int, int, str], None]:
    begin = last = time.monotonic()

    def update(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() >= last + _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            left = "" if not 0 < done < total else f", about {_duration((last - begin) / done * (total - done))} left"
            say(f"{title}: {done:,} of {total:,}{left}, {what}")

    return update


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"

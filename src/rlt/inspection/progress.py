"""A progress bar for people, kept apart from the work that it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(label: str, *, console: Console | None = None) -> Iterator[Callable[[str, float], None]]:
    """Show a bar while the block runs, and give the function that moves it: `inspect_video(..., progress=bar)`.

    Args:
        label: written before the bar, such as the file's name.
        console: where to draw; by default the standard error stream. Nothing is drawn where that is no terminal.
    """
    columns = (
        TextColumn("{task.fields[label]}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.description}", style="dim", markup=False),
        TimeRemainingColumn(),
    )
    console = console or Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, label=label)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)

"""The command line `rlt`."""

from rlt.cli.main import app, main
from rlt.cli.watch import watch

app.command("watch")(watch)

__all__ = ["app", "main"]

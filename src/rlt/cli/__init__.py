"""The command line `rlt`."""

from rlt.cli.main import app, main

__all__ = ["app", "main"]

"""PyAV, imported when a video is first opened: all that reads no video works without it. The only importer of it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from rlt.errors import MissingDependencyError

__all__ = ["av"]

if TYPE_CHECKING:
    import av
else:

    class _Library:
        """Stands for the module until something of it is asked for."""

        def __getattr__(self, name: str) -> object:
            try:
                return getattr(import_module("av"), name)
            except ImportError as error:
                raise MissingDependencyError(
                    f"PyAV cannot be imported ({error}), which reads and writes videos; install it with: pip install av"
                ) from error

    av = _Library()

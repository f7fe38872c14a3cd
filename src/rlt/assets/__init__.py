"""Two short real clips that come with the package; their authors and licences stand in ATTRIBUTION.md beside them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from rlt.checks import one_of


def names() -> list[str]:
    """Names of the bundled clips, sorted."""
    return sorted(entry.name for entry in files(__name__).iterdir() if entry.name.endswith(".mp4"))


def path(name: str = "traffic.mp4") -> Path:
    """Where a bundled clip lies.

    Raises:
        InvalidArgumentError: if there is no clip of that name.
    """
    one_of(names(), clip=name)
    return Path(str(files(__name__) / name))

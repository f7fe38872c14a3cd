"""Packages that some machines cannot import."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest


def import_or_skip(name: str) -> Any:
    """The package; otherwise the module that asks is skipped.

    Not `pytest.importorskip`: torchvision, which timm and video processors need, fails with a RuntimeError beside a
    torch that it was not built for.
    """
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}", allow_module_level=True)

"""A pytest plugin that patches every model that `rlt.patch` knows as soon as it is built, with nothing dropped.

What docs/adapters.md asks of users is done for the tests: each model has a configuration of its own, attention has no
dropout, and outputs per token come back on the full grid.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transformers

import rlt
from rlt.adapters import ADAPTERS

_built = {"depth": 0, "patched": 0}


def _patching(construct: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which patches the outermost model: those within it are its own matter."""

    @functools.wraps(construct)
    def build(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        if _built["depth"] == 0:
            config = _own_config(config)
        _built["depth"] += 1
        try:
            construct(self, config, *arguments, **named)
        finally:
            _built["depth"] -= 1
        if _built["depth"] == 0:
            rlt.patch(self, rule="none", expand="fill")
            _built["patched"] += 1

    return build


def _own_config(config: Any) -> Any:
    """A copy without dropout in attention."""
    config = copy.deepcopy(config)
    for part in (config, getattr(config, "vision_config", None)):
        for name in ("attention_dropout", "attention_probs_dropout_prob"):
            if getattr(part, name, 0):
                setattr(part, name, 0.0)
    return config


def pytest_configure() -> None:
    """Wrap the constructors before the tests are collected."""
    names = [name for adapter in ADAPTERS if adapter.library == "transformers" for name in adapter.model_classes]
    for name in names:
        kind: Any = getattr(transformers, name, None)
        if kind is not None:
            kind.__init__ = _patching(kind.__init__)


@pytest.fixture(scope="session", autouse=True)
def count_patched(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    """Leave in the report how many models were patched, so that a run that patched none is seen."""
    yield
    record_testsuite_property("patched", _built["patched"])

"""The files of examples/ run as they are, with random weights."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from optional_packages import import_or_skip

pytest.importorskip("transformers")

EXAMPLES = sorted(
    path
    for path in (Path(__file__).parents[1] / "examples").glob("*.py")
    if not path.stem.endswith("_features")  # those of other engines: tests/test_other_engines.py
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_drops_tokens(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if path.stem == "timm_vit":
        import_or_skip("timm")
    runpy.run_path(str(path))["main"]([])
    printed = capsys.readouterr().out
    kept, total = (int(word) for word in printed.split(": ")[1].split(" tokens")[0].split(" of "))
    assert 0 < kept < total
    assert "tokens that change: " in printed

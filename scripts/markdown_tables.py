"""Committed results as Markdown: what the tables of the documentation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


def load(name: str) -> dict[str, Any]:
    """A committed result."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head, the first column is text, the others are numbers."""
    head, *body = rows
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def time(seconds: dict[str, float] | float) -> str:
    """Milliseconds, three digits."""
    median = seconds["median"] if isinstance(seconds, dict) else seconds
    digits = 1 if median < 0.1 else 0
    return f"{median * 1e3:,.{digits}f} ms"


def machine(result: dict[str, Any]) -> str:
    """Processor and versions in a few words."""
    info = result["machine"]
    return f"{info['processor']}, {info['cores']} cores, torch {info['torch']}"


def cell(text: str) -> str:
    """Text that may stand in a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")

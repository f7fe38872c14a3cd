"""Fenced code blocks of Markdown pages: what language, what code, and whether the page says that it is not run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^>]+) -->\n)?```(?P<language>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    code: str
    line: int
    """Where its code begins in the page, counted from 1."""
    not_run: str | None
    """Why not, in the comment before it: `<!-- not run: REASON -->`."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1, found["reason"])
        for found in _FENCE.finditer(text)
    ]


def commands(block: Block) -> list[tuple[list[str], int]]:
    """The command lines of a shell block as words, and the exit code that a comment behind them says, or 0."""
    lines = block.code.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        code = re.search(r"#.*exit code (\d+)", line)
        if words := shlex.split(line, comments=True):
            found.append((words, int(code[1]) if code else 0))
    return found


def anchors(page: Path) -> set[str]:
    """What `#...` can name in a page: its headings as GitHub and the site spell them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}

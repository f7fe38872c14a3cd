"""Write the pages of docs/ that are made from the code: options, commands, Python names, the original's commands.

With --check nothing is written, and the exit code says whether the pages are up to date.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from command_pages import commands_page, original_page
from option_pages import configuration_page
from python_pages import python_page

DOCS = Path(__file__).parents[1] / "docs"
PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration_page,
    "commands.md": commands_page,
    "python.md": python_page,
    "original.md": original_page,
}


def main() -> int:
    """Write or check the pages."""
    stale = []
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(f"docs/{name}")
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"out of date: {', '.join(stale)}; run python scripts/write_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

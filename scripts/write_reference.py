"""Write docs/configuration.md from the configuration dataclasses: every key, its default and what it means.

With --check nothing is written, and the exit code says whether the page is up to date.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from rlt.conf import experiments
from rlt.conf.reference import Section, sections

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

`rlt train` and `rlt evaluate` take `key=value` overrides. This page is made from the code by
`python scripts/write_reference.py`.

Presets are chosen by name: `data=kinetics400|kinetics600|kinetics700|ssv2|folder`, `model=` one of `rlt models`,
`tokenizer=rlt|budget|none|random|uniform_frames|drawn`, `logger=default|wandb|none`, and `experiment=` one of

EXPERIMENTS

A later override wins; a list is written `optimizer.betas=[0.9,0.95]`, nothing is `null`. A name that is none is an
error which says the nearest one; both commands take all options, and say which of those typed have no effect on them.
"""


def main() -> int:
    """Write or check the page."""
    names = "\n".join(f"- `{name}`: {_first_comment(name)}" for name in experiments())
    text = HEAD.replace("EXPERIMENTS", names) + "".join(map(section_text, sections()))
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != text:
            print("docs/configuration.md is out of date; run python scripts/write_reference.py")
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


def section_text(section: Section) -> str:
    """One Markdown section with a table of its options."""
    rows = [
        f"| `{option.key}` | {option.default} | {option.meaning.replace('|', chr(92) + '|')} |\n"
        for option in section.options
    ]
    head = f"\n## {section.name or 'Top level'}\n\n{section.summary}\n\n| key | default | meaning |\n|---|---|---|\n"
    return head + "".join(rows)


def _first_comment(name: str) -> str:
    path = Path(inspect.getfile(experiments)).parent / "experiment" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    words = [line.removeprefix("#").strip() for line in lines[1:] if line.startswith("#")]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())

"""docs/configuration.md from the configuration dataclasses: every key, its default and what it means."""

from __future__ import annotations

import inspect
from pathlib import Path

from markdown_tables import cell

from rlt.conf import experiments
from rlt.conf.reference import Section, sections

HEAD = """# Configuration

`rlt train` and `rlt evaluate` take `key=value` overrides. This page is made from the code by
`python scripts/write_reference.py`.

Presets are chosen by name: `data=kinetics400|kinetics600|kinetics700|ssv2|folder`, `model=` one of `rlt models`,
`tokenizer=rlt|budget|none|random|uniform_frames|drawn`, `logger=default|wandb|none`, and `experiment=` one of

EXPERIMENTS

A later override wins; a list is written `optimizer.betas=[0.9,0.95]`, nothing is `null`. A name that is none is an
error which says the nearest one; both commands take all options, and say which of those typed have no effect on them.
"""


def configuration_page() -> str:
    """The whole page."""
    names = "\n".join(f"- `{name}`: {_first_comment(name)}" for name in experiments())
    return HEAD.replace("EXPERIMENTS", names) + "".join(map(_section_text, sections()))


def _section_text(section: Section) -> str:
    """One Markdown section with a table of its options."""
    rows = [f"| `{option.key}` | {option.default} | {cell(option.meaning)} |\n" for option in section.options]
    head = f"\n## {section.name or 'Top level'}\n\n{section.summary}\n\n| key | default | meaning |\n|---|---|---|\n"
    return head + "".join(rows)


def _first_comment(name: str) -> str:
    path = Path(inspect.getfile(experiments)).parent / "experiment" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    words = [line.removeprefix("#").strip() for line in lines[1:] if line.startswith("#")]
    return " ".join(words)

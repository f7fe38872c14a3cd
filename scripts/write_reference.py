"""Write docs/configuration.md from the configuration dataclasses: every key, its default and what it means.

With --check nothing is written, and the exit code says whether the page is up to date.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

from rlt.conf import experiments
from rlt.training.config import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
HEAD = """# Configuration

`rlt train` and `rlt evaluate` take `key=value` overrides. This page is made from the code by
`python scripts/write_reference.py`.

Presets are chosen by name: `data=kinetics400|kinetics600|kinetics700|ssv2|folder`, `model=` one of `rlt models`,
`tokenizer=none|rlt|random|uniform_frames|tome`, `logger=default|wandb|none`, and `experiment=` one of

EXPERIMENTS

A later override wins; a list is written `optimizer.betas=[0.9,0.95]`, nothing is `null`.
"""


def main() -> int:
    """Write or check the page."""
    names = "\n".join(f"- `{name}`: {_first_comment(name)}" for name in experiments())
    text = HEAD.replace("EXPERIMENTS", names) + "".join(sections(Config, ""))
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") != text:
            print("docs/configuration.md is out of date; run python scripts/write_reference.py")
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


def sections(schema: type[Any], prefix: str) -> list[str]:
    """One Markdown section for a dataclass and one for each below it."""
    comments = field_docstrings(schema)
    title = prefix.rstrip(".") or "Top level"
    own = [f"\n## {title}\n\n{summary(schema)}\n\n| key | default | meaning |\n|---|---|---|\n"]
    below: list[str] = []
    for field in dataclasses.fields(schema):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
        if dataclasses.is_dataclass(default):
            below += sections(type(default), f"{prefix}{field.name}.")
        else:
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
            own.append(f"| `{prefix}{field.name}` | {shown} | {comments[field.name]} |\n")
    return [*own, *below]


def field_docstrings(schema: type[Any]) -> dict[str, str]:
    """The string literal below each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split()).replace("|", "\\|")
    return found


def summary(schema: type[Any]) -> str:
    """First paragraph of a docstring."""
    return " ".join((schema.__doc__ or "").split("\n\n")[0].split())


def _first_comment(name: str) -> str:
    path = Path(inspect.getfile(experiments)).parent / "experiment" / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines()
    words = [line.removeprefix("#").strip() for line in lines[1:] if line.startswith("#")]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())

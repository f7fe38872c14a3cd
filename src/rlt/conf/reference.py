"""Every option of `rlt train` and `rlt evaluate`, read off the configuration dataclasses."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from typing import Any, NamedTuple

from rlt.conf.schema import Config


class Option(NamedTuple):
    """One `key=value`: as it is written on the command line, where nothing is given, and what it is, with its unit."""

    key: str
    default: str
    meaning: str


class Section(NamedTuple):
    """The options of one dataclass, in its order; `name` is the prefix of their keys, "" for the top level."""

    name: str
    summary: str
    options: list[Option]


def sections(schema: type[Any] = Config, prefix: str = "") -> list[Section]:
    """The options of a dataclass, then those of the dataclasses below it."""
    meanings, defaults = _field_docstrings(schema), schema()
    options, below = [], []
    for field in dataclasses.fields(schema):
        default = getattr(defaults, field.name)
        if dataclasses.is_dataclass(default):
            below += sections(type(default), f"{prefix}{field.name}.")
        else:
            options.append(Option(f"{prefix}{field.name}", _shown(default), meanings[field.name]))
    summary = " ".join((schema.__doc__ or "").split("\n\n")[0].split())
    return [Section(prefix.removesuffix("."), summary, options), *below]


def help_text() -> str:
    """All options as plain lines, for `--help`."""
    parts = []
    for section in sections():
        lines = []
        for option in section.options:
            lines.append(f"{option.key}={option.default}")
            lines += textwrap.wrap(option.meaning, 74, initial_indent="    ", subsequent_indent="    ")
        parts.append("\n".join(["\b", f"{section.name or 'top level'}: {section.summary}", *lines]))
    return "\n\n".join(parts)


def _field_docstrings(schema: type[Any]) -> dict[str, str]:
    """The string literal below each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return found


def _shown(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)

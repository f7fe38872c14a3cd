"""docs/python.md: every public name, as mkdocstrings reads it from the source."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import rlt

HEAD = """# Python

Every name of `rlt.__all__`, then the public names of the rooms below it. All of it is typed (`py.typed`), and
`import rlt` takes no torch before a name needs it. This page is made from the code by
`python scripts/write_reference.py`.

## rlt

"""
ROOMS = {
    "rlt.video": "Videos: files to clips.",
    "rlt.tokens": "Rules and tokens.",
    "rlt.checkpoints": "Checkpoints of every layout, and named models.",
    "rlt.adapters": "Models of other libraries.",
    "rlt.encoding": "Classes and features of many videos.",
    "rlt.export": "`torch.export` programs.",
    "rlt.calibrate": "Which threshold.",
    "rlt.evaluation": "Accuracy of a checkpoint.",
    "rlt.frontier": "Fidelity against the dense network.",
    "rlt.benchmark": "One stage beside its peers.",
    "rlt.inspection": "Pictures of what is dropped.",
}
MODULES = {
    "rlt.streaming": "A network over video that does not end.",
    "rlt.errors": "Errors that a user can mend.",
    "rlt.loading": "A model that someone names.",
    "rlt.compare": "The job behind `rlt compare`.",
    "rlt.training.run": "The job behind `rlt train`.",
    "rlt.network.hub": "A model as a folder, and on the hub.",
}
"""Modules without `__all__`: what they define."""


def python_page() -> str:
    """The whole page."""
    known: set[str] = set()
    parts = [HEAD, *(_entry("rlt", name, known) for name in rlt.__all__)]
    for room, title in ROOMS.items():
        names = import_module(room).__all__
        entries = [_entry(room, name, known) for name in names if _place(room, name) not in known]
        parts += [f"\n## {room}\n\n{title}\n\n", *entries]
    for module, title in MODULES.items():
        above = [place.rpartition(".")[2] for place in known if place.rpartition(".")[0] == module]
        filters = ", ".join(f'"{pattern}"' for pattern in ("!^_", *(f"!^{name}$" for name in sorted(above))))
        parts += [f"\n## {module}\n\n{title}\n\n", f"::: {module}\n    options:\n", f"      filters: [{filters}]\n"]
        parts += ["      show_root_heading: false\n      show_root_toc_entry: false\n"]
    return "".join(parts)


def _place(room: str, name: str) -> str:
    """Where a name is defined: module and name; values without a module of their own stand where they are imported."""
    value: Any = getattr(import_module(room), name)
    module = getattr(value, "__module__", None)
    own = isinstance(module, str) and module.startswith("rlt.") and getattr(value, "__qualname__", None) == name
    return f"{module if own else _assigned(room, name)}.{name}"


def _assigned(room: str, name: str) -> str:
    """The module below a room that assigns a value, such as a table."""
    import ast
    import inspect
    from pkgutil import walk_packages

    package = import_module(room)
    modules = [room, *(found.name for found in walk_packages(package.__path__, f"{room}."))]
    for module in modules:
        try:
            tree = ast.parse(inspect.getsource(import_module(module)))
        except ImportError:  # needs an extra
            continue
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return module
    raise LookupError(f"{room}.{name} is assigned nowhere below {room}")


def _entry(room: str, name: str, known: set[str]) -> str:
    place = _place(room, name)
    known.add(place)
    return f"::: {place}\n"

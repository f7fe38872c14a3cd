"""Run in a process of its own: imports `rlt` where only the packages that it depends on can be imported.

    python tests/base_install.py FOLDER

Prints as JSON the top-level packages that were hidden, what each module of ours failed with ("" for those that can be
imported), and the exit code, output and errors of each of `commands`. FOLDER is written to.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType


def base_distributions() -> set[str]:
    """Normalised names of the distributions that come with `pip install rlt`, themselves needed ones included."""
    found: set[str] = set()
    todo = ["rlt"]
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        with contextlib.suppress(metadata.PackageNotFoundError):
            lines = metadata.requires(name) or []
            found.add(name)
            todo += [re.split(r"[^\w.-]", line)[0] for line in lines if not re.search(r"\bextra\b", line)]
    return found


def hidden_packages() -> set[str]:
    """Top-level names of everything else that is installed, and of Triton, which only some builds of torch need."""
    base = base_distributions()
    owners = metadata.packages_distributions()
    wanted = {
        package
        for package, names in owners.items()
        if any(re.sub(r"[-_.]+", "-", name).lower() in base for name in names)
    }
    return set(owners) - wanted | {"triton"}


class BaseFinder(PathFinder):
    """Finds what `PathFinder` finds, but no hidden package."""

    hidden = frozenset(hidden_packages())

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in cls.hidden else super().find_spec(fullname, path, target)


def import_all() -> dict[str, str]:
    """What each module of `rlt` failed with."""
    import rlt

    found = {"rlt": ""}
    for module in walk_packages(rlt.__path__, "rlt."):
        try:
            import_module(module.name)
            found[module.name] = ""
        except ImportError as error:
            found[module.name] = str(error)
    return found


def commands(folder: Path) -> dict[str, list[str]]:
    """Command lines by what they show."""
    from rlt import assets

    clip = str(assets.path("traffic.mp4"))
    (folder / "data" / "road").mkdir(parents=True)
    shutil.copyfile(clip, folder / "data" / "road" / "traffic.mp4")
    prepare = ["prepare", "folder", str(folder / "data"), "--output"]
    small = ["--model", "vit_tiny", "--frames", "4", "--size", "32"]
    return {
        "models": ["models"],
        "compare": ["compare", clip, *small],
        "calibrate": ["calibrate", clip, "--target-keep", "0.5", "--output", str(folder / "rule.json")],
        "prepare as CSV": [*prepare, str(folder / "videos.csv")],
        "benchmark": ["benchmark", "attention", "--clips", "1", "--rounds", "1", *small],
        "prepare as Parquet": [*prepare, str(folder / "videos.parquet")],
        "app": ["app"],
        "inspect": ["inspect", clip, "--output", str(folder / "pictures")],
        "train": ["train", f"data.train={folder / 'videos.csv'}"],
        "evaluate": ["evaluate", f"data.test={folder / 'videos.csv'}"],
    }


def run(arguments: list[str]) -> dict[str, object]:
    """Exit code, output and errors of one command."""
    from rlt.cli import main

    code: object = 0
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(arguments)
        except SystemExit as exit_:
            code = exit_.code or 0
    return {"code": code, "output": output.getvalue(), "errors": errors.getvalue()}


if __name__ == "__main__":
    sys.meta_path[:] = [BaseFinder if finder is PathFinder else finder for finder in sys.meta_path]
    modules = import_all()
    results = {name: run(arguments) for name, arguments in commands(Path(sys.argv[1])).items()}
    print(json.dumps({"hidden": sorted(BaseFinder.hidden), "modules": modules, "commands": results}))

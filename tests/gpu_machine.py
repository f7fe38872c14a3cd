"""Run in a process of its own: what a machine with a GPU needs of us runs without PyAV, Hydra and kornia.

    python tests/gpu_machine.py FOLDER

FOLDER has the unpacked clips of a rehearsal. Prints as JSON the modules that cannot be imported, and what a suite, a
training and reading a video came to.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from unittest.mock import patch

for name in ("av", "hydra", "omegaconf", "kornia"):
    sys.modules[name] = None  # type: ignore[assignment] # importing it is an ImportError

import rlt  # noqa: E402
from rlt import assets  # noqa: E402
from rlt.cli import main  # noqa: E402


def failed_imports() -> dict[str, str]:
    """What cannot be imported, of the package, and of the scripts and tests that run there."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    scripts = ["figures_gpu", "campaign", "gpu_clips", "gpu_training", "gpu_tests"]
    tests = [f"test_{name}" for name in import_module("figures_gpu").GPU_TESTS]
    failed = {}
    for module in [*(module.name for module in walk_packages(rlt.__path__, "rlt.")), *scripts, *tests]:
        try:
            import_module(module)
        except ImportError as error:
            failed[module] = str(error)
    return failed


def run(*arguments: str) -> dict[str, object]:
    """Exit code and errors of a command."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            main(arguments)
        except SystemExit as stop:
            return {"code": stop.code or 0, "errors": errors.getvalue()}
    return {"code": 0, "errors": errors.getvalue()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    small = ("--frames", "4", "--size", "64", "--clips", "2", "--rounds", "1", "--model", "vit_micro")
    report: dict[str, object] = {"failed": failed_imports()}
    report["forward"] = run("benchmark", "forward", str(folder / "traffic.npy"), *small)
    report["video"] = run("benchmark", "forward", str(assets.path("traffic.mp4")), *small)
    numbers = folder.parent / "training.json"
    options = ["--model", "vit_micro", "--steps", "1", "--workers", "0", "--json", str(numbers)]
    with patch.object(sys, "argv", ["gpu_training.py", str(folder), *options]), contextlib.redirect_stdout(sys.stderr):
        sys.modules["gpu_training"].main()
    report["training"] = [arm["name"] for arm in json.loads(numbers.read_text())["arms"]]
    print(json.dumps(report))

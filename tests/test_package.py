"""What is published: the wheel holds what it needs and nothing else, and runs away from the source tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "rlt"


def run(*command: str | Path, cwd: Path, away: bool = True) -> str:
    """Output of a command, `away` from what PYTHONPATH would add."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or not away}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without isolation, so that no package index is asked."""
    for package in ("hatchling", "build"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder, away=False)
    [path] = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
        licences = [name for name in archive.namelist() if "/licenses/" in name]
    ours = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert held == {f"rlt/{path.relative_to(PACKAGE).as_posix()}" for path in ours}
    assert "rlt/py.typed" in held
    assert any(name.endswith(".yaml") for name in held)
    assert {Path(name).name for name in licences} == {"LICENSE", "ATTRIBUTION.md"}


def test_a_package_index_can_show_it(wheel: Path) -> None:
    pytest.importorskip("twine")
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel, cwd=wheel.parent)


def test_the_wheel_runs_away_from_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare")
    python = next((tmp_path / "bare").glob("bin/python"), None)
    if python is None:
        pytest.skip("environments have no bin/ here")
    [site] = (tmp_path / "bare").glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # What it depends on is that of the running environment, behind its own; an editable rlt there is not looked at.
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    code = "import sys, rlt; from rlt.cli import main; print(rlt.__file__); main(sys.argv[1:])"
    shown = run(python, "-c", code, "--version", cwd=tmp_path)
    assert shown.splitlines() == [str(site / "rlt" / "__init__.py"), f"rlt {version('rlt')}"]
    clip = site / "rlt" / "assets" / "traffic.mp4"
    small = ("--model", "vit_micro", "--frames", "4", "--size", "32", "--repeats", "1")
    assert "tokens" in run(python, "-c", code, "compare", clip, *small, cwd=tmp_path)


def test_versions_agree() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert declared is not None
    assert cited is not None
    assert declared[1] == cited[1]


def test_both_ways_to_set_up_pin_the_same_and_ask_no_other_index() -> None:
    constraints = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pyproject = (ROOT / "pyproject.toml").read_text()
    for line in filter(None, constraints):
        assert f'"{line}"'.replace('"', "'") in pyproject.replace('"', "'"), line
    lock = (ROOT / "uv.lock").read_text()
    assert set(re.findall(r"\w+://[^/\"]*", lock)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    assert not re.search(r'path = "|directory = "', lock)

"""The front door: short, tables of the committed JSON, commands that exist. tests/test_docs.py runs its code."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from documents import ROOT, blocks
from rlt import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_front_door_is_short_and_begins_with_six_lines() -> None:
    assert README.count("\n") < 150
    code = next(block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len([line for line in code.splitlines() if line]) == 6


def test_tables_are_those_of_the_committed_json() -> None:
    script = ROOT / "scripts" / "write_tables.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_commands_and_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback}
    known |= {group.name for group in cli.app.registered_groups if group.name}
    shown = set(re.findall(r"^(?:\| `)?rlt ([a-z]+) ", README, re.MULTILINE))
    assert shown >= {"compare", "inspect", "prepare", "train", "evaluate", "benchmark", "convert"}
    assert shown <= known


def test_the_pages_that_are_made_from_the_code_are_up_to_date() -> None:
    pytest.importorskip("hydra")
    script = ROOT / "scripts" / "write_reference.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-500:]

"""Without any extra: every module that needs none can be imported, and commands that need one say so in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NEED_MORE = {
    "rlt.conf.hydra_config": "hydra",
    "rlt.encoding._ray": "ray",
    "rlt.tokens._cuda": "triton",
    "rlt.training.checkpointing": "lightning",
    "rlt.training.loaders": "lightning",
    "rlt.training.loggers": "lightning",
    "rlt.training.module": "lightning",
    "rlt.training.pace": "lightning",
    "rlt.training.run": "lightning",
    "rlt.video._torchcodec": "torchcodec",
}
"""Modules that are imported by a function which asks for the package, and what they need."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = Path(__file__).with_name("base_install.py")
    done = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("base")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_every_module_is_imported_but_those_that_need_more(base: dict[str, Any]) -> None:
    assert not {"torch", "numpy", "av", "typer", "rich", "safetensors", "huggingface_hub"} & set(base["hidden"])
    failed = {module: error for module, error in base["modules"].items() if error}
    assert failed.keys() == NEED_MORE.keys(), failed
    for module, package in NEED_MORE.items():
        assert package in failed[module]


@pytest.mark.parametrize("name", ["models", "compare", "calibrate", "prepare as CSV", "benchmark"])
def test_commands_that_need_no_extra_run(base: dict[str, Any], name: str) -> None:
    found = base["commands"][name]
    assert found["code"] == 0, found["errors"]
    assert found["output"]


@pytest.mark.parametrize(
    ("name", "extra"),
    [("app", "app"), ("inspect", "viz"), ("train", "train"), ("evaluate", "train"), ("prepare as Parquet", "train")],
)
def test_commands_that_need_an_extra_name_it_in_one_line(base: dict[str, Any], name: str, extra: str) -> None:
    found = base["commands"][name]
    assert found["code"] == 2
    assert found["output"] == ""
    assert found["errors"].startswith("error: ")
    assert found["errors"].count("\n") == 1
    assert f'pip install "rlt[{extra}]"' in found["errors"]

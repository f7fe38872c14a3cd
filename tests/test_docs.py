"""The documentation: its code runs or says why not, and its links lead somewhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from documents import PAGES, ROOT, Block, anchors, blocks, commands
from rlt import assets, cli
from rlt.tokens.rules import RULES

NEEDS = {
    "docs/users/engineers.md": ("transformers",),
    "docs/howto/train.md": ("hydra", "lightning", "kornia", "pyarrow"),
    "docs/users/researchers.md": ("hydra",),
    "docs/original.md": ("hydra",),
    "docs/users/videos.md": ("matplotlib",),
}
"""Packages that come with an extra, by the page whose code needs them."""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_block(block: Block, namespace: dict[str, object], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a block; what it prints."""
    if block.language == "python":
        exec(compile("\n" * (block.line - 1) + block.code, "block", "exec"), namespace)
    else:
        for words, expected in commands(block):
            assert words[0] == "rlt", f"{words} is no command of ours; mark the block as not run"
            with pytest.raises(SystemExit) as stop:
                cli.main(words[1:])
            assert (stop.value.code or 0) == expected, capsys.readouterr().err
    found = capsys.readouterr()
    return found.out if block.language == "python" else found.out + found.err


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages' code finds: video.mp4, the folder videos/, class folders in data/, and the repository's src/."""
    names = {"traffic": "traffic.mp4", "animation": "animation.mp4"}
    shutil.copyfile(assets.path("traffic.mp4"), tmp_path / "video.mp4")
    for split in ("train", "val"):
        for label, name in names.items():
            (tmp_path / "data" / split / label).mkdir(parents=True)
            shutil.copyfile(assets.path(name), tmp_path / "data" / split / label / name)
    (tmp_path / "videos").mkdir()
    for name in names.values():
        shutil.copyfile(assets.path(name), tmp_path / "videos" / name)
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


RUNNABLE = [page for page in PAGES if any(not block.not_run for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=named)
def test_the_code_of_a_page_runs(
    page: Path, sandbox: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in NEEDS.get(named(page), ()):
        pytest.importorskip(package)
    for name in list(RULES):  # what a page registers is gone after it
        monkeypatch.setitem(RULES, name, RULES[name])
    registered = set(RULES)
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    try:
        for block in blocks(page):
            if block.not_run is not None:
                continue
            if block.language == "text":
                expected = [" ".join(line.split()) for line in block.code.splitlines()]
                assert all(line in " ".join(printed.split()) for line in expected), printed
            else:
                torch.manual_seed(0)
                printed = run_block(block, namespace, capsys)
    finally:
        for name in set(RULES) - registered:
            del RULES[name]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_blocks_say_their_language_and_what_is_not_run_is_still_code(page: Path) -> None:
    import typer

    group = typer.main.get_command(cli.app)
    for block in blocks(page):
        assert block.language in ("python", "sh", "text"), f"{page.name}:{block.line}: ```python, ```sh or ```text"
        if block.not_run is None or block.language == "text":
            continue
        assert len(block.not_run) > 3, block
        if block.language == "python":
            compile(block.code, f"{page.name}:{block.line}", "exec")
            continue
        for words, _ in commands(block):
            if words[0] == "rlt":
                check_options(group, words)


def check_options(command: object, words: list[str]) -> None:
    """That a command line names commands and options that exist."""
    place = 1
    while hasattr(command, "commands"):
        assert words[place] in command.commands, words
        command = command.commands[words[place]]
        place += 1
    known = {option for parameter in command.params for option in parameter.opts}  # type: ignore[attr-defined]
    assert {word.partition("=")[0] for word in words[place:] if word.startswith("--")} <= known, words


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if anchor:
            assert anchor in anchors(found), target

"""docs/commands.md from the command line itself, and docs/original.md from the map of the original's commands."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer
from markdown_tables import cell

from rlt import cli
from rlt.conf import original

HEAD = """# Commands

Errors are one line and exit with code 2; `rlt --debug ...` shows the traceback. Ctrl-C exits with 130. All that measure
take `--json FILE`. `rlt --install-completion` makes the shell complete names and options. This page is made from the
code by `python scripts/write_reference.py`.
"""
TAKES_OVERRIDES = "\nThe `key=value` options are those of [Configuration](configuration.md).\n"

ORIGINAL_HEAD = """# From the original RLT: old command, new command

The code beside the paper is run as `python src/train.py experiment=NAME ...`. Typing its options after `rlt train` or
`rlt evaluate` gives the line that does the same here:

```sh
rlt evaluate experiment=val_vit_mae.yaml model.tokenizer_cfg.drop_policy=rlt  # exit code 2, and this line
```

```text
EXAMPLE
```

This page is made from the same map, by `python scripts/write_reference.py`. What differs on purpose, number by number,
is in [Numerics](numerics.md#differences-from-the-original-code).

## Commands

`...` stands for paths: manifests of `rlt prepare`, which take the place of the original's lists, and a checkpoint,
which may be the original's `.pth` or `.ckpt`.

"""
ORIGINAL_TAIL = """
## Checkpoints and masks

| there | here |
| --- | --- |
| `ckpt_path=model.ckpt` | the same file as `checkpoint=`, `--checkpoint` or `rlt.create_model(name, checkpoint=...)` |
| a Lightning `.ckpt` or VideoMAE `.pth` as a folder to keep | `rlt convert model.ckpt FOLDER` |
| our weights for the original code | `rlt convert FOLDER model.pth --to videomae` |
| `batched_find_idxs_to_keep` on a normalised clip | `rlt.keep_mask` on uint8 frames: the same entries |
| `model.tokenizer_cfg.encode_length=true` | `model.length_encoding=learned` |
| run lengths that are not counted | `model.run_lengths=ignored`, which presets of the paper say by themselves |
"""
OLD = (
    "experiment=train_vit_mae",
    "experiment=train_vit_mae model.tokenizer_cfg.drop_policy=rlt",
    "experiment=train_vit_mae model.tokenizer_cfg.drop_policy=rlt model.tokenizer_cfg.encode_length=true",
    "experiment=val_vit_mae",
    "experiment=val_vit_mae model.tokenizer_cfg.drop_policy=rlt",
    "experiment=val_vit_mae model.tokenizer_cfg.drop_policy=rlt model.tokenizer_cfg.drop_param=0.2",
    "experiment=val_vit_mae model.tokenizer_cfg.drop_policy=random model.tokenizer_cfg.drop_param=0.5",
    "experiment=val_vitl_mae model.tokenizer_cfg.drop_policy=rlt",
    "experiment=val_vith_mae",
    "experiment=val_vit_fps15",
    "experiment=val_vit_mae_ssv2 model.tokenizer_cfg.drop_policy=rlt",
    "experiment=val_vit_mae ckpt_path=model.ckpt",
)
"""Lines of the original's README and experiments."""


def commands_page() -> str:
    """Every command with its usage, what it does and its options."""
    return HEAD + "".join(_command_text(name, command) for name, command in _commands(typer.main.get_command(cli.app)))


def original_page() -> str:
    """Old lines beside new ones, then options one by one."""
    lines = ["| `python src/train.py` | here |", "| --- | --- |"]
    lines += [f"| `{old}` | `{_translated(old)}` |" for old in OLD]
    lines += ["", "## Options", "", "| there | here |", "| --- | --- |"]
    lines += [f"| `{old}=` | `{new}=` |" for old, new in original.RENAMED.items()]
    lines += ["", "## Experiments", "", "| there | here | tokens unless said otherwise |", "| --- | --- | --- |"]
    for old, (command, preset, policy) in original.EXPERIMENTS.items():
        lines.append(f"| `experiment={old}` | `rlt {command} experiment={preset}` | `tokenizer={policy}` |")
    head = ORIGINAL_HEAD.replace("EXAMPLE", _translated(OLD[4]))
    return head + "\n".join(lines) + "\n" + ORIGINAL_TAIL


def _translated(line: str) -> str:
    """The line here for a line there, as `rlt train` would answer it."""
    given: dict[str, object] = {}
    for word in line.split():
        key, _, value = word.partition("=")
        given[key] = {"true": True, "false": False}.get(value, float(value) if value[:1].isdigit() else value)
    found = original.in_our_words(given)
    assert found is not None, line
    return found


def _commands(group: Any, prefix: str = "rlt") -> Iterator[tuple[str, Any]]:
    """Commands and those below them, in the order of `--help`."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def _command_text(name: str, command: Any) -> str:
    context = command.context_class(command, info_name=name)
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    lines = [f"\n## {name}\n", f"    {usage}\n", inspect.cleandoc(command.help or "").replace("\b\n", "")]
    records = [record for parameter in command.params if (record := parameter.get_help_record(context))]
    if records:
        lines += ["", "| option | meaning |", "| --- | --- |"]
        lines += [f"| `{cell(option)}` | {cell(meaning)} |" for option, meaning in records]
    return "\n".join(lines) + "\n" + (TAKES_OVERRIDES if "OVERRIDES" in usage else "")

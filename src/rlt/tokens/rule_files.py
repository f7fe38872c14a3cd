"""Rules as files: what `rlt calibrate` writes, and every place that takes the name of a rule reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlt.errors import InvalidArgumentError
from rlt.files import write_json

RULE_FILE_ENDING = ".json"


def is_rule_file(name: str) -> bool:
    """Whether the name of a rule is that of a file."""
    return name.endswith(RULE_FILE_ENDING)


def read_rule_file(path: str | Path) -> dict[str, Any]:
    """Name and options of a rule: {"rule": "rlt", "threshold": 0.2, ...}, for `rlt.tokens.make_rule`.

    Raises:
        InvalidArgumentError: if the file cannot be read, or holds no rule.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"rule file {path} cannot be read: {error}; rlt calibrate writes them") from error
    if not isinstance(content, dict) or not isinstance(content.get("rule"), dict):
        raise InvalidArgumentError(f"rule file {path} has no object 'rule' in it; rlt calibrate writes them")
    rule = content["rule"]
    if not isinstance(rule.get("rule"), str):
        raise InvalidArgumentError(f"rule file {path} does not name its rule; rlt calibrate writes them")
    return rule


def check_rule_file(path: str | Path) -> None:
    """Hold that a file of this name would be taken for a rule, before the work and not after it.

    Raises:
        InvalidArgumentError: naming the ending that is needed.
    """
    if not is_rule_file(str(path)):
        raise InvalidArgumentError(f"{path}: a rule file ends in {RULE_FILE_ENDING}; rename it")


def write_rule_file(path: str | Path, options: dict[str, object], **about: object) -> None:
    """Write a rule as `rlt.tokens.rule_options` gives it, and how it was found; the file is whole or not there."""
    write_json(Path(path), {"rule": options, **about})

"""What rules are called: the plain spelling of every door, options of commands, files, and lines for people."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlt.checks import exclusive, nearest, one_of
from rlt.errors import InvalidArgumentError
from rlt.tokens.rule_files import is_rule_file, read_rule_file
from rlt.tokens.rules import RULES, Compared, Drawn, Rule, Threshold

PLAIN = ("threshold", "keep_ratio", "max_tokens", "reference", "exposure", "motion")
"""Fields that every door spells out. A rule that keeps as many as another hands them on to that one."""
_HANDED_ON = (*PLAIN, "shared")
_COMPARING = ("reference", "exposure", "motion")
"""Those that say how tokens are compared; the others, of which one holds at a time, say how many are kept."""


def make_rule(name: str, **fields: Any) -> Rule:
    """A rule by its name, or by the name of a file that ends in .json; fields that are None are left at their defaults.

    Where the rule has a field `like` and not these fields, `threshold`, `keep_ratio` and `max_tokens` say what `like`
    is: `make_rule("random", keep_ratio=0.5)` is `Random(like=Budget(keep_ratio=0.5))`.

    Raises:
        InvalidArgumentError: for an unknown name or field, listing the known ones, a value out of range, or a file that
            holds no rule.
    """
    if is_rule_file(name):
        for field, value in fields.items():
            exclusive(rule=name, **{field: value})
        options = read_rule_file(name)
        try:
            return make_rule(options.pop("rule"), **options)
        except (InvalidArgumentError, TypeError) as error:
            raise InvalidArgumentError(f"rule file {name}: {error}") from error
    if name == "tome":
        raise InvalidArgumentError("tome is no rule, since all tokens go in; use rule none and model.merge_per_block=N")
    one_of(RULES, rule=name)
    kind = RULES[name]
    known = [field.name for field in dataclasses.fields(kind)]
    # A flag that is off asks for nothing: it stays behind where another option has changed the rule of a configuration.
    off = [field for field, value in fields.items() if value is False and field not in known]
    given = {field: value for field, value in fields.items() if value is not None and field not in off}
    if "like" in known and "like" not in given:
        plain = {field: given.pop(field) for field in _HANDED_ON if field in given and field not in known}
        if plain:
            given["like"] = make_rule(_plain_name(plain), **plain)
    required = [field.name for field in dataclasses.fields(kind) if _is_required(field)]
    if missing := [field for field in required if field not in given]:
        raise InvalidArgumentError(f"rule {name!r} needs {', '.join(missing)}; give a value")
    allowed = [*known, *(field for field in _HANDED_ON if "like" in known)]
    for field, value in given.items():
        if field not in known:
            listed = f"allowed are {', '.join(allowed)}" if allowed else "it has none"
            raise InvalidArgumentError(
                f"{field} is {value}, but rule {name!r} has no such option; {listed}{nearest(field, allowed)}"
            )
    rule: Rule = kind(**given)
    return rule


def _plain_name(fields: dict[str, Any]) -> str:
    """The rule that is meant where none is named."""
    return "rlt" if fields.get("keep_ratio") is None and fields.get("max_tokens") is None else "budget"


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def choose_rule(
    rule: Rule | str | None = None,
    *,
    threshold: float | None = None,
    keep_ratio: float | None = None,
    max_tokens: int | None = None,
    reference: str | None = None,
    exposure: str | None = None,
    motion: str | None = None,
    stored: Rule | None = None,
) -> Rule:
    """What the plain spelling means: a rule, its name with these options, or the options alone.

    Args:
        rule: a rule, which takes no further option; or the name of one. None is `Budget` where keep_ratio or max_tokens
            is given, else `Threshold`.
        threshold: see `Threshold`; 0.1 where nothing else is given.
        keep_ratio: see `Budget`.
        max_tokens: see `Budget`.
        reference: see `Threshold`.
        exposure: see `Threshold`.
        motion: see `Threshold`.
        stored: the rule that a model was trained with: stands where no other is named, changed by the options as
            `change_rule` says. What it draws for each clip in training is no rule to use: `Threshold` stands for it.

    Raises:
        InvalidArgumentError: for two of the first three options at once, an option that the rule does not have, or a
            class.
    """
    exclusive(threshold=threshold, keep_ratio=keep_ratio, max_tokens=max_tokens)
    plain = dict(zip(PLAIN, (threshold, keep_ratio, max_tokens, reference, exposure, motion), strict=True))
    if isinstance(rule, str):
        return make_rule(rule, **plain)
    if isinstance(rule, type):
        raise InvalidArgumentError(f"rule is the class {rule.__name__}; give a value of it: {rule.__name__}()")
    if rule is not None:
        for name, value in plain.items():
            exclusive(rule=rule, **{name: value})
        return rule
    if isinstance(stored, Drawn):
        stored = Threshold(reference=stored.reference, exposure=stored.exposure, motion=stored.motion)
    if stored is not None:
        return change_rule(stored, **plain)
    return make_rule(_plain_name(plain), **plain)


def change_rule(rule: Rule, **fields: Any) -> Rule:
    """The rule with other values of fields that every door spells out; those that are None stay as they are.

    Args:
        rule: any.
        fields: `threshold`, `keep_ratio` or `max_tokens` replaces the rule by that one, which compares as the rule
            before did; `reference`, `exposure` and `motion` alone change how the rule compares, or how the one
            does that it is like.

    Raises:
        InvalidArgumentError: for a value that `choose_rule` does not take, or a rule that compares nothing.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if given.keys() - set(_COMPARING):
        kept = {name: getattr(rule, name) for name in _COMPARING if isinstance(rule, Compared)}
        return choose_rule(**{**kept, **given})
    changed: Any = rule
    known: list[str] = [field.name for field in dataclasses.fields(changed)] if dataclasses.is_dataclass(rule) else []
    if given and given.keys() <= set(known):
        return dataclasses.replace(changed, **given)
    if given and "like" in known:
        return dataclasses.replace(changed, like=change_rule(changed.like, **given))
    for name, value in given.items():
        raise InvalidArgumentError(f"{name} is {value}, but {rule} has no such option; give a threshold beside it")
    return rule


def rule_name(rule: Rule) -> str:
    """Its name in the table, or that of its class if it is not there."""
    return next((name for name, kind in RULES.items() if type(rule) is kind), type(rule).__name__)


def rule_options(rule: Any) -> dict[str, object]:
    """The name of a rule as `rule` and its fields, ready for JSON; those of `like` stand beside its own."""
    options: dict[str, object] = {}
    for field in dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ():
        value = getattr(rule, field.name)
        options |= rule_options(value) if field.name == "like" else {field.name: value}
    return {**options, "rule": rule_name(rule)}


def rule_line(rule: Rule) -> str:
    """The rule for people: "threshold 0.1", "keep_ratio 0.5, reference anchor", "random, threshold 0.1, seed 0"."""
    usual = {
        "rule": rule_name(rule),
        "reference": "previous",
        "exposure": "none",
        "motion": "none",
        "keep_first": False,
        "shared": False,
    }
    options = {
        name: value
        for name, value in rule_options(rule).items()
        if value is not None and not (name in usual and usual[name] == value)
    }
    name = rule_name(rule)
    given = [
        f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}" for option, value in options.items()
    ]
    return ", ".join(given if name in ("rlt", "budget") else [name, *given])

"""The only importer of hydra: registers the groups and composes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

from rlt.checkpoints.models import MODELS
from rlt.checks import exclusive, one_of
from rlt.conf import experiments
from rlt.conf.original import in_our_words
from rlt.conf.reference import sections
from rlt.conf.schema import Config, DataConfig, LoggerConfig, ModelConfig, TokenizerConfig
from rlt.data.augment import AugmentConfig
from rlt.data.clips import ViewConfig
from rlt.errors import InvalidArgumentError, MissingDependencyError, RltError
from rlt.tokens.rule_files import is_rule_file, read_rule_file
from rlt.video import ClipSpec

try:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException, ValidationError
except ImportError as error:
    raise MissingDependencyError(
        'configuration needs hydra, which cannot be imported; install with: pip install "rlt[train]"'
    ) from error

_MANIFESTS = ("train", "val", "test")
_NOT_OF_AN_EXPERIMENT = ("tokenizer", "seed")
_RULE = ("tokenizer", "tokenizer.rule")
_SHARES = ("tokenizer.threshold", "tokenizer.keep_ratio", "tokenizer.max_tokens")
"""What says how many tokens stay; the last that is given counts."""
_COUNTERPARTS = (("data.clip.frame_stride", "data.clip.fps"), ("trainer.max_steps", "trainer.max_epochs"))
"""Options of which one is given; typing it takes back what a preset or a run says of the other."""
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
_MOVED = {
    "tokenizer.policy": "tokenizer=NAME",
    "tokenizer.merge_per_block": "model.merge_per_block=N",
    "tokenizer=tome": "tokenizer=none model.merge_per_block=N",
}
"""What was written otherwise in earlier versions."""


@dataclass
class _Root(Config):
    """The configuration with Hydra's list of defaults, which Hydra takes out again."""

    defaults: list[Any] = field(default_factory=list)


def compose(overrides: Sequence[str], run: Mapping[str, Any]) -> Config:
    """See `rlt.conf.compose`."""
    given = typed(overrides)
    opened, by_file = _opened(overrides)
    beneath, presets = _beneath(run, given), _presets()
    rule = beneath.get("tokenizer", {}).get("rule", "rlt")
    one_of(presets["tokenizer"], tokenizer=rule)
    defaults: list[Any] = [
        "_self_",  # first, so that a group's preset wins over the dataclass's own defaults
        {"data": "kinetics400"},
        {"model": "vit_base"},
        {"tokenizer": rule},
        {"logger": "default"},
        "run",
        {"experiment": None},
    ]
    store = ConfigStore.instance()
    store.store(name="config", node=_writable(_Root(defaults=defaults)))
    store.store(name="run", node=beneath, package="_global_")
    for name, node in presets["tokenizer"].items():
        store.store(group="tokenizer", name=name, node=node)
    try:
        with hydra.initialize_config_dir(str(Path(__file__).parent), version_base="1.3"):
            composed = hydra.compose("config", [*_undone(given), *opened, *_replaced(opened, by_file, rule)])
        found: Any = OmegaConf.to_object(composed)
    except RltError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if isinstance(error.__cause__, RltError):
            raise error.__cause__ from error
        raise InvalidArgumentError(_one_line(error)) from error
    return Config(**{part.name: getattr(found, part.name) for part in fields(Config)})


def typed(overrides: Sequence[str]) -> dict[str, object]:
    """See `rlt.conf.typed`."""
    presets, keys, values = _presets(), _keys(), {}
    asked = [_parsed(override) for override in overrides]
    if theirs := in_our_words(dict(asked)):
        raise InvalidArgumentError(f"this is a command of the original code; here it is: {theirs}")
    for override, (name, value) in zip(overrides, asked, strict=True):
        if now := _MOVED.get(name) or _MOVED.get(f"{name}={value}"):
            raise InvalidArgumentError(f"{override} is now written {now}")
        if name in _RULE and is_rule_file(str(value)):
            name = "tokenizer"  # all of it is in the file, which is read when it is composed
        elif name in presets and not isinstance(value, dict):
            one_of(presets[name], **{name: value})
        elif name not in keys:
            raise InvalidArgumentError(f"there is no option {name}{_nearest_key(name, keys)}")
        values[name] = value
    return values


def _opened(overrides: Sequence[str]) -> tuple[list[str], bool]:
    """Overrides with the rule and the options of a rule file in the place of its name; whether a file has the say."""
    opened, by_file = [], False
    for override in overrides:
        name, value = _parsed(override)
        if name in _RULE and not isinstance(value, dict):
            by_file = is_rule_file(str(value))
            if by_file:
                rule = read_rule_file(str(value))
                opened.append(f"tokenizer={rule.pop('rule')}")
                opened += [f"tokenizer.{key}={json.dumps(option)}" for key, option in rule.items()]
                continue
        opened.append(override)
    return opened, by_file


def _replaced(overrides: Sequence[str], by_file: bool, rule: str) -> list[str]:
    """Overrides that let the last of `tokenizer.threshold`, `keep_ratio` and `max_tokens` stand alone.

    The rule follows it where nothing but a file, a run or a default says which one.

    Args:
        overrides: as they are typed, rule files opened.
        by_file: whether a file says the rule.
        rule: that of the run or the default.
    """
    last, typed_rule = None, None
    for override in overrides:
        for key, value in _leaves(*_parsed(override)):
            if key in _SHARES and value is not None:
                last = key
            elif key in _RULE:
                typed_rule = str(value)
    if last is None:
        return []
    replaced = [f"{key}=null" for key in _SHARES if key != last]
    of_last = "rlt" if last == "tokenizer.threshold" else "budget"
    if (typed_rule is None or by_file) and (typed_rule or rule) in ("rlt", "budget"):
        replaced.append(f"tokenizer.rule={of_last}")
    return replaced


def _undone(given: Mapping[str, object]) -> list[str]:
    """Overrides that take back what a preset or a run says, where its counterpart is typed."""
    values = dict(chain.from_iterable(_leaves(key, value) for key, value in given.items()))
    undone = []
    for keys in _COUNTERPARTS:
        pair = {key: values.get(key) for key in keys}
        exclusive(**pair)
        if any(value is not None for value in pair.values()):
            undone += [f"{key}=null" for key in keys if key not in values]
    return undone


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    """Keys and values below a key that was typed with a whole section: data.clip={fps: 5}."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    else:
        yield key, value


def _writable(node: Any) -> DictConfig:
    """A node whose frozen dataclasses take overrides; OmegaConf makes them read-only."""
    config = OmegaConf.structured(node)
    below = [config]
    while below:
        section = below.pop()
        OmegaConf.set_readonly(section, None)
        below += [value for value in section.values() if isinstance(value, DictConfig)]
    return config


def _parsed(override: str) -> tuple[str, object]:
    if "=" not in override:
        raise InvalidArgumentError(f"{override!r} is no option; options are written key=value")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        name, _, value = override.partition("=")
        raise InvalidArgumentError(
            f"{override} cannot be read; put the value in quotes: '{name}=\"{value}\"'"
        ) from error
    if parsed.is_sweep_override():
        raise InvalidArgumentError(f"{override} is more than one value; give one, or a list in brackets: key=[1,2]")
    return parsed.key_or_group, parsed.value()


def _beneath(run: Mapping[str, Any], given: Mapping[str, object]) -> dict[str, Any]:
    """What stays of a run's configuration below what is typed."""
    chosen = {name for name in _presets() if name in given}
    if is_rule_file(str(given.get("tokenizer.rule", ""))):  # which has all options of its rule
        chosen.add("tokenizer")
    if "experiment" in chosen:
        chosen |= {name for name in run if name not in _NOT_OF_AN_EXPERIMENT}
    kept = {name: value for name, value in run.items() if name not in chosen}
    rule = kept.get("tokenizer", {}).get("rule", "")
    if is_rule_file(rule):
        kept["tokenizer"] = read_rule_file(rule)
    data = run.get("data")
    if "data" in chosen and isinstance(data, Mapping):  # no preset names files
        kept["data"] = {name: data[name] for name in _MANIFESTS if name in data}
    elif isinstance(data, Mapping) and data.get("clip", {}).get("fps") is not None:  # once written beside a stride
        kept["data"] = {**data, "clip": {**data["clip"], "frame_stride": None}}
    return kept


def _presets() -> dict[str, dict[Any, Any]]:
    """Keys that take the name of a preset, with what they allow."""
    return {
        **_fixed_presets(),
        "tokenizer": TokenizerConfig.presets(),  # which a program can add to
        "experiment": dict.fromkeys(experiments()),
    }


@cache
def _fixed_presets() -> dict[str, dict[Any, Any]]:
    """Those that are always the same, handed to Hydra."""
    presets: dict[str, dict[Any, Any]] = {
        "data": _data_presets(),
        "model": {name: ModelConfig(name=name) for name in MODELS},
        "logger": {
            "default": LoggerConfig(),
            "wandb": LoggerConfig(wandb=True),
            "none": LoggerConfig(csv=False, tensorboard=False),
        },
    }
    for group, nodes in presets.items():
        for name, node in nodes.items():
            ConfigStore.instance().store(group=group, name=name, node=_writable(node))
    return presets


def _data_presets() -> dict[str, DataConfig]:
    """Data sets with the sampling and views that their papers use."""
    kinetics = DataConfig(views=ViewConfig(num_clips=5, num_crops=3))
    something = DataConfig(
        clip=ClipSpec(sampling="uniform"),
        views=ViewConfig(num_clips=2, num_crops=3),
        augment=AugmentConfig(horizontal_flip=False),  # its labels say left and right
    )
    folder = DataConfig(views=ViewConfig(num_clips=1, num_crops=1))
    return {f"kinetics{classes}": kinetics for classes in (400, 600, 700)} | {"ssv2": something, "folder": folder}


def _keys() -> dict[str, str]:
    """All options and the sections that hold them, each with its section; fields of a user's own rules too."""
    rules = TokenizerConfig.presets().values()
    return {f"tokenizer.{option.name}": "tokenizer" for rule in rules for option in fields(rule)} | _documented_keys()


@cache
def _documented_keys() -> dict[str, str]:
    keys: dict[str, str] = {}
    for section in sections():
        keys |= {section.name: "", **{option.key: section.name for option in section.options}}
    return keys


def _nearest_key(name: str, keys: Mapping[str, str]) -> str:
    """The option of the same last part, or that looks most like `name` in its section if there is one, else at all."""
    section, _, last = name.rpartition(".")
    options = [key for key in keys if key not in keys.values()] + list(_presets())
    by_last = {key.rpartition(".")[2]: key for key in options}
    within = {part: key for part, key in by_last.items() if not section or keys.get(key) == section}
    known = {last: by_last[last]} if last in by_last else within or {key: key for key in options}
    close = get_close_matches(last if last in by_last or within else name, known, n=1)
    return f"; did you mean {known[close[0]]}?" if close else "; `rlt train --help` lists all"


def _one_line(error: Exception) -> str:
    """What kind of value is needed; else what omegaconf says, without its stack of places; else what Hydra says."""
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        return f"{cause.full_key} is {cause.value!r}; {_needed(cause)} is needed, see `rlt train --help`"
    lines = str(cause if isinstance(cause, OmegaConfBaseException) else error).splitlines()
    place = next((line.partition(":")[2].strip() for line in lines if "full_key:" in line), "")
    said = " ".join(line.strip() for line in lines if line.strip() and not _is_about_hydra(line))
    return f"{place}: {said}" if place else said


def _needed(error: ValidationError) -> str:
    """The kinds of value that the schema has for what is wrong."""
    if error.object_type is list:
        kinds = get_args(error.ref_type)
    else:
        kind = get_type_hints(error.object_type)[str(error.key)]
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return " or ".join(
        _KINDS.get(kind, "a map {NAME: VALUE}" if is_dataclass(kind) else "a list in brackets") for kind in kinds
    )


def _is_about_hydra(line: str) -> bool:
    """Lines that say where in Hydra's machinery something happened, which no user can change."""
    words = ("full_key:", "object_type=", "reference_type=", "provider=", "Config search path", "See https://hydra.cc")
    return line.strip().startswith(words)

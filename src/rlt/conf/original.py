"""Options of the original code, and what they are here, so that its commands need no looking up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

EXPERIMENTS = {
    "train_vit_mae": ("train", "k400_vit_base_train", "rlt"),
    "val_vit_mae": ("evaluate", "k400_vit_base_eval", "none"),
    "val_vitl_mae": ("evaluate", "k400_vit_large_eval", "none"),
    "val_vith_mae": ("evaluate", "k400_vit_huge_eval", "rlt"),
    "val_vit_fps15": ("evaluate", "k400_vit_base_stride2_eval", "rlt"),
    "val_vit_mae_ssv2": ("evaluate", "ssv2_vit_base_eval", "none"),
}
"""Name of an experiment there -> command and preset here, and its `drop_policy`."""
_TOKENIZER = "model.tokenizer_cfg"
RENAMED = {
    "model.pretrain": "checkpoint",
    "model.finetune": "checkpoint",
    "ckpt_path": "checkpoint",
    "model.compile": "trainer.compile",
    "trainer.gradient_clip_val": "trainer.gradient_clip",
    "data.train_metadata_path": "data.train",
    "data.val_metadata_path": "data.val",
    "data.test_metadata_path": "data.test",
}
_NEEDED = {"train": ("data.train", "data.val", "checkpoint"), "evaluate": ("data.test", "checkpoint")}


def in_our_words(given: Mapping[str, object]) -> str | None:
    """The command here that does what options of the original code ask for; None if none of them is the original's.

    Args:
        given: keys and values as they are typed, ours among them, which stay.
    """
    given = dict(leaf for key, value in given.items() for leaf in _leaves(key, value))
    experiment = str(given.get("experiment")).removesuffix(".yaml")
    policies = {key.rpartition(".")[2]: value for key, value in given.items() if key.startswith(f"{_TOKENIZER}.")}
    if experiment not in EXPERIMENTS and not policies and not any(key in RENAMED for key in given):
        return None
    command, preset, policy = EXPERIMENTS.get(experiment, (None, None, None))
    words = [] if preset is None else [f"rlt {command}", f"experiment={preset}"]
    words += _tokens(policies, policy)
    stay = {key: value for key, value in given.items() if not key.startswith(_TOKENIZER) and key != "experiment"}
    if preset is None and "experiment" in given:
        words.insert(0, f"experiment={given['experiment']}")
    ours = {RENAMED.get(key, key): value for key, value in stay.items()}
    words += [f"{key}={value}" for key, value in ours.items()]
    words += [f"{key}=..." for key in _NEEDED.get(str(command), ()) if key not in ours]
    return " ".join(words)


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    """What is written as a map of the tokenizer's options, one by one."""
    if key.startswith(_TOKENIZER) and isinstance(value, dict):
        for name, below in value.items():
            yield f"{key}.{name}", below
    else:
        yield key, value


def _tokens(policies: Mapping[str, object], policy: str | None) -> list[str]:
    """The rule of `drop_policy` and `drop_param`, and whether lengths are encoded."""
    policy, parameter = str(policies.get("drop_policy", policy or "rlt")), policies.get("drop_param")
    words = [] if not policies and policy is None else [f"tokenizer={policy}"]
    if isinstance(parameter, int | float) and policy == "rlt":
        words.append(f"tokenizer.threshold={parameter}")
    if policy == "random":  # which keeps that share, whatever its docstring says
        words.append(f"tokenizer.keep_ratio={0.1 if parameter is None else parameter}")
    if policies.get("encode_length") is True:
        words.append("model.length_encoding=learned")
    return words

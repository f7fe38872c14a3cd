"""Names of the same weights in other projects, as data: one table per layout, read in both directions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlt.structures import PatchSpec

LayoutName = Literal["rlt", "videomae", "videomae_pretrain", "hf", "hf_pretrain"]
Group = Literal["core", "qv_bias", "length_embed", "head_norm", "head"]
"""Weights that are there together or not at all; only "core" is in every checkpoint."""


@dataclass(frozen=True)
class Rule:
    """One of our weights and where another layout keeps it. `{i}` stands for the number of the block."""

    ours: str
    """Name in `VisionTransformer.state_dict()`."""
    theirs: tuple[str, ...]
    """Name there; several where it is kept in parts."""
    transform: str = "same"
    """Key of `TRANSFORMS`."""

    @property
    def group(self) -> Group:
        """See `Group`."""
        if self.ours.endswith(("q_bias", "v_bias")):
            return "qv_bias"
        groups: dict[str, Group] = {"length_embed": "length_embed", "fc_norm": "head_norm", "head": "head"}
        return groups.get(self.ours.split(".")[0], "core")


@dataclass(frozen=True)
class Layout:
    """How one project names the weights of this architecture, and what it keeps beside them."""

    name: LayoutName
    title: str
    """Readable name."""
    markers: tuple[str, ...]
    """Keys that are all there in this layout."""
    rules: tuple[Rule, ...]
    ignored: tuple[tuple[str, str], ...] = ()
    """(beginning of a key, reason): weights that belong to no part of a classifier."""
    final_norm: str = ""
    """LayerNorm after the blocks that stands where tokens are not averaged; our networks have none."""
    positions: str = ""
    """A stored position table; it must be the fixed one."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(pattern, replacement): other spellings of keys, brought to the one of `rules` first."""
    layer_norm_eps: float = 1e-6
    head_norm_eps: float = 1e-6

    def canonical(self, name: str) -> str:
        """A key in the spelling of `rules`."""
        for pattern, replacement in self.aliases:
            name = re.sub(pattern, replacement, name)
        return name


def _rules(pairs: Iterable[tuple[str, str]], special: Iterable[Rule] = (), prefix: str = "") -> tuple[Rule, ...]:
    """Rules for pairs of names; `prefix` goes before all of theirs but the head."""
    rules = [*special, *(Rule(ours, (theirs,)) for ours, theirs in pairs)]
    return tuple(
        rule
        if rule.group in ("head", "head_norm")
        else replace(rule, theirs=tuple(f"{prefix}{name}" for name in rule.theirs))
        for rule in rules
    )


def _weight_and_bias(*pairs: tuple[str, str]) -> list[tuple[str, str]]:
    return [(f"{ours}.{kind}", f"{theirs}.{kind}") for ours, theirs in pairs for kind in ("weight", "bias")]


_OUR_LAYERS = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
_SAME_NAMES = [
    ("patch_embed.bias", "patch_embed.bias"),
    *((f"blocks.{{i}}.attn.{name}",) * 2 for name in ("qkv.weight", "q_bias", "v_bias")),
    *_weight_and_bias(*((f"blocks.{{i}}.{layer}",) * 2 for layer in _OUR_LAYERS)),
    *_weight_and_bias(("fc_norm", "fc_norm"), ("head", "head")),
]
_VIDEOMAE_NAMES = [(ours, ours.replace("patch_embed.bias", "patch_embed.proj.bias")) for ours, _ in _SAME_NAMES]
_VIDEOMAE_SPECIAL = (
    Rule("patch_embed.weight", ("patch_embed.proj.weight",), "conv3d"),
    Rule("length_embed", ("length_embed",), "leading_axis"),
)
_HF_NAMES = [
    ("patch_embed.bias", "embeddings.patch_embeddings.projection.bias"),
    ("blocks.{i}.attn.q_bias", "encoder.layer.{i}.attention.attention.q_bias"),
    ("blocks.{i}.attn.v_bias", "encoder.layer.{i}.attention.attention.v_bias"),
    *_weight_and_bias(
        ("blocks.{i}.norm1", "encoder.layer.{i}.layernorm_before"),
        ("blocks.{i}.attn.proj", "encoder.layer.{i}.attention.output.dense"),
        ("blocks.{i}.norm2", "encoder.layer.{i}.layernorm_after"),
        ("blocks.{i}.mlp.fc1", "encoder.layer.{i}.intermediate.dense"),
        ("blocks.{i}.mlp.fc2", "encoder.layer.{i}.output.dense"),
        ("fc_norm", "fc_norm"),
        ("head", "classifier"),
    ),
]
_HF_SPECIAL = (
    Rule("patch_embed.weight", ("embeddings.patch_embeddings.projection.weight",), "conv3d"),
    Rule(
        "blocks.{i}.attn.qkv.weight",
        tuple(f"encoder.layer.{{i}}.attention.attention.{name}.weight" for name in ("query", "key", "value")),
        "concatenate",
    ),
)
_DECODER = tuple((start, "decoder of the pretraining") for start in ("decoder.", "encoder_to_decoder.", "mask_token"))
_HF_PATCHES = "videomae.embeddings.patch_embeddings.projection.weight"
_HF = Layout(
    "hf",
    "Hugging Face",
    markers=(_HF_PATCHES,),
    rules=_rules(_HF_NAMES, _HF_SPECIAL, "videomae."),
    final_norm="videomae.layernorm.",
    positions="videomae.embeddings.position_embeddings",
    aliases=(  # in memory transformers 5 says query.bias, on disk and before version 5 q_bias
        (r"\.attention\.attention\.query\.bias$", ".attention.attention.q_bias"),
        (r"\.attention\.attention\.value\.bias$", ".attention.attention.v_bias"),
        (r"^(embeddings\.|encoder\.layer\.|layernorm\.)", r"videomae.\1"),  # VideoMAEModel alone
    ),
    layer_norm_eps=1e-12,
    head_norm_eps=1e-5,
)

LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "rlt",
        "rlt",
        markers=("patch_embed.weight", "blocks.0.attn.qkv.weight"),
        rules=_rules(_SAME_NAMES, [Rule(name, (name,)) for name in ("patch_embed.weight", "length_embed")]),
    ),
    Layout(
        "videomae_pretrain",
        "VideoMAE pretraining",
        markers=("encoder.patch_embed.proj.weight",),
        rules=_rules(_VIDEOMAE_NAMES, _VIDEOMAE_SPECIAL, "encoder."),
        ignored=(*_DECODER, ("pos_embed", _DECODER[0][1]), ("encoder.norm.", "norm that fine-tuning replaces")),
        positions="encoder.pos_embed",
    ),
    Layout(
        "videomae",
        "VideoMAE",
        markers=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
        rules=_rules(_VIDEOMAE_NAMES, _VIDEOMAE_SPECIAL),
        final_norm="norm.",
        positions="pos_embed",
    ),
    replace(
        _HF,
        name="hf_pretrain",
        title="Hugging Face pretraining",
        markers=(_HF_PATCHES, "mask_token"),
        ignored=(*_DECODER, ("videomae.layernorm.", "norm that fine-tuning replaces")),
        final_norm="",
    ),
    _HF,
)
"""All layouts that can be read, in the order in which they are tried."""


def patches_of(weight: Tensor) -> PatchSpec:
    """Read the size of a token off an embedding, [width, 3, tubelet, patch, patch] or [width, values].

    Of a flat one only the product is known, so two frames per token are assumed, as in every published checkpoint.
    A ValueError says what is needed, if it is neither.
    """
    if weight.ndim == 5 and weight.shape[1] == 3 and weight.shape[3] == weight.shape[4]:
        return PatchSpec(weight.shape[2], weight.shape[3])
    patch = math.isqrt(weight.shape[-1] // 6)
    if weight.ndim == 2 and weight.shape[1] == 6 * patch**2:
        return PatchSpec(2, patch)
    raise ValueError("[width, 3, tubelet, patch, patch] with square patches")


def _from_conv3d(parts: tuple[Tensor, ...]) -> Tensor:
    """[width, 3, t, p, p], or the same flattened, -> [width, values] in (frame, row, column, channel) order."""
    spec = patches_of(parts[0])
    tubelet, patch = spec.tubelet_size, spec.patch_size
    return parts[0].reshape(-1, 3, tubelet, patch, patch).permute(0, 2, 3, 4, 1).flatten(1)


def _to_conv3d(weight: Tensor, spec: PatchSpec) -> tuple[Tensor, ...]:
    pixels = weight.unflatten(1, (spec.tubelet_size, spec.patch_size, spec.patch_size, 3))
    return (pixels.permute(0, 4, 1, 2, 3).contiguous(),)


def _without_leading_axis(parts: tuple[Tensor, ...]) -> Tensor:
    if parts[0].ndim != 3 or len(parts[0]) != 1:
        raise ValueError("[1, time steps, width]")
    return parts[0][0]


def _concatenated(parts: tuple[Tensor, ...]) -> Tensor:
    if any(part.ndim != 2 or part.shape != parts[0].shape for part in parts):
        raise ValueError("[width, width] for queries, keys and values alike")
    return torch.cat(parts)


class Transform(NamedTuple):
    """A change of form and its inverse."""

    to_ours: Callable[[tuple[Tensor, ...]], Tensor]
    """Raises a ValueError that says which shape is needed."""
    to_theirs: Callable[[Tensor, PatchSpec], tuple[Tensor, ...]]


TRANSFORMS: dict[str, Transform] = {
    "same": Transform(lambda parts: parts[0], lambda tensor, _: (tensor,)),
    "conv3d": Transform(_from_conv3d, _to_conv3d),
    "leading_axis": Transform(_without_leading_axis, lambda tensor, _: (tensor[None],)),
    "concatenate": Transform(_concatenated, lambda tensor, _: tuple(part.clone() for part in tensor.chunk(3))),
}


@dataclass(frozen=True)
class Translation:
    """A state dict in our names, and what did not fit."""

    state: dict[str, Tensor]
    missing: dict[str, Group]
    """Names there -> group."""
    unexpected: tuple[str, ...]
    mis_shaped: tuple[str, ...]
    """Sentences: name, shape, the shape that is needed."""


def detect_layout(names: Collection[str]) -> Layout | None:
    """The layout that keys belong to, after wrappers such as "module." are off; None if it is none of `LAYOUTS`."""
    for layout in LAYOUTS:
        known = {layout.canonical(name) for name in names}
        if known.issuperset(layout.markers):
            return layout
    return None


def count_blocks(rules: Iterable[Rule], names: Iterable[str]) -> int:
    """How many different blocks the names speak of."""
    starts = {rule.theirs[0].split("{i}")[0] for rule in rules if "{i}" in rule.theirs[0]}
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(starts)))})(\d+)\.")
    return len({match[1] for match in map(pattern.match, names) if match})


def _expanded(rules: Iterable[Rule], depth: int) -> Iterable[Rule]:
    for rule in rules:
        if "{i}" not in rule.ours:
            yield rule
            continue
        for i in range(depth):
            theirs = tuple(name.replace("{i}", str(i)) for name in rule.theirs)
            yield Rule(rule.ours.replace("{i}", str(i)), theirs, rule.transform)


def to_ours(rules: Iterable[Rule], tensors: Mapping[str, Tensor], depth: int) -> Translation:
    """Bring another layout's tensors under our names. Nothing is dropped silently: see `Translation`."""
    state: dict[str, Tensor] = {}
    missing: dict[str, Group] = {}
    mis_shaped: list[str] = []
    known: set[str] = set()
    for rule in _expanded(rules, depth):
        known.update(rule.theirs)
        absent = [name for name in rule.theirs if name not in tensors]
        missing.update(dict.fromkeys(absent, rule.group))
        if absent:
            continue
        parts = tuple(tensors[name] for name in rule.theirs)
        try:
            state[rule.ours] = TRANSFORMS[rule.transform].to_ours(parts)
        except ValueError as error:
            mis_shaped.append(f"{rule.theirs[0]} is {list(parts[0].shape)}, needed is {error}")
    unexpected = tuple(name for name in tensors if name not in known)
    return Translation(state, missing, unexpected, tuple(mis_shaped))


def to_theirs(rules: Iterable[Rule], state: Mapping[str, Tensor], depth: int, spec: PatchSpec) -> dict[str, Tensor]:
    """The inverse of `to_ours`; a KeyError if a tensor has no place in the other layout."""
    left = dict(state)
    tensors: dict[str, Tensor] = {}
    for rule in _expanded(rules, depth):
        if rule.ours in left or rule.group == "core":
            parts = TRANSFORMS[rule.transform].to_theirs(left.pop(rule.ours), spec)
            tensors.update(zip(rule.theirs, parts, strict=True))
    if left:
        raise KeyError(f"no place for {', '.join(left)}")
    return tensors

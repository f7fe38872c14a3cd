"""Everything that is needed to build a `VisionTransformer`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rlt.checks import at_least
from rlt.errors import CheckpointError, InvalidArgumentError, one_line, warn_caller
from rlt.network.run_lengths import AWARE, IGNORED, RunLengthParts
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD, PatchSpec
from rlt.tokens import RULES, Rule
from rlt.tokens.naming import make_rule, rule_options

if TYPE_CHECKING:
    from rlt.video import ClipSpec

MODEL_TYPE = "rlt_vit"
"""What `model_type` in config.json says of our checkpoints."""
LengthEncoding = Literal["none", "learned"]
"""Whether the network is told how long a token stands: "learned" adds one vector per run length (paper, section
3.3)."""


@dataclass(frozen=True)
class ViTConfig:
    """Everything that is needed to build a `VisionTransformer`; written as JSON beside the weights."""

    width: int = 768
    """Values per token."""
    depth: int = 12
    """Number of blocks."""
    num_heads: int = 12
    """Attention heads; divides width."""
    mlp_width: int = 3072
    """Hidden values per token in the MLPs."""
    num_classes: int = 400
    """Outputs of the head; 0 for none, then the model returns features."""
    num_frames: int = 16
    """Frames of the clips that it is meant for. Others work: positions are by coordinates."""
    image_size: int = 224
    """Height and width in pixels of the clips that it is meant for. Others work."""
    tubelet_size: int = 2
    """Frames per token."""
    patch_size: int = 16
    """Height and width of a token in pixels."""
    qkv_bias: bool = True
    """Whether queries and values have a bias (keys never do)."""
    layer_norm_eps: float = 1e-6
    """Epsilon of the LayerNorms in the blocks."""
    head_norm_eps: float = 1e-6
    """Epsilon of the LayerNorm before the head."""
    length_encoding: LengthEncoding = "none"
    """See `LengthEncoding`."""
    run_lengths: str = AWARE
    """Where run lengths count: "aware" everywhere, "ignored" nowhere (the paper), or parts, see
    `rlt.network.run_lengths`."""
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that the weights expect, on the scale 0..1."""
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that the weights expect, on the scale 0..1."""
    labels: tuple[str, ...] = ()
    """Class names in the order of the outputs; empty if they are not known."""
    clip: ClipSpec | None = None
    """How clips were taken in training; None if it is not known."""
    rule: Rule | None = None
    """Which tokens it was trained on, and `VisionTransformer.tokenize` keeps where nothing else is asked for; None if
    it is not known."""

    def __post_init__(self) -> None:
        for name in ("pixel_mean", "pixel_std", "labels"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = ("width", "depth", "num_heads", "mlp_width", "num_frames", "image_size", "tubelet_size", "patch_size")
        at_least(1, **{name: getattr(self, name) for name in sizes})
        if self.width % self.num_heads:
            raise InvalidArgumentError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        RunLengthParts.of(self.run_lengths)
        if self.num_classes < 0:
            raise InvalidArgumentError(f"num_classes is {self.num_classes}; 0 (no head) or more is needed")
        if self.labels and len(self.labels) != self.num_classes:
            raise InvalidArgumentError(f"{len(self.labels)} labels for {self.num_classes} classes; give one per class")

    @property
    def patches(self) -> PatchSpec:
        """How the network wants frames to be cut into tokens."""
        return PatchSpec(self.tubelet_size, self.patch_size, self.pixel_mean, self.pixel_std)

    @property
    def clip_spec(self) -> ClipSpec:
        """The clips that it is meant for: `clip`, or what `num_frames` and `image_size` say of them."""
        from rlt.video import ClipSpec  # and with it the decoder, which a network alone does not need

        return self.clip or ClipSpec(self.num_frames, size=self.image_size)

    def replace(self, **changes: object) -> ViTConfig:
        """A copy with some fields changed; unknown names are a TypeError."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON; without `clip` and `rule` where they are not known."""
        content = {**dataclasses.asdict(self), "rule": None if self.rule is None else rule_options(self.rule)}
        return {name: value for name, value in content.items() if name not in _INPUTS or value is not None}

    @classmethod
    def from_dict(cls, content: Mapping[str, object], source: str | Path) -> ViTConfig:
        """The inverse of `to_dict`, from the config.json of one of our checkpoints.

        Args:
            content: fields by name; `model_type` must be `MODEL_TYPE`. Sizes must be there, others have defaults.
            source: named in errors.

        Raises:
            CheckpointError: if a field is missing, not known, or not of its type.
        """
        if content.get("model_type") != MODEL_TYPE:
            raise CheckpointError(
                f"{source} has model_type {content.get('model_type')!r}, not {MODEL_TYPE!r}; "
                "other layouts are read by rlt.create_model(name, checkpoint=...)"
            )
        defaults = cls().to_dict()
        fields = {name: value for name, value in content.items() if name not in ("model_type", "rlt_version", *_INPUTS)}
        fields.setdefault("run_lengths", IGNORED)  # written before there was a choice
        missing = [name for name in _REQUIRED if name not in fields]
        unknown = [name for name in fields if name not in defaults]
        if missing or unknown:
            raise CheckpointError(
                f"{source} was written by rlt {content.get('rlt_version')}: config.json lacks {missing} and has "
                f"unknown {unknown}; upgrade rlt or get the file again"
            )
        for name, value in fields.items():
            kind = type(defaults[name])
            if not isinstance(value, {tuple: (list, tuple), float: (float, int)}.get(kind, (kind,))):
                raise CheckpointError(f"{source} has {name}={value!r} in config.json; a {kind.__name__} is needed")
        try:
            config = cls(**fields, **_inputs_of(content, source))  # type: ignore[arg-type]
        except InvalidArgumentError as error:
            raise CheckpointError(f"{source} has a config.json that does not hold together: {error}") from error
        places = config.num_frames // config.tubelet_size * (config.image_size // config.patch_size) ** 2
        if places * config.width > _MOST_POSITIONS:
            raise CheckpointError(
                f"{source} has num_frames={config.num_frames} and image_size={config.image_size} in config.json, which "
                f"is a table of {places:,} positions; at most {_MOST_POSITIONS // config.width:,} are taken"
            )
        return config


_INPUTS = ("clip", "rule")


def _inputs_of(content: Mapping[str, object], source: str | Path) -> dict[str, object]:
    """`clip` and `rule` of a config.json, as far as they stand there."""
    inputs: dict[str, object] = {}
    try:
        if isinstance(clip := content.get("clip"), Mapping):
            from rlt.video import ClipSpec

            inputs["clip"] = ClipSpec(**clip)
        if isinstance(rule := content.get("rule"), Mapping):
            if (name := rule.get("rule")) in RULES:
                inputs["rule"] = make_rule(**{"name" if key == "rule" else key: value for key, value in rule.items()})
            else:  # of a program of its own; the weights are of use all the same
                warn_caller(
                    f"{source} was trained with rule {name!r}, which is not registered here; give another, or register "
                    "it with rlt.register_rule first",
                    UserWarning,
                )
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} has a clip or a rule in config.json that is none: {one_line(error)}"
        ) from error
    return inputs


_REQUIRED = ("width", "depth", "num_heads", "mlp_width", "num_classes", "tubelet_size", "patch_size")
"""Fields without which weights could fit and yet be misread."""
_MOST_POSITIONS = 2**28
"""Values of a table of positions that a file may ask for, 1 GiB: what a file says is bounded before it is used."""

"""VideoMAE's vision transformer over packed tokens: `PackedTokens` -> logits.

Shape legend: T tokens of all clips, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlt import weights
from rlt.checks import named_options
from rlt.errors import CheckpointError, InvalidArgumentError
from rlt.network.backends import Backend
from rlt.network.blocks import Block, mean_per_clip
from rlt.network.embedding import PatchEmbedding
from rlt.network.positions import SinusoidPositions
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD, PackedTokens, PatchSpec, Segments, pack
from rlt.tokens import Frames, Rule, tokenize

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
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of each channel that the weights expect, on the scale 0..1."""
    pixel_std: tuple[float, float, float] = IMAGENET_STD
    """Standard deviation of each channel that the weights expect, on the scale 0..1."""
    labels: tuple[str, ...] = ()
    """Class names in the order of the outputs; empty if they are not known."""

    def __post_init__(self) -> None:
        """Hold sizes together.

        Raises:
            InvalidArgumentError: naming the field that does not fit.
        """
        for name in ("pixel_mean", "pixel_std", "labels"):  # JSON gives lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("width", "depth", "num_heads", "mlp_width", "num_frames", "image_size", "tubelet_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.width % self.num_heads:
            raise InvalidArgumentError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.num_classes < 0:
            raise InvalidArgumentError(f"num_classes is {self.num_classes}; 0 (no head) or more is needed")
        if self.labels and len(self.labels) != self.num_classes:
            raise InvalidArgumentError(f"{len(self.labels)} labels for {self.num_classes} classes; give one per class")

    @property
    def patches(self) -> PatchSpec:
        """How the network wants frames to be cut into tokens."""
        return PatchSpec(self.tubelet_size, self.patch_size, self.pixel_mean, self.pixel_std)

    def replace(self, **changes: object) -> ViTConfig:
        """A copy with some fields changed; unknown names are a TypeError."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, object]:
        """All fields, ready for JSON."""
        return dataclasses.asdict(self)

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
        fields = {name: value for name, value in content.items() if name not in ("model_type", "rlt_version")}
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
            return cls(**fields)  # type: ignore[arg-type]
        except InvalidArgumentError as error:
            raise CheckpointError(f"{source} has a config.json that does not hold together: {error}") from error


_REQUIRED = ("width", "depth", "num_heads", "mlp_width", "num_classes", "tubelet_size", "patch_size")
"""Fields without which weights could fit and yet be misread."""
_TOKENS_AT_ONCE_ON_CPU = 2048
"""In inference; a pack of eight clips of 1,568 tokens took 1.1 times as long at once as clip by clip."""
_MODEL_CARD = """---
{{ card_data }}
---

A video classifier for [run-length tokens](https://arxiv.org/abs/2411.05222).

    import rlt

    model = rlt.VisionTransformer.from_pretrained("path or hub id")
    logits = model(model.tokenize(rlt.read_clip("video.mp4")))
"""


class VisionTransformer(
    nn.Module,
    ModelHubMixin,
    library_name="rlt",
    pipeline_tag="video-classification",
    model_card_template=_MODEL_CARD,
):
    """VideoMAE's ViT: tubelet embedding, fixed sinusoid positions, pre-norm blocks, mean over the tokens, head.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of huggingface_hub's mixin.
    """

    def __init__(self, config: ViTConfig) -> None:
        """Build the network with random weights (truncated normal, standard deviation 0.02)."""
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbedding(
            width,
            tubelet_size=config.tubelet_size,
            patch_size=config.patch_size,
            mean=config.pixel_mean,
            std=config.pixel_std,
        )
        time = config.num_frames // config.tubelet_size
        self.positions = SinusoidPositions(width, time * (config.image_size // config.patch_size) ** 2)
        self.length_embed = nn.Parameter(torch.zeros(time, width)) if config.length_encoding == "learned" else None
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.num_heads,
                config.mlp_width,
                qkv_bias=config.qkv_bias,
                layer_norm_eps=config.layer_norm_eps,
            )
            for _ in range(config.depth)
        )
        self.fc_norm = nn.LayerNorm(width, eps=config.head_norm_eps)
        self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()
        self.attention_backend: Backend | None = None
        self.activation_checkpointing = False
        self._traced: Callable[..., Tensor] | None = None
        self.apply(_init_linear)

    @named_options(policy="give rule=rlt.Everything(), rlt.Random() or another rule")
    def tokenize(
        self,
        frames: Frames,
        *,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        rule: Rule | str | None = None,
        seeds: Sequence[int] | None = None,
    ) -> PackedTokens:
        """Cut frames into tokens as this network wants them, drop those that repeat, and pack the others.

        Args:
            frames: one clip or several of one size, see `rlt.tokenize`, on any device.
            threshold: see `rlt.tokenize`, as the other options.
            keep_ratio: share of each clip's tokens to keep instead.
            max_tokens: number of each clip's tokens to keep at most instead.
            rule: any rule, or the name of one.
            seeds: one number per clip for rules that draw.

        Returns:
            The tokens on the device of the network.

        Raises:
            InvalidArgumentError: as `rlt.tokenize`.
        """
        tokens = tokenize(
            frames,
            threshold=threshold,
            keep_ratio=keep_ratio,
            max_tokens=max_tokens,
            rule=rule,
            seeds=seeds,
            spec=self.config.patches,
        )
        return pack(tokens).to(self.fc_norm.weight.device)

    def forward(self, packed: PackedTokens) -> Tensor:
        """Classify clips.

        Args:
            packed: the tokens of one or more clips, with the model's tubelet and patch size.

        Returns:
            float [clips, classes], or the features [clips, width] where the model has no head. The row of a clip does
            not depend on the clips it is packed with.

        Raises:
            InvalidArgumentError: if the tokens were cut with another tubelet or patch size.
        """
        # What passes through a block at once should fit into the cache of a CPU; rows do not depend on the pack.
        in_pieces = packed.device.type == "cpu" and not self.training
        pieces = packed.chunks(_TOKENS_AT_ONCE_ON_CPU) if in_pieces else [packed]
        logits = [self._logits(piece) for piece in pieces]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _logits(self, packed: PackedTokens) -> Tensor:
        if self._traced is None:
            logits: Tensor = self.head(self.forward_features(packed))
            return logits
        self.prepare_trace(packed)
        return self._traced(self, packed.patches, packed.place, packed.lengths, packed.cu_seqlens)

    def prepare_trace(self, packed: PackedTokens) -> None:
        """Make what `trace_logits` needs of tensors that no graph can make, for clips like these.

        Raises:
            InvalidArgumentError: if the tokens were cut with another tubelet or patch size.
        """
        self._check_token_size(packed)
        self.positions.grow(max(grid.num_tokens for grid in packed.grids))
        if packed.patches.dtype == torch.uint8:
            self.patch_embed.folding()

    def compile_network(self, **options: Any) -> None:
        """Run `forward` through `torch.compile` from now on: one graph from patches to logits for any token counts.

        Compiled anew only for another number of clips being one or many, precision, or training and evaluation.
        Takes seconds to minutes on the first call. Weights, their names and the other methods stay as they are.

        Args:
            options: further arguments of `torch.compile`, such as `mode` or `backend`.
        """
        self._traced = torch.compile(trace_logits, **{"dynamic": True, "fullgraph": True, **options})

    def forward_features(self, packed: PackedTokens) -> Tensor:
        """Features before the head: normalised mean of the tokens of each clip, float [clips, width]."""
        features: Tensor = self.fc_norm(mean_per_clip(self.forward_tokens(packed), packed.segments))
        return features

    def embed(self, packed: PackedTokens) -> Tensor:
        """Input of the first block, float [tokens, width]: patches, positions, and run lengths if they are encoded."""
        self._check_token_size(packed)
        self.positions.grow(max(grid.num_tokens for grid in packed.grids))
        return self._embed(packed.patches, packed.place, packed.lengths)

    def _embed(self, patches_TP: Tensor, place_T: Tensor, lengths_T: Tensor) -> Tensor:
        x_TD: Tensor = self.patch_embed(patches_TP)
        x_TD = x_TD + self.positions.table.index_select(0, place_T).to(x_TD.dtype)
        if self.length_embed is not None:
            longest = len(self.length_embed)  # runs longer than any seen in training share the last vector
            x_TD = x_TD + self.length_embed[(lengths_T - 1).clamp(max=longest - 1)]
        return x_TD

    def forward_tokens(self, packed: PackedTokens) -> Tensor:
        """Output of the last block, float [tokens, width]; `RunLengthTokens.expand` puts it back on the grid."""
        return self._run_blocks(self.embed(packed), packed.segments)

    def _run_blocks(self, x_TD: Tensor, segments: Segments) -> Tensor:
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x_TD = checkpoint(block, x_TD, segments, self.attention_backend, use_reentrant=False)
            else:
                x_TD = block(x_TD, segments, self.attention_backend)
        return x_TD

    def set_drop_path(self, rate: float) -> None:
        """Set stochastic depth for training: 0 in the first block, growing evenly to `rate` in the last.

        Raises:
            InvalidArgumentError: if rate is below 0, or 1 or more.
        """
        if not 0 <= rate < 1:
            raise InvalidArgumentError(f"drop_path is {rate}; 0 or more and below 1 is needed")
        for index, block in enumerate(self.blocks):
            block.drop_path = rate * index / max(len(self.blocks) - 1, 1)  # type: ignore[assignment]

    def add_length_encoding(self) -> None:
        """Give a model without length encoding a learned one that starts at zero, so that its outputs do not change."""
        if self.length_embed is None:
            time = self.config.num_frames // self.config.tubelet_size
            self.length_embed = nn.Parameter(torch.zeros(time, self.config.width, device=self.fc_norm.weight.device))
            self.config = self.config.replace(length_encoding="learned")

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, *, config: None = None, model_card_kwargs: dict[str, object] | None = None
    ) -> None:
        """Write model.safetensors, config.json with the labels, and a README.md where there is none.

        After a failure the folder's old files are still there and whole. `push_to_hub` uploads a model.

        Args:
            save_directory: made where it does not exist.
            config: not used; the model's own configuration is written.
            model_card_kwargs: further values for the README.

        Raises:
            CheckpointError: if the folder holds another kind of model, or cannot be written.
        """
        if config is not None:
            raise InvalidArgumentError("save_pretrained writes the model's own configuration; set model.config instead")
        folder = Path(save_directory)
        card = (
            {}
            if (folder / "README.md").exists()
            else {"README.md": str(self.generate_model_card(**(model_card_kwargs or {})))}
        )
        try:
            written_by = version("rlt")
        except PackageNotFoundError:  # run from a source tree
            written_by = "unknown"
        content = {"model_type": MODEL_TYPE, "rlt_version": written_by, **self.config.to_dict()}
        weights.write_folder(folder, self.state_dict(), content, card)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> VisionTransformer:
        """Load what `save_pretrained` wrote, in evaluation mode and float32, from a folder or a hub id.

        Checkpoints of other projects are read by `rlt.create_model(name, checkpoint=...)`. The keyword arguments are
        those of huggingface_hub.

        Raises:
            CheckpointError: in one line, if there is nothing of ours, or any weight is missing or does not fit.
        """
        folder = weights.find_source(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        config = weights.read_config(folder)
        if config is None:
            raise CheckpointError(f"{folder} has no config.json; give a folder that save_pretrained wrote, or a hub id")
        model = cls(ViTConfig.from_dict(config, folder))
        weights.load_strictly(model, weights.read_folder(folder), folder)
        return model.eval()

    def _check_token_size(self, packed: PackedTokens) -> None:
        ours, theirs = self.config.patches, packed.spec
        if (theirs.tubelet_size, theirs.patch_size) != (ours.tubelet_size, ours.patch_size):
            raise InvalidArgumentError(
                f"tokens have tubelet_size={theirs.tubelet_size}, patch_size={theirs.patch_size}; the model needs "
                f"tubelet_size={ours.tubelet_size}, patch_size={ours.patch_size}: cut them by model.tokenize"
            )


def trace_logits(
    model: VisionTransformer, patches_TP: Tensor, place_T: Tensor, lengths_T: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """`VisionTransformer.forward` as a function of tensors alone, in which no number of tokens is a constant.

    Args:
        model: for which `prepare_trace` was called.
        patches_TP: uint8 or float [T, values].
        place_T: int64 [T], see `PackedTokens.place`.
        lengths_T: int64 [T], run lengths.
        cu_seqlens: int32 [clips + 1].

    Returns:
        float [clips, classes].
    """
    segments = Segments((), cu_seqlens)
    x_TD = model._run_blocks(model._embed(patches_TP, place_T, lengths_T), segments)
    logits: Tensor = model.head(model.fc_norm(mean_per_clip(x_TD, segments)))
    return logits


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

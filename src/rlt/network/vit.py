"""VideoMAE's vision transformer over packed tokens: `PackedTokens` -> logits.

Shape legend: T tokens of all clips, P values of a patch, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlt.checks import at_least, named_options
from rlt.errors import InvalidArgumentError
from rlt.network.backends import Backend
from rlt.network.blocks import Block
from rlt.network.config import MODEL_TYPE, LengthEncoding, ViTConfig
from rlt.network.embedding import PatchEmbedding
from rlt.network.hub import HubModel
from rlt.network.positions import SinusoidPositions
from rlt.network.run_lengths import NOWHERE, RunLengthParts, key_bias, pooling_weights
from rlt.network.tome import MergedTokens, mean_over_input, merging_block, unmerged
from rlt.structures import PackedTokens, Segments, pack
from rlt.tokens import Frames, Rule, choose_rule, tokenize

__all__ = ["MODEL_TYPE", "LengthEncoding", "ViTConfig", "VisionTransformer", "trace_features"]

_TOKENS_AT_ONCE_ON_CPU = 2048
"""In inference: what passes through a block at once should fit into the cache. A pack of eight clips of 1,568 tokens
took 1.1 times as long at once as clip by clip."""


class VisionTransformer(HubModel):
    """VideoMAE's ViT: tubelet embedding, fixed sinusoid positions, pre-norm blocks, mean over the tokens, head.

    Weights are random at first (truncated normal, standard deviation 0.02). `save_pretrained`, `from_pretrained` and
    `push_to_hub` are those of `rlt.network.hub`. Settings are attributes that may be changed at any time:
    `attention_backend` (None chooses by device and precision), `activation_checkpointing` in training, and
    `merge_per_block`.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbedding(width, config.patches)
        time = config.num_frames // config.tubelet_size
        self.positions = SinusoidPositions(width, time * (config.image_size // config.patch_size) ** 2, longest=time)
        self.length_embed = nn.Parameter(torch.zeros(time, width)) if config.length_encoding == "learned" else None
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_width, config.qkv_bias, config.layer_norm_eps)
            for _ in range(config.depth)
        )
        self.fc_norm = nn.LayerNorm(width, eps=config.head_norm_eps)
        self.head = nn.Linear(width, config.num_classes) if config.num_classes else nn.Identity()
        self.attention_backend: Backend | None = None
        self.activation_checkpointing = False
        self._merge_per_block = 0
        self._network: Callable[..., Tensor] = VisionTransformer._features
        self.apply(_init_linear)

    @property
    def merge_per_block(self) -> int:
        """Tokens that each block merges away per clip (`rlt.network.tome`), 0 or more; at most half of those there are.

        0 is the plain network, bit for bit. A negative number is an InvalidArgumentError.
        """
        return self._merge_per_block

    @merge_per_block.setter
    def merge_per_block(self, value: int) -> None:
        at_least(0, merge_per_block=value)
        self._merge_per_block = value

    @property
    def run_lengths(self) -> str:
        """Where run lengths count (`rlt.network.run_lengths`): "ignored", "aware", or parts joined by "+".

        It stands in the configuration and is saved with it. Any other word is an InvalidArgumentError.
        """
        return self.config.run_lengths

    @run_lengths.setter
    def run_lengths(self, value: str) -> None:
        self.config = self.config.replace(run_lengths=value)

    @named_options(policy="give rule=rlt.Everything(), rlt.Random() or another rule")
    def tokenize(
        self,
        frames: Frames,
        *,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        reference: str | None = None,
        exposure: str | None = None,
        motion: str | None = None,
        rule: Rule | str | None = None,
        seeds: Sequence[int] | None = None,
    ) -> PackedTokens:
        """Cut frames into tokens as this network wants them, drop those that repeat, and pack the others.

        Args:
            frames: one clip or several of one size, see `rlt.tokenize`, on any device.
            threshold: see `rlt.tokenize`, as all other options. What is given changes the rule of the configuration
                (`ViTConfig.rule`), which stands where nothing is given; where it has none, as in `rlt.tokenize`.
            keep_ratio: share of each clip's tokens to keep instead.
            max_tokens: number of each clip's tokens to keep at most instead.
            reference: "previous" or "anchor".
            exposure: "none" or "gain".
            motion: "none" or "global".
            rule: any rule, or the name of one.
            seeds: one number per clip for rules that draw.

        Returns:
            The tokens on the device of the network.

        Raises:
            InvalidArgumentError: as `rlt.tokenize`.
        """
        chosen = choose_rule(
            rule,
            threshold=threshold,
            keep_ratio=keep_ratio,
            max_tokens=max_tokens,
            reference=reference,
            exposure=exposure,
            motion=motion,
            stored=self.config.rule,
        )
        tokens = tokenize(frames, rule=chosen, seeds=seeds, spec=self.config.patches)
        return pack(tokens).to(self.fc_norm.weight.device)

    def forward(self, packed: PackedTokens) -> Tensor:
        """Classify clips.

        Returns:
            float [clips, classes], or the features [clips, width] where the model has no head. The row of a clip does
            not depend on the clips it is packed with.

        Raises:
            InvalidArgumentError: if the tokens were cut with another tubelet or patch size.
        """
        return self._in_pieces(lambda piece: self.head(self._run_network(piece)), packed)

    def forward_features(self, packed: PackedTokens) -> Tensor:
        """Features before the head: normalised mean of the tokens of each clip, float [clips, width].

        The same pass as for the logits, in the same pieces and compiled where `forward` is; `head` makes logits of it.
        """
        return self._in_pieces(self._run_network, packed)

    def forward_tokens(self, packed: PackedTokens) -> Tensor:
        """Output of the last block, float [tokens, width]; `RunLengthTokens.expand` puts it back on the grid.

        Never compiled. Tokens that were merged share a row.
        """
        return self._in_pieces(self._tokens, packed)

    def forward_merged(self, packed: PackedTokens) -> MergedTokens:
        """Output of the last block with the tokens that are left, their sizes, and what each of them stands for."""
        parts = self._parts(packed)
        return self._run_blocks(self.embed(packed), packed.lengths, packed.segments, parts)

    def embed(self, packed: PackedTokens) -> Tensor:
        """Input of the first block, float [tokens, width]: patches, positions, and run lengths if they are encoded."""
        self.prepare(packed)
        return self._embed(packed.patches, packed.place, packed.lengths, packed.step, self._parts(packed))

    def prepare(self, packed: PackedTokens) -> None:
        """Make sure of what no graph can: that tokens are cut as the model needs, and positions for all their places.

        Raises:
            InvalidArgumentError: if the tokens were cut with another tubelet or patch size.
        """
        if not isinstance(packed, PackedTokens):
            raise InvalidArgumentError(
                f"packed is a {type(packed).__name__}; the network takes packed tokens: "
                "model(rlt.pack([rlt.tokenize(clip)]))"
            )
        ours, theirs = self.config.patches, packed.spec
        if (theirs.tubelet_size, theirs.patch_size) != (ours.tubelet_size, ours.patch_size):
            raise InvalidArgumentError(
                f"tokens have tubelet_size={theirs.tubelet_size}, patch_size={theirs.patch_size}; the model needs "
                f"tubelet_size={ours.tubelet_size}, patch_size={ours.patch_size}: cut them by model.tokenize"
            )
        grids = packed.grids
        self.positions.grow(max(grid.num_tokens for grid in grids), max(grid.time for grid in grids))

    def compile_network(self, **options: Any) -> None:
        """Run the network through `torch.compile` from now on: one graph from patches to features for any token counts.

        Compiled anew only for another number of clips being one or many, precision, or training and evaluation.
        Takes seconds to minutes on the first call. Weights and their names stay as they are. No graph holds for token
        merging: a call with `merge_per_block` above 0 is an InvalidArgumentError.

        Args:
            options: further arguments of `torch.compile`, such as `mode` or `backend`.
        """
        compiled = torch.compile(trace_features, **{"dynamic": True, "fullgraph": True, **options})

        def network(
            model: VisionTransformer,
            patches: Tensor,
            place: Tensor,
            lengths: Tensor,
            segments: Segments,
            step: Tensor,
            parts: RunLengthParts,
        ) -> Tensor:
            if model.merge_per_block:
                raise InvalidArgumentError(
                    f"merge_per_block is {model.merge_per_block}, but the network is compiled; set it to 0, or merge "
                    "in a model without compile_network"
                )
            return compiled(model, patches, place, lengths, segments.cu_seqlens, step, parts)

        self._network = network

    def _in_pieces(self, run: Callable[[PackedTokens], Tensor], packed: PackedTokens) -> Tensor:
        """What `run` gives, clip by clip or token by token, on the CPU in packs of some clips each."""
        self.prepare(packed)
        whole = self.training or packed.device.type != "cpu"
        outputs = [run(piece) for piece in ([packed] if whole else packed.chunks(_TOKENS_AT_ONCE_ON_CPU))]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _run_network(self, packed: PackedTokens) -> Tensor:
        tokens = packed.patches, packed.place, packed.lengths, packed.segments, packed.step
        return self._network(self, *tokens, self._parts(packed))

    def _parts(self, packed: PackedTokens) -> RunLengthParts:
        """Where run lengths count; nowhere if all are 1, so that such tokens have the same logits bit for bit."""
        parts = RunLengthParts.of(self.run_lengths)
        return parts if any(parts) and packed.has_runs else NOWHERE

    def _features(
        self,
        patches_TP: Tensor,
        place_T: Tensor,
        lengths_T: Tensor,
        segments: Segments,
        step_T: Tensor,
        parts: RunLengthParts,
    ) -> Tensor:
        x_TD = self._embed(patches_TP, place_T, lengths_T, step_T, parts)
        tokens = self._run_blocks(x_TD, lengths_T, segments, parts)
        if parts.pooling and not self.merge_per_block:
            weights_T = pooling_weights(lengths_T, segments).to(tokens.features.dtype)
            tokens = replace(tokens, features=tokens.features * weights_T[:, None])
        return self.fc_norm(mean_over_input(tokens))

    def _tokens(self, packed: PackedTokens) -> Tensor:
        tokens = self.forward_merged(packed)
        return tokens.features.index_select(0, tokens.owner) if self.merge_per_block else tokens.features

    def _embed(
        self, patches_TP: Tensor, place_T: Tensor, lengths_T: Tensor, step_T: Tensor, parts: RunLengthParts
    ) -> Tensor:
        x_TD: Tensor = self.patch_embed(patches_TP)
        positions = self.positions
        positions_TD = positions.over_runs(place_T, lengths_T, step_T) if parts.position else positions(place_T)
        x_TD = x_TD + positions_TD.to(x_TD.dtype)
        if self.length_embed is not None:
            longest = len(self.length_embed)  # runs longer than any seen in training share the last vector
            x_TD = x_TD + self.length_embed[(lengths_T - 1).clamp(max=longest - 1)]
        return x_TD

    def _run_blocks(self, x_TD: Tensor, lengths_T: Tensor, segments: Segments, parts: RunLengthParts) -> MergedTokens:
        if not self.merge_per_block:
            bias_T = key_bias(lengths_T) if parts.attention else None
            for block in self.blocks:
                x_TD = self._run_step(block, x_TD, segments, self.attention_backend, bias_T)
            return unmerged(x_TD, segments)
        # Merging knows sizes: a token begins with its run length, and counts so often everywhere.
        sizes_T = lengths_T.to(torch.float32) if parts.attention or parts.pooling else None
        tokens = unmerged(x_TD, segments, sizes_T)
        for block in self.blocks:
            tokens = self._run_step(merging_block, block, tokens, self.merge_per_block, self.attention_backend)
        return tokens

    def _run_step(self, step: Callable[..., Any], *arguments: object) -> Any:
        if self.activation_checkpointing and self.training:
            return checkpoint(step, *arguments, use_reentrant=False)
        return step(*arguments)

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


def trace_features(
    model: VisionTransformer,
    patches_TP: Tensor,
    place_T: Tensor,
    lengths_T: Tensor,
    cu_seqlens: Tensor,
    step_T: Tensor,
    parts: RunLengthParts = NOWHERE,
) -> Tensor:
    """`VisionTransformer.forward_features` as a function of tensors, in which no number of tokens is a constant.

    The model's `prepare` was called before; the tensors are those of `rlt.export.network_inputs`.
    """
    return model._features(patches_TP, place_T, lengths_T, Segments(cu_seqlens, len(patches_TP)), step_T, parts)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)

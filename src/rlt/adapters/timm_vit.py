"""Vision transformers of timm on frames of a video: an image model that sees a patch once for as long as it stands.

Shape legend: F frames of all clips, N kept patches of all frames, T tokens of all frames (kept patches, and the prefix
of each frame: class token, registers), L patches of a frame before dropping, P tokens of the prefix, D model width, H
heads, K width of a head.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.frames import FramePatch
from rlt.adapters.options import PatchOptions
from rlt.adapters.packed import embed_patches
from rlt.adapters.patching import Hook, Override
from rlt.adapters.statistics import Statistics
from rlt.errors import InvalidArgumentError


class TimmViTAdapter(FramePatch):
    """Frames of plain vision transformers: see `FramePatch`."""

    model_classes: ClassVar[tuple[str, ...]] = ("VisionTransformer",)
    library: ClassVar[str] = "timm"

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        super().__init__(model, options)
        _check_supported(self.model)
        self.extra_tokens = self.model.num_prefix_tokens

    @override
    def default_statistics(self) -> Statistics:
        trained_with = getattr(self.model, "pretrained_cfg", None) or {}
        mean, std = super().default_statistics()
        return tuple(trained_with.get("mean", mean)), tuple(trained_with.get("std", std))

    @override
    def edits(self) -> list[Override | Hook]:
        model = self.model
        return [
            Override(model, "forward_intermediates", self.refuse_intermediates),
            Override(model, "_pos_embed", self.add_positions),
            Override(model.patch_embed, "forward", self.embed),
            *(Override(module, "forward", partial(self.attend, module)) for module in self.attention_modules()),
            *(Override(module, "forward", partial(self.drop_paths, module)) for module in _inside(model, "DropPath")),
            Hook(model.norm, self.leave),
            Hook(model, self.finish),
        ]

    @override
    def attention_modules(self) -> list[nn.Module]:
        return _inside(self.model, "Attention")

    @override
    def input_shape(self) -> tuple[int, int, int, int]:
        # Without a number that of the smallest clip in which something can repeat.
        return (
            self.options.frames_per_clip or 2,
            self.model.patch_embed.proj.in_channels,
            *self.model.patch_embed.img_size,
        )

    @override
    def token_size(self) -> tuple[int, int]:
        return 1, self.model.patch_embed.patch_size[0]

    def embed(self, images: Tensor) -> Tensor:
        """Pixels [F, C, H, W], normalised float or uint8 -> embeddings of the kept patches [1, N, D]."""
        drops = (getattr(getattr(module, "attn_drop", None), "p", 0) for module in self.attention_modules())
        if self.model.training and any(drops):
            raise InvalidArgumentError(
                "the model drops attention weights in training, which packed attention cannot; create it with "
                "attn_drop_rate=0, or call model.eval()"
            )
        patches_NP = self.begin(self.clips_of(images))
        embedding = self.model.patch_embed
        return embedding.norm(embed_patches(patches_NP, embedding.proj))[None]

    def add_positions(self, x_1ND: Tensor) -> Tensor:
        """Kept patches -> the packed sequence [1, T, D]: the prefix of each frame, then its patches, with positions."""
        model, call = self.model, self.call
        prefix = [token[0] for token in (model.cls_token, model.reg_token) if token is not None]
        prefix_PD = torch.cat(prefix) if prefix else x_1ND[0, :0]
        # Under autocast positions and prefix stay float32, and with them all hidden states, as in the model itself.
        x_ND, drop = x_1ND[0], nn.Identity()  # a model without positions has no dropout behind them either
        if model.pos_embed is not None:
            positions_LD, drop = model.pos_embed[0], model.pos_drop
            if not model.no_embed_class:
                prefix_PD = prefix_PD + positions_LD[: len(prefix_PD)]
                positions_LD = positions_LD[len(prefix_PD) :]
            x_ND = x_ND + call.positions(positions_LD)
        return drop(call.behind(prefix_PD, x_ND))[None]

    def attend(self, module: Any, x_1TD: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attention layer of timm on packed frames, [1, T, D] -> [1, T, D]; no mask, which would count all tokens."""
        if attn_mask is not None or is_causal:
            raise InvalidArgumentError(
                "attn_mask or is_causal is set; frames of a patched model are packed, leave it out"
            )
        q_THK, k_THK, v_THK = module.qkv(x_1TD[0]).unflatten(1, (3, module.num_heads, -1)).unbind(1)
        x_TD = self.mix(module.q_norm(q_THK), module.k_norm(k_THK), v_THK).flatten(1)
        for name in ("norm", "gate"):  # older versions have neither
            part = getattr(module, name, None)
            if part is not None:
                x_TD = part(x_TD) if name == "norm" else x_TD * part(x_1TD[0]).sigmoid()
        return module.proj_drop(module.proj(x_TD))[None]

    def drop_paths(self, module: Any, x_1TD: Tensor) -> Tensor:
        """Stochastic depth of timm on packed frames [1, T, D]: frame by frame, not all of them at once."""
        if not module.training or module.drop_prob == 0:
            return x_1TD
        share_kept = 1 - module.drop_prob
        lengths_F = self.call.segments.cu_seqlens.diff()
        # One number per frame that has tokens, as in the unpatched model: equal seeds drop equal paths.
        scale_F = x_1TD.new_empty(len(lengths_F)).bernoulli_(share_kept)
        if share_kept > 0 and module.scale_by_keep:
            scale_F = scale_F / share_kept
        return x_1TD * scale_F.repeat_interleave(lengths_F, output_size=x_1TD.shape[1])[:, None]

    def leave(self, _module: nn.Module, _inputs: object, x_1TD: Tensor) -> Tensor:
        """Behind the last norm: [1, T, D] -> frames [F, P + L, D] with every place filled."""
        self.check_packed()  # `finish` does not see calls of `forward_features` alone
        filled = self.call.fill(self.remember(x_1TD)[0])
        self.commit()
        return filled

    def refuse_intermediates(self, *_: object, **__: object) -> None:
        """Not offered: always an InvalidArgumentError."""
        raise InvalidArgumentError(
            "forward_intermediates of a patched model is not offered; forward_features gives the last layer on the "
            "full grid, and rlt.unpatch brings the others back"
        )


def _inside(model: Any, kind: str) -> list[nn.Module]:
    """Modules of the blocks whose class has this name."""
    return [module for module in model.blocks.modules() if type(module).__name__ == kind]


def _check_supported(model: Any) -> None:
    """Hold that a model computes as `VisionTransformer` of timm does, with what this adapter can pack."""
    base = next(kind for kind in type(model).__mro__ if kind.__name__ == "VisionTransformer")
    embedding = model.patch_embed
    patch = tuple(getattr(embedding, "patch_size", ()))
    reasons = {
        "a forward pass of its own": any(
            getattr(type(model), name) is not getattr(base, name)
            for name in ("forward", "forward_features", "_pos_embed")
        ),
        f"{type(embedding).__name__} as patch embedding": type(embedding).__name__ != "PatchEmbed",
        f"patches of {patch}": len(set(patch)) != 1,
        "dynamic_img_size": bool(model.dynamic_img_size) or getattr(embedding, "img_size", None) is None,
        "dynamic_img_pad": bool(getattr(embedding, "dynamic_img_pad", False)),
        "patch_drop_rate": not isinstance(model.patch_drop, nn.Identity),
        "blocks without timm's plain Attention": not all(
            any(type(module).__name__ == "Attention" for module in block.modules()) for block in model.blocks
        ),
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise InvalidArgumentError(
            f"{type(model).__name__} has {' and '.join(found)}; rlt.patch knows plain vision transformers of timm alone"
        )

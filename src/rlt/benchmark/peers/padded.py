"""The same network over padded batches with a mask: what packing is compared with.

Shape legend: B clips, L tokens of the longest clip, D model width, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlt.network.blocks import Block
from rlt.network.vit import VisionTransformer
from rlt.structures import PackedTokens, Segments


def padded_logits(model: VisionTransformer, packed: PackedTokens) -> Tensor:
    """Logits [clips, classes] of `model`, computed with every clip padded to the longest one.

    Equal to `model(packed)` within float tolerance; stochastic depth is left out.
    """
    lengths = packed.segments.lengths
    x_BLD = pad_sequence(list(model.embed(packed).split(lengths)), batch_first=True)
    real_BL = _real(x_BLD, packed.segments)
    for block in model.blocks:
        assert isinstance(block, Block)
        x_BLD = x_BLD + _attend(block, block.norm1(x_BLD), real_BL)
        x_BLD = x_BLD + block.mlp(block.norm2(x_BLD))
    sums_BD = (x_BLD * real_BL[..., None]).sum(1)
    return model.head(model.fc_norm(sums_BD / real_BL.sum(1, keepdim=True)))


def _attend(block: Block, x_BLD: Tensor, real_BL: Tensor) -> Tensor:
    qkv_THK = block.attn.queries_keys_values(x_BLD.flatten(0, 1))
    mixed_BLHK = _masked_attention((x_THK.unflatten(0, x_BLD.shape[:2]) for x_THK in qkv_THK), real_BL)
    projection: nn.Linear = block.attn.proj
    return projection(mixed_BLHK.flatten(2))


def _masked_attention(qkv_BLHK: Iterable[Tensor], real_BL: Tensor) -> Tensor:
    q_BHLK, k_BHLK, v_BHLK = (x_BLHK.transpose(1, 2) for x_BLHK in qkv_BLHK)
    return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=real_BL[:, None, None, :]).transpose(1, 2)


def _real(x_BLD: Tensor, segments: Segments) -> Tensor:
    """bool [B, L]: which places of padded clips hold a token."""
    return torch.arange(x_BLD.shape[1], device=x_BLD.device) < segments.cu_seqlens.diff()[:, None]


def padded_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments) -> Tensor:
    """Packed attention [T, H, K] by padding to the longest clip, a mask over the keys, and packing again."""
    padded = [pad_sequence(list(x.split(segments.lengths)), batch_first=True) for x in (q_THK, k_THK, v_THK)]
    real_BL = _real(padded[0], segments)
    return _masked_attention(padded, real_BL)[real_BL]


def block_mask_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments) -> Tensor:
    """Packed attention [T, H, K] as one softmax over all tokens with a block-diagonal mask."""
    clip_T = _clip_numbers(segments)
    q, k, v = (x_THK.transpose(0, 1)[None] for x_THK in (q_THK, k_THK, v_THK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=clip_T[:, None] == clip_T)[0].transpose(0, 1)


def naive_attention(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHK: Tensor,
    queries: Segments,
    keys: Segments | None = None,
    key_bias_T: Tensor | None = None,
) -> Tensor:
    """Packed attention [T, H, K] written out by its formula, every score of every pair; a twin to compare with.

    `keys` says where the keys of each clip begin and end where they are others than the queries.
    """
    same_TS = _clip_numbers(queries)[:, None] == _clip_numbers(queries if keys is None else keys)
    scores_HTS = torch.einsum("thk,shk->hts", q_THK, k_SHK) * q_THK.shape[-1] ** -0.5
    scores_HTS = scores_HTS if key_bias_T is None else scores_HTS + key_bias_T
    shares_HTS = scores_HTS.masked_fill(~same_TS, -torch.inf).softmax(-1)
    return torch.einsum("hts,shk->thk", shares_HTS, v_SHK)


def _clip_numbers(segments: Segments) -> Tensor:
    """int64 [T]: which clip each token is of."""
    clips = torch.arange(len(segments), device=segments.cu_seqlens.device)
    return clips.repeat_interleave(segments.cu_seqlens.diff(), output_size=segments.num_tokens)

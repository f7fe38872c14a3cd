"""Token Merging (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461) over packed tokens.

The baseline that makes tokens fewer inside the network instead of before it (`VisionTransformer.merge_per_block`),
written from the paper. In every block, between attention and MLP, the tokens of a clip are dealt alternately into sets
A and B, each token of A finds the token of B whose key is most similar (cosine of the keys, averaged over the heads),
and the pairs that are most similar become one token each, the mean weighted by size. Size counts the tokens of the
input that a token stands for: attention adds its logarithm to the logits (proportional attention), and the mean over a
clip that goes to the head is weighted by it, which the paper leaves open for models without a class token.

Choices of our own: tokens that survive stay in their order, so that the next deal is alternate in place again, and of
equal similarities the earlier token is merged first. Sizes and means are float32 in any precision.

Shape legend: T tokens of all clips, D model width, H heads, K width of a head. Clips of one length are worked on
together: G clips, n tokens of each, r merges, m = n - r tokens of each after merging.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlt.network.attention import packed_attention
from rlt.network.backends import Backend
from rlt.network.blocks import Attention, Block, mean_per_clip
from rlt.network.run_lengths import key_bias
from rlt.structures import Segments


class Matching(NamedTuple):
    """Which tokens of G clips of n tokens become one: row numbers within each clip."""

    source: Tensor
    """int64 [G, r], rows that are merged away, the most similar first; all even."""
    target: Tensor
    """int64 [G, r], the row that each source goes into; all odd, several sources may share one."""
    kept: Tensor
    """int64 [G, m], rows that remain, ascending."""


@dataclass(frozen=True, eq=False)
class MergedTokens:
    """Packed tokens in the middle of the network: each stands for one or more tokens of the input."""

    features: Tensor
    """float [tokens, width]."""
    segments: Segments
    """Which rows belong to which clip."""
    sizes: Tensor | None
    """float32 [tokens]: how many tokens each stands for. They add up to the clip's tokens: those of the input, or those
    before any was dropped where run lengths count. None as long as all are 1."""
    owner: Tensor
    """int64 [tokens of the input]: the row that stands for each."""


def unmerged(features: Tensor, segments: Segments, sizes: Tensor | None = None) -> MergedTokens:
    """Tokens before the first block, each of which stands for itself, or for so many."""
    return MergedTokens(features, segments, sizes, torch.arange(len(features), device=features.device))


def merging_block(block: Block, tokens: MergedTokens, merge_per_block: int, backend: Backend | None) -> MergedTokens:
    """Attention, merging, MLP."""
    mixed_TD, keys_THK = _attend(block.attn, block.norm1(tokens.features), tokens, backend)
    tokens = replace(tokens, features=tokens.features + block.branch(mixed_TD, tokens.segments))
    tokens = merge_tokens(tokens, keys_THK.detach().mean(1), merge_per_block)
    x_TD = tokens.features
    return replace(tokens, features=x_TD + block.branch(block.mlp(block.norm2(x_TD)), tokens.segments))


def mean_over_input(tokens: MergedTokens) -> Tensor:
    """Mean of each clip over all that its tokens stand for: [T, D] -> [clips, D]."""
    if tokens.sizes is None:
        return mean_per_clip(tokens.features, tokens.segments)
    lengths = tokens.segments.lengths
    clips = zip(
        (tokens.features.float() * tokens.sizes[:, None]).split(lengths), tokens.sizes.split(lengths), strict=True
    )
    means_BD = torch.stack([x_nD.sum(0) / sizes_n.sum() for x_nD, sizes_n in clips])
    return means_BD.to(tokens.features.dtype)


def _attend(attention: Attention, x_TD: Tensor, tokens: MergedTokens, backend: Backend | None) -> tuple[Tensor, Tensor]:
    """Proportional attention: output [T, D], and the keys [T, H, K]."""
    q_THK, k_THK, v_THK = attention.queries_keys_values(x_TD)
    bias_T = None if tokens.sizes is None else key_bias(tokens.sizes)  # the logarithm of 1 adds nothing
    mixed_THK = packed_attention(q_THK, k_THK, v_THK, tokens.segments, backend=backend, key_bias_T=bias_T)
    return attention.proj(mixed_THK.flatten(1)), k_THK


def _grouped(x: Tensor, segments: Segments) -> list[Tensor]:
    """[T, ...] -> [G, n, ...]: one group if all clips have the same length, else one for each clip."""
    if len(set(segments.lengths)) == 1:
        return [x.unflatten(0, (len(segments), -1))]
    return [clip[None] for clip in x.split(segments.lengths)]


def merge_tokens(tokens: MergedTokens, metric_TK: Tensor, merge_per_block: int) -> MergedTokens:
    """Merge away so many tokens of each clip, at most half of them, by the cosine similarity of float `metric_TK`.

    Those that are left stay in their order. Features are means weighted by size, and sizes are added up.
    """
    counts = [min(merge_per_block, length // 2) for length in tokens.segments.lengths]
    if not any(counts):
        return tokens
    sizes_T = tokens.sizes
    if sizes_T is None:
        sizes_T = tokens.features.new_ones(len(tokens.features), dtype=torch.float32)
    weighted_TD = tokens.features.float() * sizes_T[:, None]
    grouped = (_grouped(x, tokens.segments) for x in (metric_TK, weighted_TD, sizes_T))
    weighted, sizes, rows, offset = [], [], [], 0
    for metric_GnK, weighted_GnD, sizes_Gn in zip(*grouped, strict=True):
        count = min(merge_per_block, metric_GnK.shape[1] // 2)
        matching = match_tokens(metric_GnK, count)
        weighted.append(_gather_merged(weighted_GnD, matching).flatten(0, 1))
        sizes.append(_gather_merged(sizes_Gn[..., None], matching).flatten())
        rows.append(_new_rows(matching, metric_GnK.shape[1]) + offset)
        offset += matching.kept.numel()
    merged_sizes_T = torch.cat(sizes)
    features = (torch.cat(weighted) / merged_sizes_T[:, None]).to(tokens.features.dtype)
    lengths = [length - count for length, count in zip(tokens.segments.lengths, counts, strict=True)]
    segments = Segments.from_lengths(lengths, device=features.device)
    return MergedTokens(features, segments, merged_sizes_T, torch.cat(rows).index_select(0, tokens.owner))


@torch.no_grad()
def match_tokens(metric_GnK: Tensor, num_merges: int) -> Matching:
    """Bipartite soft matching (section 3 of the paper): the `num_merges` most similar pairs of each clip, 0..n // 2.

    No gradient flows through the choice.
    """
    unit_GnK = F.normalize(metric_GnK.float(), dim=-1)
    set_a, set_b = unit_GnK[:, 0::2], unit_GnK[:, 1::2]
    if num_merges == 0:
        empty = torch.empty(len(unit_GnK), 0, dtype=torch.int64, device=unit_GnK.device)
        return Matching(empty, empty, torch.arange(unit_GnK.shape[1], device=unit_GnK.device).expand(len(unit_GnK), -1))
    best_Ga, partner_Ga = (set_a @ set_b.transpose(1, 2)).max(dim=-1)
    order_Ga = best_Ga.argsort(dim=-1, descending=True, stable=True)
    chosen_Gr, others_Ga = order_Ga[:, :num_merges], order_Ga[:, num_merges:]
    odd_b = torch.arange(set_b.shape[1], device=unit_GnK.device) * 2 + 1
    kept_Gm = torch.cat([others_Ga * 2, odd_b.expand(len(unit_GnK), -1)], dim=1).sort(dim=1).values
    return Matching(chosen_Gr * 2, partner_Ga.gather(1, chosen_Gr) * 2 + 1, kept_Gm)


def _gather_merged(values_GnD: Tensor, matching: Matching) -> Tensor:
    """Add the values of each source to those of its target, then keep the rows that remain: [G, n, D] -> [G, m, D]."""
    source, target, kept = (rows[..., None].expand(-1, -1, values_GnD.shape[2]) for rows in matching)
    return values_GnD.scatter_add(1, target, values_GnD.gather(1, source)).gather(1, kept)


def _new_rows(matching: Matching, num_tokens: int) -> Tensor:
    """int64 [G * n]: for each token before merging, the row after it that stands for it, counted over the group."""
    num_clips, num_kept = matching.kept.shape
    device = matching.kept.device
    place_Gm = torch.arange(num_clips * num_kept, device=device).view(num_clips, num_kept)
    rows_Gn = torch.zeros(num_clips, num_tokens, dtype=torch.int64, device=device).scatter(1, matching.kept, place_Gm)
    return rows_Gn.scatter(1, matching.source, rows_Gn.gather(1, matching.target)).flatten()

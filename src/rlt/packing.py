"""Put clips of different token counts into one sequence: no batch axis, no padding (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from rlt.errors import InvalidArgumentError
from rlt.structures import PackedTokens, RunLengthTokens, Segments


def pack(tokens: Iterable[RunLengthTokens] | RunLengthTokens) -> PackedTokens:
    """Concatenate the tokens of several clips; `PackedTokens.unpack` is the inverse.

    Args:
        tokens: the clips, in the order that the logits will have. They may differ in grid and token count, but share
            tubelet size, patch size, patch dtype and device.

    Returns:
        One sequence in (clip, t, h, w) order; `cu_seqlens` int32 [clips + 1] says where each clip begins.

    Raises:
        InvalidArgumentError: for no clips, or clips that one network could not embed.
    """
    clips = [tokens] if isinstance(tokens, RunLengthTokens) else list(tokens)
    if not clips:
        raise InvalidArgumentError("no clips to pack; give at least one RunLengthTokens")
    first = clips[0]
    for position, clip in enumerate(clips):
        for name, ours, theirs in (
            ("tubelet_size", first.tubelet_size, clip.tubelet_size),
            ("patch_size", first.patch_size, clip.patch_size),
            ("values per token", first.patches.shape[1], clip.patches.shape[1]),
            ("patch dtype", first.patches.dtype, clip.patches.dtype),
            ("device", first.patches.device, clip.patches.device),
        ):
            if ours != theirs:
                raise InvalidArgumentError(
                    f"clip {position} has {name} {theirs}, clip 0 has {ours}; tokenize all clips of a pack alike"
                )
    return PackedTokens(
        patches=torch.cat([clip.patches for clip in clips]),
        coords=torch.cat([clip.coords for clip in clips]),
        lengths=torch.cat([clip.lengths for clip in clips]),
        segments=Segments.from_lengths([len(clip) for clip in clips], device=first.patches.device),
        grids=tuple(clip.grid for clip in clips),
        tubelet_size=first.tubelet_size,
        patch_size=first.patch_size,
    )

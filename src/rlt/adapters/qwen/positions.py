"""Bookkeeping of the Qwen-VL adapter: which merge groups stay, and what that does to the tower and to the text.

Pure functions of tensors; no model runs here.

Shape legend: P patches of all videos, G merge groups of all videos (a group is one token of the language model), V
values per patch, B rows of text, L columns of text, K columns left, T' time steps, H' x W' groups per time step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from rlt.adapters.interface import import_transformers
from rlt.adapters.options import LastForward
from rlt.errors import InvalidArgumentError
from rlt.structures import PatchSpec, TokenGrid
from rlt.tokens import PatchView

OLDEST_TRANSFORMERS = (5, 23)
NO_LABEL = -100
"""What losses of torch and transformers leave out."""
DROPPED = float("-inf")
"""Features of dropped groups on their way through `generate`, which wants as many as there are placeholders."""


@dataclass(frozen=True, eq=False, repr=False)
class LastVideos(LastForward):
    """What the last call kept of each video. A token is a merge group: one token of the language model.

    `mask` is bool [videos, T', H', W'] with the sizes of the largest video, False outside of smaller ones.
    """

    grids: tuple[TokenGrid, ...] = ()
    """T', H', W' in groups of each video."""

    @classmethod
    def of(cls, masks: list[Tensor]) -> LastVideos:
        """From bool [T', H', W'] of each video."""
        largest = [max(sizes) for sizes in zip(*(mask.shape for mask in masks), strict=True)]
        last = cls(masks[0].new_zeros(len(masks), *largest), tuple(TokenGrid(*mask.shape) for mask in masks))
        for ours, mask in zip(last.masks, masks, strict=True):
            ours.copy_(mask)
        return last

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """bool [T', H', W'] of each video in its own size, views of `mask`."""
        return tuple(
            mask[:time, :height, :width] for mask, (time, height, width) in zip(self.mask, self.grids, strict=True)
        )

    @property
    def dense_per_video(self) -> tuple[int, ...]:
        """Tokens of each video before anything is dropped."""
        return tuple(grid.num_tokens for grid in self.grids)

    @property
    @override
    def num_dense(self) -> int:
        return max(self.dense_per_video)  # of the largest video

    @property
    @override
    def share_kept(self) -> float:
        return sum(self.num_kept) / sum(self.dense_per_video)

    def __repr__(self) -> str:
        return f"LastVideos({list(self.num_kept)} of {list(self.dense_per_video)} tokens per video)"


def group_grids(grid_thw: Tensor | None, rows: int, merge: int) -> list[TokenGrid]:
    """T', H', W' in groups of each video, from the processor's int [videos, 3] in patches; a group is merge x merge."""
    if grid_thw is None or grid_thw.ndim != 2 or grid_thw.shape[1] != 3:
        given = None if grid_thw is None else f"of shape {list(grid_thw.shape)}"
        raise InvalidArgumentError(
            f"video_grid_thw is {given} beside pixel_values_videos; pass the processor's, int [videos, 3]"
        )
    grids = [TokenGrid(*grid) for grid in grid_thw.tolist()]
    needed = sum(grid.num_tokens for grid in grids)
    if needed != rows:
        raise InvalidArgumentError(
            f"pixel_values_videos has {rows} rows; video_grid_thw {[list(grid) for grid in grids]} needs {needed}; "
            "pass both from one call of the processor"
        )
    for grid in grids:
        if min(grid) < 1 or grid.height % merge or grid.width % merge:
            raise InvalidArgumentError(
                f"video_grid_thw has {list(grid)}; rows and columns must be multiples of {merge}, the merge size"
            )
    return [TokenGrid(time, height // merge, width // merge) for time, height, width in grids]


class GroupView(PatchView):
    """One video as rules see it: a token is a merge group, and differs as much as its patch that differs most."""

    def __init__(self, rows_PV: Tensor, grid: TokenGrid, merge: int, spec: PatchSpec) -> None:
        # Rows are in the processor's order, (T', H', W', patch in group), their values (channel, frame, row, column).
        side = spec.patch_size
        cut = rows_PV.view(*grid, merge, merge, -1, spec.tubelet_size, side, side)
        frames = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).flatten(6).flatten(3, 5).flatten(0, 1)[None]
        super().__init__(frames, spec)
        self.grid, self.group_size = grid, merge


def flat_mask(masks: Sequence[Tensor]) -> Tensor:
    """bool [G] of all videos, in the order of the tower's outputs and of the placeholders."""
    return torch.cat([mask.flatten() for mask in masks])


def vision_tools() -> Any:
    """transformers' module that computes what the towers take as arguments, since the version whose towers do.

    From then on `generate` hands pieces of a prompt the features of those pieces, too.
    """
    return import_module(f"{import_transformers(OLDEST_TRANSFORMERS, 'rlt.patch of Qwen-VL').__name__}.vision_utils")


def tower_arguments(visual: Any, grid_thw: Tensor, kept_G: Tensor) -> dict[str, Tensor]:
    """What the vision tower would compute from the grid of everything, int [videos, 3], for the kept groups alone.

    Positions are those of the original places; attention segments (frames, and windows where the tower has them) are
    without what is dropped.
    """
    vision_utils = vision_tools()
    unit = visual.spatial_merge_size**2
    kept_P = kept_G.repeat_interleave(unit)
    frames = vision_utils.get_vision_cu_seqlens(grid_thw).to(kept_G.device)
    positions = vision_utils.get_vision_position_ids(grid_thw, visual.spatial_merge_size)
    arguments = {"position_ids": positions.to(kept_G.device)[kept_P], "cu_seqlens": shorter_segments(frames, kept_P)}
    if hasattr(visual, "window_size"):
        order_G, windows = vision_utils.get_vision_window_index(
            grid_thw, visual.spatial_merge_size, visual.window_size, visual.patch_size
        )
        order_G, windows = order_G.to(kept_G.device), windows.to(kept_G.device)
        kept_in_order = kept_G[order_G]
        new_number_G = kept_G.cumsum(0) - 1
        arguments["window_index"] = new_number_G[order_G[kept_in_order]]
        arguments["cu_window_seqlens"] = shorter_segments(windows, kept_in_order.repeat_interleave(unit))
    if hasattr(visual, "num_grid_per_side"):
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid_thw,
            visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.spatial_merge_size,
        )
        arguments["interp_indices"] = indices.to(kept_G.device)[kept_P]
        arguments["interp_weights"] = weights.to(kept_G.device)[kept_P]
    return arguments


def shorter_segments(offsets: Tensor, kept_P: Tensor) -> Tensor:
    """Offsets of attention segments, int32 [segments + 1], after dropping; segments that lost everything are gone."""
    before = F.pad(kept_P.cumsum(0), (1, 0))
    left: Tensor = before[offsets.long()].unique_consecutive()
    return left.to(torch.int32)


@dataclass(frozen=True, eq=False)
class Columns:
    """Which columns of text are left in each row, padded to one length again."""

    index: Tensor
    """int64 [B, K]: the original column of each column that is left."""
    real: Tensor
    """bool [B, K]: False at padding."""

    @classmethod
    def of(cls, kept_BL: Tensor, *, right: bool) -> Columns:
        """Gather what is kept to the right side of each row, or to the left side if padding stands on the right."""
        counts = kept_BL.sum(1)
        length = max(1, int(counts.max()))  # a piece of a prompt may lose everything, which no model can run
        order = kept_BL.to(torch.int8).argsort(dim=1, descending=right, stable=True)
        place = torch.arange(length, device=kept_BL.device)
        if right:
            return cls(order[:, :length], place < counts[:, None])
        return cls(order[:, order.shape[1] - length :], place >= length - counts[:, None])

    def take(self, values: Tensor, padding: float) -> Tensor:
        """[B, L] or [..., B, L] -> the columns that are left, with `padding` elsewhere."""
        index = self.index.expand(*values.shape[:-1], self.index.shape[-1])
        return values.gather(-1, index).masked_fill(~self.real, padding)

    def take_labels(self, labels: Tensor) -> Tensor:
        """int64 [B, L] -> [B, K]; that of the first column, which nothing predicts, must not stand behind padding."""
        return self.take(F.pad(labels[:, 1:], (1, 0), value=NO_LABEL), NO_LABEL)

    def take_shifted_labels(self, shifted: Tensor) -> Tensor:
        """The same of labels that stand one column further left, at the column that is to predict them.

        Each column that is left gets the label of the next one that is, and the last its own.
        """
        labels = self.take_labels(F.pad(shifted[:, :-1], (1, 0), value=NO_LABEL))
        next_real = F.pad(self.real[:, 1:], (0, 1))
        last = self.real & ~next_real
        return torch.where(last, self.take(shifted, NO_LABEL), F.pad(labels[:, 1:], (0, 1), value=NO_LABEL))

    def take_vectors(self, values: Tensor) -> Tensor:
        """[B, L, D] -> [B, K, D], zeros at padding."""
        index = self.index[..., None].expand(-1, -1, values.shape[-1])
        return values.gather(1, index).masked_fill(~self.real[..., None], 0)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The key-value cache among named arguments, whatever its name; None if none is given.

    Found by what it is: under a name that we did not know, a cache that lost columns would silently be read wrongly.
    """
    return next((value for value in arguments.values() if hasattr(value, "get_seq_length")), None)


@dataclass(frozen=True, eq=False)
class KeptPast:
    """What a key-value cache holds whose prompt lost columns. It travels on the cache, so that copies of it have it."""

    attention: Tensor
    """bool [B, columns in the cache up to the last that was dropped or hidden], False at padding."""
    full_length: int
    """For how many columns of the unpatched model these stand."""
    padded: bool
    """Whether any row has padding; known here, since asking a tensor costs a wait at every step."""

    @staticmethod
    def of(cache: Any) -> KeptPast | None:
        """Of a cache that lost columns; None for others, and for one that was emptied since."""
        found: KeptPast | None = getattr(cache, "rlt_kept", None)
        if found is None:
            return None
        if int(cache.get_seq_length()) == 0:  # reset, and about to be filled with something else
            del cache.rlt_kept
            return None
        if found.newer(cache) < 0:
            raise InvalidArgumentError(
                f"the cache was cut to {int(cache.get_seq_length())} columns; one whose video lost tokens needs "
                f"the first {found.attention.shape[1]}, so begin with a new cache"
            )
        return found

    def newer(self, cache: Any) -> int:
        """Columns of the cache behind those, none of which was dropped."""
        return (0 if cache is None else int(cache.get_seq_length())) - self.attention.shape[1]

    def full(self, cache: Any) -> int:
        """For how many columns of the unpatched model the cache stands now."""
        return self.full_length + self.newer(cache)

    def mask(self, cache: Any, shown: Tensor) -> Tensor:
        """bool [B, columns in the cache now] from one that counts the columns of the unpatched model."""
        newer = shown[:, self.full_length : self.full(cache)]
        return torch.cat([self.attention, newer.to(self.attention.device)], dim=1)


def full_features(output: Any, masks: list[Tensor]) -> Any:
    """The tower's output for kept groups -> one with a row per group of each video, `DROPPED` where it was dropped."""

    def spread(features: Sequence[Tensor]) -> list[Tensor]:
        return [
            feature.new_full((mask.numel(), feature.shape[1]), DROPPED).masked_scatter(mask.flatten()[:, None], feature)
            for feature, mask in zip(features, masks, strict=True)
        ]

    return with_features(output, spread)


def kept_features(output: Any) -> tuple[Any, list[Tensor]] | None:
    """The inverse: the output for kept groups, and bool [groups] of each video; None if nothing was dropped."""
    masks = [~torch.isneginf(feature).all(1) for feature in output.pooler_output]
    if all(bool(mask.all()) for mask in masks):
        return None

    def gather(features: Sequence[Tensor]) -> list[Tensor]:
        return [feature[mask] for feature, mask in zip(features, masks, strict=True)]

    return with_features(output, gather), masks


def with_features(output: Any, change: Callable[[Any], Any]) -> Any:
    """The tower's output with other features; a copy, since the caller may use its own again."""
    changed = copy.copy(output)
    changed.pooler_output = change(output.pooler_output)
    if getattr(output, "deepstack_features", None) is not None:
        changed.deepstack_features = [change(layer) for layer in output.deepstack_features]
    return changed

"""The values that travel along the data path: `Clip` -> `RunLengthTokens` -> `PackedTokens`.

Order contract: tokens are sorted by (clip, t, h, w), and row i of `patches`, `coords` and `lengths` speaks of the
same token. In every (h, w) column the first kept t is 0, and t + length is the next kept t of the column or T'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from rlt.checks import Renamed, at_least, exclusive, whole
from rlt.errors import InvalidArgumentError

RGB = tuple[float, float, float]
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
"""Mean of each RGB channel on the scale 0..1 that VideoMAE models are trained with."""
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
"""Standard deviation of each RGB channel on the scale 0..1 that VideoMAE models are trained with, and the unit of
every threshold."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidArgumentError(message)


def _first(marked: Tensor) -> int:
    return int(marked.nonzero()[0])


class TokenGrid(NamedTuple):
    """Number of tokens along time, height and width of one clip: (T', H', W')."""

    time: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the clip when nothing is dropped: T' * H' * W'."""
        return self.time * self.height * self.width


@dataclass(frozen=True)
class PatchSpec:
    """How a network cuts frames into tokens, and how it normalises their pixels. A model carries its own."""

    tubelet_size: int = 2
    """Frames per token, at least 1."""
    patch_size: int = 16
    """Height and width of a token in pixels, at least 1."""
    mean: RGB = IMAGENET_MEAN
    """Of each channel on the scale 0..1: what the network subtracts."""
    std: RGB = IMAGENET_STD
    """Of each channel on the scale 0..1: what the network divides by. Thresholds do not depend on it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        whole(tubelet_size=self.tubelet_size, patch_size=self.patch_size)
        at_least(1, tubelet_size=self.tubelet_size, patch_size=self.patch_size)
        _require(
            len(self.mean) == len(self.std) == 3 and min(self.std) > 0,
            f"mean is {self.mean} and std is {self.std}; three numbers each are needed, those of std above 0",
        )

    @classmethod
    def of(cls, spec: PatchSpec | None, *, tubelet_size: int | None = None, patch_size: int | None = None) -> PatchSpec:
        """`spec`, or the default one with these sizes where they are given instead.

        Raises:
            InvalidArgumentError: for a spec and sizes at once.
        """
        exclusive(spec=spec, tubelet_size=tubelet_size)
        exclusive(spec=spec, patch_size=patch_size)
        if spec is not None:
            return spec
        return cls(2 if tubelet_size is None else tubelet_size, 16 if patch_size is None else patch_size)

    @property
    def values_per_token(self) -> int:
        """Numbers in the pixels of a token: tubelet_size * patch_size**2 * 3."""
        return self.tubelet_size * self.patch_size**2 * 3

    def grid(self, frames_shape: Sequence[int]) -> TokenGrid:
        """Grid (T', H', W') of frames of shape [..., T, H, W, 3].

        Raises:
            InvalidArgumentError: if a size does not divide its axis.
        """
        num_frames, height, width = frames_shape[-4:-1]
        if num_frames % self.tubelet_size:
            raise InvalidArgumentError(
                f"{num_frames} frames are not a multiple of tubelet_size={self.tubelet_size}; "
                f"sample {max(num_frames // self.tubelet_size, 1) * self.tubelet_size} frames"
            )
        if height % self.patch_size or width % self.patch_size:
            nearest = tuple(max(round(side / self.patch_size), 1) * self.patch_size for side in (height, width))
            raise InvalidArgumentError(
                f"frames of {height}x{width} pixels are not a multiple of patch_size={self.patch_size}; "
                f"resize or crop to {nearest[0]}x{nearest[1]}"
            )
        return TokenGrid(num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size)


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames sampled from one video."""

    frames: Tensor
    """uint8 [T, H, W, 3], RGB, full range 0..255."""
    times: Tensor
    """float64 [T], presentation time of each frame in seconds from the start of the stream."""
    source: str = ""
    """Name of the file that the frames come from, for messages."""
    num_repeated: int = 0
    """How many frames at the end repeat the last one, because the video is shorter than the clip."""

    def __post_init__(self) -> None:
        check_frames(self.frames, dims=(4,))
        _require(
            tuple(self.times.shape) == (len(self.frames),),
            f"times has shape {tuple(self.times.shape)}; one time per frame is needed: ({len(self.frames)},)",
        )

    def __repr__(self) -> str:
        num_frames, height, width, _ = self.frames.shape
        span = f"{self.times[0]:.3f}..{self.times[-1]:.3f} s"
        return f"Clip({self.source!r}, {num_frames} frames of {height}x{width}, {span}, repeated={self.num_repeated})"


@dataclass(frozen=True, eq=False)
class RunLengthTokens:
    """The kept tokens of one clip, in (t, h, w) order."""

    patches: Tensor
    """uint8 (raw pixels) or float (features) [N, D]. For pixels D = tubelet_size * patch_size**2 * 3, laid out
    (frame, row, column, channel)."""
    coords: Tensor
    """int64 [N, 3] = (t, h, w), in tokens."""
    lengths: Tensor
    """int64 [N], 1..T': for how many time steps the token stands."""
    grid: TokenGrid
    """(T', H', W') of the clip before anything was dropped."""
    spec: PatchSpec = PatchSpec()
    """How they were cut."""

    kept = Renamed("RunLengthTokens.share_kept")

    def __post_init__(self) -> None:
        # Cheap checks only; `validate` checks the order contract.
        object.__setattr__(self, "grid", TokenGrid(*self.grid))
        num_tokens = len(self.patches)
        _require(self.patches.ndim == 2, f"patches has shape {tuple(self.patches.shape)}; [N, D] is needed")
        for name, needed in (("coords", (num_tokens, 3)), ("lengths", (num_tokens,))):
            values: Tensor = getattr(self, name)
            shape = tuple(values.shape)
            matches = shape == needed and values.dtype == torch.int64
            _require(matches, f"{name} is {values.dtype} {shape}; int64 {needed} is needed")
        _require(num_tokens > 0, "0 tokens; a clip keeps at least its first time step")

    def __len__(self) -> int:
        return len(self.patches)

    def __repr__(self) -> str:
        total = self.grid.num_tokens
        return (
            f"RunLengthTokens({len(self)} of {total} tokens ({self.share_kept:.1%}), grid={tuple(self.grid)}, "
            f"patches={str(self.patches.dtype).removeprefix('torch.')}{list(self.patches.shape)})"
        )

    @property
    def share_kept(self) -> float:
        """Share of the tokens that is kept, above 0 and up to 1."""
        return len(self) / self.grid.num_tokens

    def mask(self) -> Tensor:
        """Bool [T', H', W'], True where a token is kept."""
        mask = torch.zeros(self.grid, dtype=torch.bool, device=self.coords.device)
        mask[tuple(self.coords.unbind(1))] = True
        return mask

    def expand(self, features: Tensor | None = None) -> Tensor:
        """Fill the full grid again: every dropped place gets the token of the run that covers it.

        Args:
            features: [N, ...] values of the kept tokens in token order, for example the output of a network.
                Without it the patches are put back together to video.

        Returns:
            uint8 [T, H, W, 3] video, or [T', H', W', ...] features. The inverse of `rlt.tokenize` wherever the
            dropped patches were exact repeats.

        Raises:
            InvalidArgumentError: if features has another number of rows than there are tokens, or a place has no run
                (tokens that were not chosen by runs).
        """
        values = self.patches if features is None else features
        _require(len(values) == len(self), f"features has {len(values)} rows; one per token is needed: {len(self)}")
        rows = token_at_place(self.mask())
        filled = values.index_select(0, rows.flatten()).unflatten(0, self.grid)
        if features is not None:
            return filled
        tubelet, patch = self.spec.tubelet_size, self.spec.patch_size
        video = filled.unflatten(3, (tubelet, patch, patch, -1)).permute(0, 3, 1, 4, 2, 5, 6)
        return video.reshape(self.grid.time * tubelet, self.grid.height * patch, self.grid.width * patch, -1)

    def validate(self) -> RunLengthTokens:
        """Check the order contract of this module in full and return self.

        Raises:
            InvalidArgumentError: naming the first token that breaks the contract.
        """
        time, height, width = self.grid
        t, h, w = self.coords.unbind(1)
        inside = (self.coords >= 0).all(1) & (t < time) & (h < height) & (w < width)
        if not bool(inside.all()):
            raise InvalidArgumentError(f"coords of token {_first(~inside)} lie outside {tuple(self.grid)}")
        place = (t * height + h) * width + w
        ordered = place.diff() > 0
        if not bool(ordered.all()):
            raise InvalidArgumentError(f"token {_first(~ordered) + 1} is not in (t, h, w) order")
        runs = torch.zeros(self.grid, dtype=torch.int64, device=t.device)
        runs[t, h, w] = self.lengths
        covered = torch.zeros(height, width, dtype=torch.int64, device=t.device)
        for step, run_HW in enumerate(runs):
            starts = run_HW != 0
            _require(
                bool((starts == (covered == step)).all()),
                f"run lengths do not meet the kept tokens at t={step}; t + length must be the next kept t or {time}",
            )
            covered = covered + run_HW
        _require(bool((covered == time).all()), f"run lengths do not add up to T'={time} in every column")
        return self


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each clip begins and ends in a packed sequence. Attention never runs without one."""

    cu_seqlens: Tensor
    """int32 [clips + 1], offsets: 0, n0, n0 + n1, ... on the device of the tokens."""
    bound: int
    """Tokens of the longest clip, or more: kernels size their grids by it."""
    host: tuple[int, ...] | None = None
    """Tokens per clip as plain integers, so that nothing waits for the device; None where only the device knows them,
    as in a graph that holds for any number of tokens."""

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Build the offsets from the number of tokens of each clip.

        Raises:
            InvalidArgumentError: for no clips, or a clip without tokens.
        """
        counts = tuple(int(length) for length in lengths)
        _require(len(counts) > 0, "no clips to pack; give at least one")
        _require(min(counts) > 0, f"clip {counts.index(min(counts))} has {min(counts)} tokens; at least 1 is needed")
        _require(sum(counts) < 2**31, f"{len(counts)} clips have {sum(counts)} tokens; a pack holds up to {2**31 - 1}")
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        return cls(offsets, max(counts), counts)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per clip, each at least 1.

        Raises:
            InvalidArgumentError: where only the device knows them.
        """
        if self.host is None:
            raise InvalidArgumentError("the lengths of these clips are on the device only; use Segments.from_lengths")
        return self.host

    @property
    def max_length(self) -> int:
        """Tokens of the longest clip."""
        return max(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens of all clips together."""
        return sum(self.lengths)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Segments:
        """The same segments with the offsets on another device."""
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """The tokens of several clips in one sequence: no batch axis, no padding."""

    patches: Tensor
    """uint8 or float [N, D], all clips one after the other."""
    coords: Tensor
    """int64 [N, 3] = (t, h, w) within each clip."""
    lengths: Tensor
    """int64 [N], run lengths."""
    segments: Segments
    """Which rows belong to which clip."""
    grids: tuple[TokenGrid, ...]
    """(T', H', W') of each clip; clips may differ in size."""
    spec: PatchSpec = PatchSpec()
    """How they were cut."""

    def __post_init__(self) -> None:
        num_tokens = self.segments.num_tokens
        for name in ("patches", "coords", "lengths"):
            rows = len(getattr(self, name))
            _require(rows == num_tokens, f"{name} has {rows} rows; the segments hold {num_tokens} tokens")
        _require(
            len(self.grids) == len(self.segments),
            f"{len(self.grids)} grids for {len(self.segments)} clips; one grid per clip is needed",
        )

    def __len__(self) -> int:
        return len(self.segments)

    def __repr__(self) -> str:
        return (
            f"PackedTokens({len(self)} clips, {self.num_tokens} of {self.num_dense} tokens ({self.share_kept:.1%}), "
            f"on {self.device})"
        )

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [clips + 1], offsets of the clips in the sequence."""
        return self.segments.cu_seqlens

    @property
    def num_tokens(self) -> int:
        """Tokens of all clips together."""
        return self.segments.num_tokens

    @property
    def num_dense(self) -> int:
        """Tokens of all clips before anything was dropped."""
        return sum(grid.num_tokens for grid in self.grids)

    @property
    def share_kept(self) -> float:
        """Share of the tokens that is kept, above 0 and up to 1."""
        return self.num_tokens / self.num_dense

    @property
    def device(self) -> torch.device:
        """Where the tokens lie."""
        return self.patches.device

    @cached_property
    def place(self) -> Tensor:
        """int64 [N]: t * H' * W' + h * W' + w, the place of each token in its own clip's grid."""
        t, h, w = self.coords.unbind(1)
        return t * self.step + h * self._per_token([grid.width for grid in self.grids]) + w

    @cached_property
    def step(self) -> Tensor:
        """int64 [N]: H' * W' of each token's clip, the places from one time step to the next."""
        return self._per_token([grid.height * grid.width for grid in self.grids])

    @cached_property
    def has_runs(self) -> bool:
        """Whether any token stands for more than itself. Where all tokens are kept the device is not asked."""
        return self.num_tokens < self.num_dense and bool((self.lengths > 1).any())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedTokens:
        """The same tokens on another device."""
        return self.changed(lambda values: values.to(device, non_blocking=non_blocking))

    def changed(self, change: Callable[[Tensor], Tensor]) -> PackedTokens:
        """The same tokens with each tensor as `change` gives it, such as `Tensor.pin_memory`: equal, but elsewhere."""
        moved = replace(
            self,
            patches=change(self.patches),
            coords=change(self.coords),
            lengths=change(self.lengths),
            segments=replace(self.segments, cu_seqlens=change(self.segments.cu_seqlens)),
        )
        if self.device.type == "cpu":  # answered here, so that nothing waits for the device
            moved.__dict__["has_runs"] = self.has_runs
        return moved

    def chunks(self, max_tokens: int) -> list[PackedTokens]:
        """The same clips in packs of at most `max_tokens` tokens each, as views; a longer clip has one for itself."""
        groups, room = [0], max_tokens
        for position, length in enumerate(self.segments.lengths):
            if length > room and position > groups[-1]:
                groups.append(position)
                room = max_tokens
            room -= length
        if len(groups) == 1:
            return [self]
        clips = [slice(begin, end) for begin, end in pairwise([*groups, len(self)])]
        segments = [Segments.from_lengths(self.segments.lengths[some], self.device) for some in clips]
        grids = [self.grids[some] for some in clips]
        rows = self._split([part.num_tokens for part in segments])
        return [
            PackedTokens(patches, coords, lengths, part, grid, self.spec)
            for patches, coords, lengths, part, grid in zip(*rows, segments, grids, strict=True)
        ]

    def unpack(self) -> list[RunLengthTokens]:
        """The clips again, as views into the packed tensors: the inverse of `rlt.pack`."""
        rows = self._split(self.segments.lengths)
        return [
            RunLengthTokens(patches, coords, lengths, grid, self.spec)
            for patches, coords, lengths, grid in zip(*rows, self.grids, strict=True)
        ]

    def _per_token(self, values: Sequence[int]) -> Tensor:
        """int64 [N] from one number per clip."""
        if len(set(values)) == 1:
            return torch.full((self.num_tokens,), values[0], device=self.device)
        numbers, repeats = (torch.tensor(row, device=self.device) for row in (values, self.segments.lengths))
        return numbers.repeat_interleave(repeats, output_size=self.num_tokens)

    def _split(self, num_tokens: Sequence[int]) -> Iterator[tuple[Tensor, ...]]:
        """Patches, coords and lengths, each cut into views of so many tokens."""
        return (values.split(num_tokens) for values in (self.patches, self.coords, self.lengths))

    def __iter__(self) -> Iterator[RunLengthTokens]:
        return iter(self.unpack())


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
    for clip in clips:
        _require(
            isinstance(clip, RunLengthTokens),
            f"tokens hold a {type(clip).__name__}; pack takes what rlt.tokenize gives: rlt.pack([rlt.tokenize(clip)])",
        )
    _require(len(clips) > 0, "no clips to pack; give at least one RunLengthTokens")
    first = clips[0]
    for position, clip in enumerate(clips):
        for name, ours, theirs in (
            ("tubelet_size", first.spec.tubelet_size, clip.spec.tubelet_size),
            ("patch_size", first.spec.patch_size, clip.spec.patch_size),
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
        spec=first.spec,
    )


def token_at_place(mask: Tensor) -> Tensor:
    """Which kept token stands for each place: int64, in the shape of the mask.

    Args:
        mask: bool [..., T', H', W'], True where a token is kept. Tokens are counted over the whole mask, in its order.

    Raises:
        InvalidArgumentError: if a token of a first time step is dropped, as by rules that choose no runs.
    """
    whole = bool(mask.select(-3, 0).all())
    _require(
        whole,
        "a column has no token at t=0, so its places belong to no run; a rule whose tokens stand for runs is needed, "
        "or a budget of at least one whole time step",
    )
    rows = torch.where(mask, mask.flatten().cumsum(0).view(mask.shape) - 1, -1)
    return rows.cummax(dim=-3).values  # rows grow with t within a column, so the newest kept one is the largest so far


def check_frames(frames: Tensor, *, dims: tuple[int, ...] = (4, 5)) -> None:
    """Hold that frames are uint8 [T, H, W, 3] or [B, T, H, W, 3], as far as `dims` allows, and not empty."""
    shapes = " or ".join({4: "[T, H, W, 3]", 5: "[B, T, H, W, 3]"}[ndim] for ndim in dims)
    given = f"{frames.dtype} {list(frames.shape)}"
    _require(
        frames.dtype == torch.uint8 and frames.ndim in dims and frames.shape[-1] == 3 and frames.numel() > 0,
        f"frames are {given}; uint8 {shapes} with values 0..255 is needed (channels last, not normalised)",
    )

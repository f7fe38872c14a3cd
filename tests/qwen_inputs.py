"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with random weights, inputs by hand, and twins of unpatched parts.

The truth for the tower is the unpatched tower on all patches, with attention written out densely and dropped patches
masked as keys. The truth for the text is the unpatched language model on columns picked by hand, a row at a time, with
the positions of the full sequence. Which groups stay is decided here from frames, patch by patch.

Shape legend: P patches, G merge groups, D width, H heads.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlt
from rlt.adapters import tiny
from rlt.adapters.qwen.positions import OLDEST_TRANSFORMERS, vision_tools

transformers = pytest.importorskip("transformers")
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    pytest.skip("transformers is too old for the Qwen-VL adapter", allow_module_level=True)

IMAGE, VIDEO, START, END, PAD = 61, 62, 60, 63, 0
PATCH, TUBELET, MERGE, CHANNELS = 4, 2, 2, 3
THRESHOLD = 0.1
IMAGENET_STD, CLIP_STD = (0.229, 0.224, 0.225), (0.26862954, 0.26130258, 0.27577711)
SIZE = tiny.Size(width=32, depth=3, heads=4, mlp_width=48, patch_size=PATCH, tubelet_size=TUBELET)
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TEXT = {
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
    "eos_token_id": None,
}


def qwen2(kind: str = "Qwen2VLForConditionalGeneration") -> Any:
    return build("qwen2", kind, mlp_ratio=2)


def qwen25(kind: str = "Qwen2_5_VLForConditionalGeneration") -> Any:
    # Two groups along a side of a window, so that windows are whole, halves and quarters.
    return build("qwen2.5", kind, window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)


def qwen3(kind: str = "Qwen3VLForConditionalGeneration") -> Any:
    return build("qwen3", kind, num_position_embeddings=25, deepstack_visual_indexes=[0, 1])


def build(family: str, kind: str, **vision: Any) -> Any:
    tower = {"num_heads": 2, "spatial_merge_size": MERGE, **vision}
    model = tiny.build(family, SIZE, kind=kind, text_config=TEXT, vision_config=tower, **TOKENS)
    for name, parameter in model.named_parameters():  # biases are zeros, which would hide mistakes
        torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)
    return model


FAMILIES: list[Callable[..., Any]] = [qwen2, qwen25, qwen3]
BARE = {qwen2: "Qwen2VLModel", qwen25: "Qwen2_5_VLModel", qwen3: "Qwen3VLModel"}
CACHE = next(
    name
    for name in ("cache", "past_key_values")  # since transformers 5.24, and before
    if name in inspect.signature(transformers.Qwen2VLModel.forward).parameters
)
every_family = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)


def inner_of(model: Any) -> Any:
    return model if hasattr(model, "language_model") else model.model


def patched(model: Any, **options: Any) -> Any:
    """`rlt.patch`, for type checkers that know no attributes of models."""
    return rlt.patch(model, **options)


# Inputs by hand, and the rule from its definition


def clip(time: int, height: int, width: int, *, still: Sequence[Sequence[int]] = (), seed: int = 0) -> Tensor:
    """Normalised frames [2 T', C, height, width in groups * 8 px]; `still` lists (t, group row, group column) that
    repeat the time step before. Time steps that are not whole in themselves catch a wrong choice of frames."""
    generator = torch.Generator().manual_seed(seed)
    side = PATCH * MERGE
    frames = torch.randn(time * TUBELET, CHANNELS, height * side, width * side, generator=generator)
    for t, row, column in sorted(map(tuple, still)):
        place = (slice(None), slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side))
        frames[t * TUBELET + TUBELET - 1][place] = frames[(t - 1) * TUBELET][place] + 0.02
    return frames


def patchify(frames: Tensor) -> tuple[Tensor, list[int]]:
    """[frames, C, H, W] -> rows in the processors' order, one by one, and their (t, h, w) grid."""
    time, height, width = frames.shape[0] // TUBELET, frames.shape[2] // PATCH, frames.shape[3] // PATCH
    rows = []
    for t in range(time):
        for group_row in range(height // MERGE):
            for group_column in range(width // MERGE):
                for row in range(MERGE):
                    for column in range(MERGE):
                        h, w = (group_row * MERGE + row) * PATCH, (group_column * MERGE + column) * PATCH
                        pixels = frames[t * TUBELET : (t + 1) * TUBELET, :, h : h + PATCH, w : w + PATCH]
                        rows.append(pixels.transpose(0, 1).flatten())
    return torch.stack(rows), [time, height, width]


def naive_mask(frames: Tensor, threshold: float = THRESHOLD, std: Sequence[float] = CLIP_STD) -> Tensor:
    """bool [T', H', W']: groups in which any patch differs, by the ImageNet-normalised picture."""
    side = PATCH * MERGE
    unit = torch.tensor([ours / theirs for ours, theirs in zip(std, IMAGENET_STD, strict=True)]).view(3, 1, 1)
    mask = torch.ones(frames.shape[0] // TUBELET, frames.shape[2] // side, frames.shape[3] // side, dtype=torch.bool)
    for t in range(1, mask.shape[0]):
        change = (frames[(t + 1) * TUBELET - 1] - frames[(t - 1) * TUBELET]).abs() * unit
        for row in range(mask.shape[1]):
            for column in range(mask.shape[2]):
                group = change[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                patches = [group[:, h : h + PATCH, w : w + PATCH].mean() for h in (0, PATCH) for w in (0, PATCH)]
                mask[t, row, column] = bool(max(patches) > threshold)
    return mask


def std_of(model: Any) -> Sequence[float]:
    """What the processor of the family divides by."""
    return (0.5, 0.5, 0.5) if "Qwen3" in type(model).__name__ else CLIP_STD


def prompt(
    model: Any, parts: Sequence[str | list[int]], frames: Sequence[Tensor], images: Sequence[Tensor]
) -> list[int]:
    """Token ids; "video" and "image" stand for the next one. Qwen3-VL has a timestamp before each time step."""
    ids: list[int] = []
    videos, pictures = iter(frames), iter(images)
    timestamps = "Qwen3" in type(model).__name__
    for part in parts:
        if part == "video":
            time, height, width = naive_mask(next(videos)).shape
            if timestamps:
                for t in range(time):
                    ids += [40 + t, 50, START, *[VIDEO] * (height * width), END]
            else:
                ids += [START, *[VIDEO] * (time * height * width), END]
        elif part == "image":
            _, height, width = naive_mask(next(pictures)).shape
            ids += [START, *[IMAGE] * (height * width), END]
        else:
            assert isinstance(part, list)
            ids += part
    return ids


@dataclass
class Row:
    """One row of a batch."""

    parts: Sequence[str | list[int]]
    frames: Sequence[Tensor] = ()
    images: Sequence[Tensor] = ()


def inputs_of(model: Any, rows: Sequence[Row], *, side: str = "left", pace: float = 0.75) -> dict[str, Tensor]:
    """What a processor gives for these rows. Above a pace of 0.5 s, time in Qwen2.5-VL outruns rows and columns."""
    ids = [prompt(model, row.parts, row.frames, row.images) for row in rows]
    length = max(map(len, ids))
    pads = [[PAD] * (length - len(row)) for row in ids]
    filled = [pad + row if side == "left" else row + pad for pad, row in zip(pads, ids, strict=True)]
    real = [[0] * len(pad) + [1] * len(row) for pad, row in zip(pads, ids, strict=True)]
    found = {"input_ids": torch.tensor(filled)}
    found["attention_mask"] = torch.tensor([mask if side == "left" else mask[::-1] for mask in real])
    found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).long() + 2 * (found["input_ids"] == VIDEO).long()
    for pixels, grid, clips in (
        ("pixel_values_videos", "video_grid_thw", [clip for row in rows for clip in row.frames]),
        ("pixel_values", "image_grid_thw", [image for row in rows for image in row.images]),
    ):
        if clips:
            patches = [patchify(one) for one in clips]
            found[pixels] = torch.cat([one for one, _ in patches])
            found[grid] = torch.tensor([size for _, size in patches])
    if "Qwen2_5" in type(model).__name__ and "video_grid_thw" in found:
        found["second_per_grid_ts"] = found["video_grid_thw"][:, 0] / 4 * pace  # differs between the videos
    return found


STILL = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (1, 2, 3), (2, 0, 0), (2, 2, 2), (2, 2, 3), (3, 0, 3)]
ALL_OF_STEP_2 = [(2, row, column) for row in range(3) for column in range(4)]


def row_a() -> Row:
    return Row([[5, 6, 7], "video", [8, 9, 10, 11]], [clip(4, 3, 4, still=STILL)])


def row_b() -> Row:
    """Another grid, and a time step that loses all its groups."""
    return Row(
        [[12], "video", [13, 14]], [clip(3, 2, 3, still=[(1, r, c) for r in range(2) for c in range(3)], seed=1)]
    )


def row_c() -> Row:
    """Two videos and an image in one prompt."""
    frames = [clip(3, 2, 2, still=[(1, 0, 0), (2, 1, 1)], seed=2), clip(4, 3, 4, still=ALL_OF_STEP_2, seed=3)]
    return Row([[20, 21], "video", [22], "image", [23, 24], "video", [25]], frames, [clip(1, 2, 3, seed=4)])


BATCHES: dict[str, Callable[[], list[Row]]] = {
    "one": lambda: [row_a()],
    "two": lambda: [row_a(), row_b()],
    "mixed": lambda: [row_b(), row_c(), row_a()],
    "same length": lambda: [row_a(), Row(row_a().parts, [clip(4, 3, 4, still=ALL_OF_STEP_2, seed=5)])],
    "with text": lambda: [row_c(), Row([[3, 4, 5, 6, 7]])],
}
every_batch = pytest.mark.parametrize("batch", BATCHES)


# Twins


def features_of(model: Any, pixels: Tensor, grid: Tensor, kept_G: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Features [kept groups, D] and those of deepstack, from the unpatched tower with dropped keys masked."""
    visual = inner_of(model).visual
    order = torch.arange(len(kept_G))
    if hasattr(visual, "window_size"):
        order, _ = vision_tools().get_vision_window_index(grid, MERGE, visual.window_size, PATCH)
    kept_P = kept_G[order].repeat_interleave(MERGE**2)
    for block in visual.blocks:
        block.attn.__dict__["forward"] = types.MethodType(dense_attention(kept_P), block.attn)
    try:
        output = visual(pixels, grid_thw=grid, return_dict=True)
    finally:
        for block in visual.blocks:
            del block.attn.__dict__["forward"]
    deepstack = getattr(output, "deepstack_features", None) or []
    return output.pooler_output[kept_G], [layer[kept_G] for layer in deepstack]


def dense_attention(kept_P: Tensor) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, cu_seqlens: Tensor, position_embeddings: Any = None, **_: Any) -> Tensor:
        segment = torch.bucketize(torch.arange(len(x)), cu_seqlens, right=True)
        allowed = (segment[:, None] == segment[None]) & kept_P[None]
        allowed |= torch.eye(len(x), dtype=torch.bool)  # dropped patches are thrown away, but must stay finite
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).permute(1, 2, 0, 3)
        cos, sin = position_embeddings
        sign = torch.ones(q.shape[-1])
        sign[: q.shape[-1] // 2] = -1
        q, k = (y * cos + torch.cat(y.chunk(2, -1)[::-1], -1) * sign * sin for y in (q, k))
        scores = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf)
        mixed: Tensor = self.proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        return mixed

    return forward


@dataclass
class Twin:
    """What the unpatched parts compute for one row."""

    columns: Tensor
    embeds: Tensor
    positions: Tensor
    visual: Tensor
    deepstack: list[Tensor]

    def states(self, model: Any, more: Sequence[int] = ()) -> Tensor:
        """[columns left + more, D]; `more` are generated tokens, at the positions that follow."""
        embeds, positions = self.embeds, self.positions
        if more:
            embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor(list(more)))])
            last = positions[:, -1:] + 1 + torch.arange(len(more))
            positions = torch.cat([positions, last], dim=1)
        extra: dict[str, Any] = {}
        if self.deepstack:
            visual = F.pad(self.visual, (0, len(more)))
            extra = {"visual_pos_masks": visual[None], "deepstack_visual_embeds": self.deepstack}
        output = inner_of(model).language_model(
            inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False, **extra
        )
        states: Tensor = output.last_hidden_state[0]
        return states


def twins_of(model: Any, rows: Sequence[Row], *, threshold: float = THRESHOLD) -> list[Twin]:
    """One per row, each computed alone and without padding."""
    return [twin_of(model, row, threshold) for row in rows]


def twin_of(model: Any, row: Row, threshold: float) -> Twin:
    given = inputs_of(model, [row])
    ids = given["input_ids"][0]
    embeds = model.get_input_embeddings()(ids)
    columns, deepstack = torch.ones(len(ids), dtype=torch.bool), []
    for token, pixels, grid in (
        (VIDEO, "pixel_values_videos", "video_grid_thw"),
        (IMAGE, "pixel_values", "image_grid_thw"),
    ):
        if pixels not in given:
            continue
        clips = row.frames if token == VIDEO else [image[:TUBELET] for image in row.images]
        kept_G = torch.cat([naive_mask(one, threshold, std_of(model)).flatten() for one in clips])
        columns[ids == token] = kept_G
        features, layers = features_of(model, given[pixels], given[grid], kept_G)
        place = ((ids == token) & columns).nonzero()[:, 0]
        embeds = embeds.index_copy(0, place, features)
        deepstack.append((place, layers))
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions = torch.arange(len(ids)).expand(3, -1)
    if row.frames or row.images:
        known = {name: given[name] for name in names if name in given}
        positions = inner_of(model).get_rope_index(given["input_ids"], **known)[0][:, 0]
    inner_of(model).rope_deltas = None
    visual = (ids == VIDEO) | (ids == IMAGE)
    order = torch.cat([place for place, _ in deepstack]).argsort() if deepstack else torch.tensor([])
    by_layer = [torch.cat(layers)[order] for layers in zip(*(layers for _, layers in deepstack), strict=True)]
    return Twin(columns.nonzero()[:, 0], embeds[columns], positions[:, columns], visual[columns], by_layer)


def real_part(output: Tensor, length: int, side: str) -> Tensor:
    """A row without its padding."""
    return output[-length:] if side == "left" else output[:length]

"""`rlt.patch` on Qwen2-VL, Qwen2.5-VL and Qwen3-VL with random weights, against unpatched models of transformers.

The truth for the tower is the unpatched tower on all patches, with attention written out densely and dropped patches
masked as keys. The truth for the text is the unpatched language model on columns picked by hand, a row at a time, with
the positions of the full sequence. Which groups stay is decided here from frames, patch by patch.

Shape legend: P patches, G merge groups, D width, H heads.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlt
from rlt.adapters.qwen.positions import (
    OLDEST_TRANSFORMERS,
    Columns,
    full_features,
    kept_features,
    shorter_segments,
    tower_arguments,
    vision_tools,
)
from rlt.errors import InvalidArgumentError, MissingDependencyError

transformers = pytest.importorskip("transformers")
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST_TRANSFORMERS:
    pytest.skip("transformers is too old for the Qwen-VL adapter", allow_module_level=True)

IMAGE, VIDEO, START, END, PAD = 61, 62, 60, 63, 0
PATCH, TUBELET, MERGE, CHANNELS = 4, 2, 2, 3
THRESHOLD = 0.1
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
VISION = {"depth": 3, "patch_size": PATCH, "num_heads": 2, "temporal_patch_size": TUBELET, "spatial_merge_size": MERGE}


def qwen2(kind: str = "Qwen2VLForConditionalGeneration") -> Any:
    vision = {**VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    return build(kind, transformers.Qwen2VLConfig(text_config=TEXT, vision_config=vision, **TOKENS))


def qwen25(kind: str = "Qwen2_5_VLForConditionalGeneration") -> Any:
    vision = {
        **VISION,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "window_size": 16,  # two groups along a side, so that windows are whole, halves and quarters
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    return build(kind, transformers.Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **TOKENS))


def qwen3(kind: str = "Qwen3VLForConditionalGeneration") -> Any:
    vision = {
        **VISION,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [0, 1],
    }
    return build(kind, transformers.Qwen3VLConfig(text_config=TEXT, vision_config=vision, **TOKENS))


def build(kind: str, config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
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
        frames[t * TUBELET + TUBELET - 1][place] = frames[(t - 1) * TUBELET][place] + 0.05
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


def naive_mask(frames: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """bool [T', H', W']: groups in which any patch differs."""
    side = PATCH * MERGE
    mask = torch.ones(frames.shape[0] // TUBELET, frames.shape[2] // side, frames.shape[3] // side, dtype=torch.bool)
    for t in range(1, mask.shape[0]):
        change = (frames[(t + 1) * TUBELET - 1] - frames[(t - 1) * TUBELET]).abs()
        for row in range(mask.shape[1]):
            for column in range(mask.shape[2]):
                group = change[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
                patches = [group[:, h : h + PATCH, w : w + PATCH].mean() for h in (0, PATCH) for w in (0, PATCH)]
                mask[t, row, column] = bool(max(patches) > threshold)
    return mask


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
        kept_G = torch.cat([naive_mask(one, threshold).flatten() for one in clips])
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


# Nothing dropped


@every_family
@every_batch
@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_dropped_is_the_unpatched_model(make: Callable[..., Any], batch: str, side: str) -> None:
    model = make()
    given = inputs_of(model, BATCHES[batch](), side=side)
    before = model(**given).logits
    patched(model, policy="none")
    assert torch.equal(model(**given).logits, before)
    assert model.rlt.last.share_kept == 1


@every_family
@every_batch
def test_the_shortening_itself_changes_nothing_where_nothing_is_dropped(
    make: Callable[..., Any], batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    given = inputs_of(model, BATCHES[batch]())
    before = model(**given).logits
    patched(model, policy="none")

    def always(call: dict[str, Any]) -> Any:
        masks = model.rlt.choose(call["pixel_values_videos"], call["video_grid_thw"])
        return model.rlt.encode(call["pixel_values_videos"], call["video_grid_thw"], masks), masks

    monkeypatch.setattr(model.rlt, "_video", always)
    after = model(**given).logits
    real = given["attention_mask"].bool()
    torch.testing.assert_close(after[real], before[real], atol=1e-5, rtol=0)


@every_family
def test_text_and_images_alone_are_left_alone(make: Callable[..., Any]) -> None:
    model = make()
    text = inputs_of(model, [Row([[3, 4, 5]]), Row([[6, 7, 8, 9, 10]])])
    picture = inputs_of(model, [Row([[3], "image", [4]], images=[clip(1, 2, 3)])])
    before = [model(**given).logits for given in (text, picture)]
    patched(model)
    for inputs, expected in zip((text, picture), before, strict=True):
        assert torch.equal(model(**inputs).logits, expected)
    assert model.rlt.last is None


# Something dropped


@every_family
@every_batch
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_parts_row_by_row(make: Callable[..., Any], batch: str, side: str) -> None:
    model, rows = make(), BATCHES[batch]()
    twins = twins_of(model, rows)
    patched(model, threshold=THRESHOLD)
    given = inputs_of(model, rows, side=side)
    logits = model(**given).logits
    masks = [naive_mask(one) for row in rows for one in row.frames]
    assert all(torch.equal(ours, naive) for ours, naive in zip(model.rlt.last.masks, masks, strict=True))
    assert logits.shape[1] == max(len(twin.columns) for twin in twins) < given["input_ids"].shape[1]
    if bool(given["attention_mask"][:, -1].all()):
        side = "left"  # where no padding says otherwise
    for twin, row_logits in zip(twins, logits, strict=True):
        expected = model.lm_head(twin.states(model))
        torch.testing.assert_close(real_part(row_logits, len(expected), side), expected, atol=2e-5, rtol=1e-4)


@every_family
def test_bare_models_give_the_same_states(make: Callable[..., Any]) -> None:
    model, rows = make(BARE[make]), BATCHES["two"]()
    twins = twins_of(model, rows)
    patched(model, threshold=THRESHOLD)
    states = model(**inputs_of(model, rows)).last_hidden_state
    for twin, row_states in zip(twins, states, strict=True):
        expected = twin.states(model)
        torch.testing.assert_close(row_states[-len(expected) :], expected, atol=2e-5, rtol=1e-4)


@every_family
def test_a_batch_equals_its_rows_one_by_one(make: Callable[..., Any]) -> None:
    model, rows = patched(make(), threshold=THRESHOLD), BATCHES["mixed"]()
    together = model(**inputs_of(model, rows)).logits
    for row, row_logits in zip(rows, together, strict=True):
        alone = model(**inputs_of(model, [row])).logits[0]
        torch.testing.assert_close(row_logits[-len(alone) :], alone, atol=1e-5, rtol=1e-4)


@every_family
def test_arguments_may_come_by_place_without_mask_or_as_embeddings(make: Callable[..., Any]) -> None:
    model = patched(make(), threshold=THRESHOLD)
    given = inputs_of(model, [row_c()])
    expected = model(**given)
    ids, mask = given.pop("input_ids"), given.pop("attention_mask")
    assert torch.equal(model(ids, mask, **given).logits, expected.logits)
    torch.testing.assert_close(model(ids, **given).logits, expected.logits, atol=1e-5, rtol=1e-4)
    as_tuple = model(ids, mask, **given, return_dict=False)
    assert torch.equal(as_tuple[0], expected.logits)
    known = {name: given[name] for name in given if name.endswith(("thw", "type_ids", "grid_ts"))}
    positions, _ = model.model.get_rope_index(ids, attention_mask=mask, **known)
    embeds = model.get_input_embeddings()(ids)
    result = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **given).logits
    torch.testing.assert_close(result, expected.logits, atol=1e-5, rtol=1e-4)


def test_a_static_clip_keeps_its_first_time_step_and_the_tower_sees_that_many_patches() -> None:
    model = patched(qwen25())
    frames = clip(1, 3, 4)[:1].expand(8, -1, -1, -1)
    given = inputs_of(model, [Row([[5], "video", [6]], [frames])])
    seen: list[int] = []
    model.model.visual.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    logits = model(**given).logits
    assert seen == [3 * 4 * MERGE**2]
    assert logits.shape[1] == 3 * 4 + 4
    assert repr(model.rlt.last) == "LastVideos([12] of [48] tokens per video)"
    assert model.rlt.last.num_kept == (12,)
    assert model.rlt.last.num_dense == 48


def test_a_group_stays_whole_if_one_of_its_patches_changes() -> None:
    model = patched(qwen25())
    frames = clip(1, 2, 2)[:1].repeat(4, 1, 1, 1)
    frames[3, :, PATCH : 2 * PATCH, 3 * PATCH :] += 0.2  # lower right patch of the upper right group
    model(**inputs_of(model, [Row(["video", [6]], [frames])]))
    assert model.rlt.last.mask[0, 1].tolist() == [[False, True], [False, False]]


def test_random_draws_differ_between_the_videos_of_a_call() -> None:
    model = patched(qwen25(), policy="random")
    model(**inputs_of(model, [row_a(), row_a()]))
    one, other = model.rlt.last.masks
    assert one.sum() == other.sum() == 39
    assert not torch.equal(one, other)


def test_a_kept_placeholder_that_the_mask_hides_stays_hidden() -> None:
    model = qwen25()
    given = inputs_of(model, [row_a()])
    known = {name: given[name] for name in ("mm_token_type_ids", "video_grid_thw", "second_per_grid_ts")}
    positions, _ = model.model.get_rope_index(given["input_ids"], **known)
    hidden = (given["input_ids"][0] == VIDEO).nonzero()[1, 0]  # of the first time step, which stays
    given["attention_mask"][0, hidden] = 0
    twin = twin_of(model, row_a(), THRESHOLD)
    patched(model, threshold=THRESHOLD)
    logits = model(**given, position_ids=positions).logits[0]
    rlt.unpatch(model)
    states = model.model.language_model(
        inputs_embeds=twin.embeds[None],
        position_ids=twin.positions[:, None],
        attention_mask=(twin.columns != hidden).long()[None],
    ).last_hidden_state[0]
    shown = twin.columns != hidden
    torch.testing.assert_close(logits[shown], model.lm_head(states)[shown], atol=2e-5, rtol=1e-4)


# Learning


@every_family
def test_loss_and_gradients_are_those_of_the_parts(make: Callable[..., Any]) -> None:
    model, rows = make(), BATCHES["mixed"]()
    given = inputs_of(model, rows, side="right")
    labels = given["input_ids"].masked_fill((given["mm_token_type_ids"] > 0) | (given["attention_mask"] == 0), -100)
    predicted, wanted = [], []
    for twin, row in zip(twins_of(model, rows), rows, strict=True):
        ids = inputs_of(model, [row])["input_ids"][0][twin.columns]
        targets = ids.masked_fill(twin.visual, -100)
        predicted.append(model.lm_head(twin.states(model))[:-1])
        wanted.append(targets[1:])
    expected = F.cross_entropy(torch.cat(predicted), torch.cat(wanted), ignore_index=-100)
    expected.backward()
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    patched(model, threshold=THRESHOLD).train()
    loss = model(**given, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        ours, twin_grad = parameter.grad, theirs[name]
        assert (ours is None) == (twin_grad is None), name
        if ours is not None and twin_grad is not None:
            assert torch.isfinite(ours).all()
            assert torch.allclose(ours, twin_grad, atol=1e-4, rtol=1e-3), name


# Generation


def greedy(model: Any, twin: Twin, steps: int) -> list[int]:
    """By hand, without a cache."""
    tokens: list[int] = []
    for _ in range(steps):
        tokens.append(int(model.lm_head(twin.states(model, tokens)[-1]).argmax()))
    return tokens


@every_family
@every_batch
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generation_equals_a_loop_without_cache(make: Callable[..., Any], batch: str, use_cache: bool) -> None:
    model, rows = make(), BATCHES[batch]()
    expected = [greedy(model, twin, 8) for twin in twins_of(model, rows)]
    patched(model, threshold=THRESHOLD)
    given = inputs_of(model, rows)
    found = model.generate(**given, max_new_tokens=8, do_sample=False, use_cache=use_cache)
    length = given["input_ids"].shape[1]
    assert torch.equal(found[:, :length], given["input_ids"])
    assert found[:, length:].tolist() == expected


@every_family
@torch.no_grad()
def test_positions_of_generated_tokens_are_those_of_the_unpatched_model(make: Callable[..., Any]) -> None:
    model = make()
    given = inputs_of(model, BATCHES["mixed"]())
    seen: list[Tensor] = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(args[1][:, :, -1]))
    model.generate(**given, max_new_tokens=4, do_sample=False)
    deltas, positions, seen[:] = model.model.rope_deltas, torch.stack(seen), []
    patched(model, threshold=THRESHOLD)
    model.generate(**given, max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.stack(seen), positions)
    assert torch.equal(model.model.rope_deltas, deltas)


@every_family
@torch.no_grad()
def test_beams_and_several_answers(make: Callable[..., Any]) -> None:
    model, rows = patched(make(), threshold=THRESHOLD), BATCHES["two"]()
    together = model.generate(**inputs_of(model, rows), max_new_tokens=6, do_sample=False, num_beams=3)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(**inputs_of(model, [row]), max_new_tokens=6, do_sample=False, num_beams=3)[0]
        assert found[-6:].tolist() == alone[-6:].tolist()
    torch.manual_seed(0)
    several = model.generate(**inputs_of(model, rows), max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert several.shape[0] == 4


@every_family
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_decoding_by_hand_with_a_cache(make: Callable[..., Any], masked: bool) -> None:
    """Masks count the columns of the unpatched model, as the caller knows them."""
    model = patched(make(), threshold=THRESHOLD)
    given = inputs_of(model, [row_a()], pace=0.5)
    length = given["input_ids"].shape[1]
    expected = model.generate(**given, max_new_tokens=5, do_sample=False)[0, length:].tolist()
    mask = given["attention_mask"]
    output = model(**given, use_cache=True)
    tokens = []
    for _ in range(5):
        tokens.append(int(output.logits[0, -1].argmax()))
        mask = F.pad(mask, (0, 1), value=1)
        output = model(
            input_ids=torch.tensor([tokens[-1:]]),
            attention_mask=mask if masked else None,
            **{CACHE: copy.deepcopy(output[CACHE])},
        )
    assert tokens == expected


@every_family
@torch.no_grad()
def test_masked_text_after_a_video_stays_masked(make: Callable[..., Any]) -> None:
    model = make()
    twin, more = twin_of(model, row_a(), THRESHOLD), [30, 31, 32, 33]
    embeds = torch.cat([twin.embeds, model.get_input_embeddings()(torch.tensor(more))])
    positions = torch.cat([twin.positions, twin.positions[:, -1:] + torch.arange(1, 5)], dim=1)
    shown = torch.ones(len(embeds), dtype=torch.int64)
    shown[-3] = 0
    extra: dict[str, Any] = {}
    if twin.deepstack:
        extra = {"visual_pos_masks": F.pad(twin.visual, (0, 4))[None], "deepstack_visual_embeds": twin.deepstack}
    states = model.model.language_model(
        inputs_embeds=embeds[None], position_ids=positions[:, None], attention_mask=shown[None], **extra
    )
    expected = model.lm_head(states.last_hidden_state[0, -2:])
    patched(model, threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    cache, mask, found = model(**given, use_cache=True)[CACHE], given["attention_mask"], []
    for tokens, tail, places in ((more[:3], [1, 0, 1], slice(-4, -1)), (more[3:], [1], slice(-1, None))):
        mask = torch.cat([mask, torch.tensor([tail])], dim=1)
        given_now = {"input_ids": torch.tensor([tokens]), "position_ids": positions[:, None, places]}
        found.append(model(**given_now, attention_mask=mask, **{CACHE: cache}).logits[0, -1])
    torch.testing.assert_close(torch.stack(found), expected, atol=2e-5, rtol=1e-4)


@every_family
@pytest.mark.parametrize("types", ["none", "types", "types and grids"])
@torch.no_grad()
def test_a_second_turn_goes_on_from_the_cache(make: Callable[..., Any], types: str) -> None:
    model = patched(make(), threshold=THRESHOLD)
    given = inputs_of(model, BATCHES["two"](), pace=0.5)
    first = model.generate(**given, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    text = torch.cat([first.sequences, torch.tensor([[30, 31, 32], [33, 34, 35]])], dim=1)
    longer = {**given, "input_ids": text, "attention_mask": F.pad(given["attention_mask"], (0, 6), value=1)}
    longer["mm_token_type_ids"] = F.pad(given["mm_token_type_ids"], (0, 6))
    expected = model.generate(**longer, max_new_tokens=4, do_sample=False)
    longer.pop("pixel_values_videos")
    if types != "types and grids":
        longer.pop("video_grid_thw")
        longer.pop("second_per_grid_ts", None)
    if types == "none":
        longer.pop("mm_token_type_ids")
    found = model.generate(**longer, max_new_tokens=4, do_sample=False, **{CACHE: first[CACHE]})
    assert torch.equal(found, expected)


@every_family
@torch.no_grad()
def test_candidates_from_the_prompt_change_nothing(make: Callable[..., Any]) -> None:
    """Rejected candidates are cut off the cache again."""
    model = patched(make(), threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    expected = model.generate(**given, max_new_tokens=12, do_sample=False)
    lengths: list[int] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, _args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    found = model.generate(**given, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)
    assert max(lengths[1:]) > 1


@every_family
@pytest.mark.parametrize("size", [7, 20])
@torch.no_grad()
def test_a_prompt_can_be_prefilled_in_pieces(make: Callable[..., Any], size: int) -> None:
    """Some pieces lose all their columns in one row, and some in all."""
    model = patched(make(), threshold=THRESHOLD)
    still = clip(1, 3, 4)[:1].expand(8, -1, -1, -1)
    for rows in ([row_a(), row_b()], [Row([[3], "video", [4, 5]], [still])]):
        given = inputs_of(model, rows)
        expected = model.generate(**given, max_new_tokens=4, do_sample=False)
        found = model.generate(**given, max_new_tokens=4, do_sample=False, prefill_chunk_size=size)
        assert torch.equal(found, expected)


def test_an_old_transformers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = qwen25()
    monkeypatch.setattr("rlt.adapters.qwen.positions.version", lambda _name: "5.9.1")
    with pytest.raises(MissingDependencyError, match=r"transformers is 5\.9\.1; .* needs 5\.23 or newer"):
        patched(model)
    assert "rlt" not in model.__dict__


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = patched(qwen25(), threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    with pytest.raises(TypeError):
        model(**given, labels=given["input_ids"], num_items_in_batch="many")
    text = model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True)
    assert not hasattr(text[CACHE], "rlt_kept")


# Options, copies, files


@every_family
@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"max_tokens": 20}, (20, 18)),
        ({"keep_ratio": 0.5}, (24, 9)),
        ({"policy": "random"}, (39, 12)),
        ({"policy": "uniform_frames"}, (36, 12)),
        ({"threshold": 100.0}, (12, 6)),
    ],
)
def test_options_count_groups(make: Callable[..., Any], options: dict[str, Any], counts: tuple[int, ...]) -> None:
    model = patched(make(), **options)
    given = inputs_of(model, BATCHES["two"]())
    logits = model(**given).logits
    assert model.rlt.last.num_kept == counts
    assert model.rlt.last.dense_per_video == (48, 18)
    assert torch.isfinite(logits).all()
    with model.rlt.override(policy="none", max_tokens=None, keep_ratio=None):
        assert model(**given).logits.shape[:2] == given["input_ids"].shape


@every_family
def test_unpatching_restores_the_model_bit_for_bit(make: Callable[..., Any]) -> None:
    model = make()
    given = inputs_of(model, BATCHES["mixed"]())
    before, names = model(**given).logits, set(model.__dict__)
    generated = model.generate(**given, max_new_tokens=4, do_sample=False)
    patched(model)
    assert not torch.equal(model(**given).logits[:, -1], before[:, -1])
    rlt.unpatch(model)
    assert torch.equal(model(**given).logits, before)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), generated)
    assert set(model.__dict__) == names
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert not model._forward_pre_hooks_with_kwargs


@torch.no_grad()
def test_copies_stay_patched_and_are_independent() -> None:
    model = patched(qwen3(), threshold=THRESHOLD)
    given = inputs_of(model, BATCHES["two"]())
    twin = copy.deepcopy(model)
    assert twin.rlt is not model.rlt
    assert twin.rlt.model is twin
    expected = model(**given).logits
    answer = model.generate(**given, max_new_tokens=3, do_sample=False)
    rlt.unpatch(model)
    assert torch.equal(twin(**given).logits, expected)
    assert torch.equal(twin.generate(**given, max_new_tokens=3, do_sample=False), answer)
    assert twin.rlt.last is not None


def test_pickles_stay_patched() -> None:
    model = patched(qwen25(), threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(**given).logits, model(**given).logits)
    assert again.rlt.last.num_kept == model.rlt.last.num_kept == (39,)


def test_whole_and_part_are_not_patched_at_once() -> None:
    model = qwen25()
    patched(model.model)
    with pytest.raises(InvalidArgumentError, match="the bare model within is patched already"):
        patched(model)
    assert "rlt" not in model.__dict__
    rlt.unpatch(model.model)
    patched(model)
    assert "rlt" in patched(model).__dict__  # anew


def test_saving_is_unaffected(tmp_path: Path) -> None:
    model = qwen25()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patched(model)
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path)
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    assert not hasattr(again, "rlt")
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert model.config.to_dict()["model_type"] == again.config.to_dict()["model_type"]


@every_family
def test_the_check_engages(make: Callable[..., Any]) -> None:
    model = patched(make())
    model.rlt.check()
    assert model.rlt.last is None
    with model.rlt.override(policy="none"), pytest.raises(InvalidArgumentError, match="does not engage"):
        model.rlt.check()


def test_a_forward_that_others_have_wrapped_stays_wrapped() -> None:
    """As libraries do that spread a model over devices."""
    model, calls = qwen25(), []
    given = inputs_of(model, [row_a()])
    own = model.forward

    @wraps(own)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["input_ids"].shape[1])
        return own(*args, **kwargs)

    model.forward = wrapped
    patched(model, threshold=THRESHOLD)
    model(**given)
    patched(model, policy="none")
    model(**given)
    rlt.unpatch(model)
    assert calls == [48, 57]
    assert model.forward is wrapped


def test_learning_with_recomputed_activations() -> None:
    model = patched(qwen25(), threshold=THRESHOLD).train()
    given = inputs_of(model, [row_a()])
    grads = []
    for again in (False, True):
        if again:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**given, labels=given["input_ids"]).loss.backward()
        grads.append(model.model.visual.patch_embed.proj.weight.grad.clone())
    torch.testing.assert_close(*grads)
    assert bool(grads[0].any())


def test_half_precision() -> None:
    model = patched(qwen3().to(torch.bfloat16), threshold=THRESHOLD)
    given = inputs_of(model, [row_c()])
    given = {name: value.bfloat16() if value.is_floating_point() else value for name, value in given.items()}
    assert model(**given).logits.dtype == torch.bfloat16
    assert model.rlt.last.share_kept < 1
    model.generate(**given, max_new_tokens=2)


# Bookkeeping


@settings(max_examples=60, deadline=None)
@given(data=st.data(), right=st.booleans())
def test_columns_keep_their_order_and_padding_stands_on_one_side(data: st.DataObject, right: bool) -> None:
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    bits = data.draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    kept = torch.tensor(bits).view(rows, length)
    kept[0, data.draw(st.integers(0, length - 1))] = True
    columns = Columns.of(kept, right=right)
    values = torch.arange(rows * length).view(rows, length)
    taken = columns.take(values, -1)
    assert torch.equal(columns.take(values.expand(3, -1, -1), -1)[2], taken)
    vectors = columns.take_vectors(values[..., None].expand(-1, -1, 2) + 1)[..., 1]
    assert torch.equal(vectors, taken + 1)
    for row in range(rows):
        expected = values[row][kept[row]].tolist()
        padding = [-1] * (int(kept.sum(1).max()) - len(expected))
        assert taken[row].tolist() == (expected + padding if right else padding + expected)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_places_segments_and_windows_follow_any_choice_of_groups(data: st.DataObject) -> None:
    """Each group that stays has its own place, frame and window; nothing else shares a segment with it than before."""
    sizes = data.draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=3))
    grid = torch.tensor([(time, 2 * height, 2 * width) for time, height, width in sizes])
    total = sum(time * height * width for time, height, width in sizes)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    kept[data.draw(st.integers(0, total - 1))] = True
    visual = types.SimpleNamespace(spatial_merge_size=MERGE, window_size=16, patch_size=PATCH)
    ours = tower_arguments(visual, grid, kept)
    places = [
        (number, t, row, column, row // 2, column // 2)
        for number, (time, height, width) in enumerate(sizes)
        for t in range(time)
        for row in range(height)
        for column in range(width)
    ]
    stay = [place for place, keep in zip(places, kept.tolist(), strict=True) if keep]
    rows, columns = ours["position_ids"][::4].T // 2
    assert [(row, column) for _, _, row, column, _, _ in stay] == list(
        zip(rows.tolist(), columns.tolist(), strict=True)
    )
    assert sorted(ours["window_index"].tolist()) == list(range(len(stay)))
    in_windows = [stay[index] for index in ours["window_index"].tolist()]
    for name, order, key in (
        ("cu_seqlens", stay, lambda place: place[:2]),
        ("cu_window_seqlens", in_windows, lambda place: (*place[:2], *place[4:])),
    ):
        offsets = ours[name].tolist()
        segments = [order[a // 4 : b // 4] for a, b in pairwise(offsets)]
        keys = [{key(place) for place in segment} for segment in segments]
        assert all(len(found) == 1 for found in keys)  # no segment is empty, none has two frames or windows
        assert len(keys) == len({key(place) for place in stay})
        assert offsets[-1] == 4 * len(stay)


def test_segments_that_lose_everything_are_gone() -> None:
    kept = torch.tensor([1, 1, 0, 0, 0, 1], dtype=torch.bool)
    assert shorter_segments(torch.tensor([0, 2, 4, 6]), kept).tolist() == [0, 2, 3]


def test_marked_features_come_back() -> None:
    output = transformers.modeling_outputs.BaseModelOutputWithPooling(
        pooler_output=(torch.randn(2, 4), torch.randn(3, 4))
    )
    masks = [torch.tensor([[True, False, True]]), torch.ones(3, dtype=torch.bool)]
    marked = full_features(output, masks)
    assert [len(feature) for feature in marked.pooler_output] == [3, 3]
    found = kept_features(marked)
    assert found is not None
    assert all(torch.equal(a, b.flatten()) for a, b in zip(found[1], masks, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[0].pooler_output, output.pooler_output, strict=True))
    assert kept_features(output) is None


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_grid_thw": None}, "video_grid_thw is None beside pixel_values_videos; pass the processor's"),
        ({"video_grid_thw": torch.tensor([4, 6, 8])}, r"video_grid_thw is of shape \[3\]"),
        ({"video_grid_thw": torch.tensor([[4, 6, 6]])}, r"has 192 rows; video_grid_thw \[\[4, 6, 6\]\] needs 144"),
        ({"video_grid_thw": torch.tensor([[4, 3, 16]])}, r"has \[4, 3, 16\]; rows and columns must be multiples of 2"),
        ({"pixel_values_videos": torch.zeros(192, 95)}, r"shape \[192, 95\]; the model needs \[patches, 96\]"),
        ({"input_ids": torch.full((1, 57), 5)}, "the text has 0 video placeholders; video_grid_thw needs 48"),
        ({"attention_mask": torch.ones(1, 9)}, r"attention_mask is \[1, 9\]; .* \[rows, 57\]"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask is dict"),
        ({"logits_to_keep": torch.tensor([1])}, "logits_to_keep is a tensor"),
    ],
)
def test_mistakes_are_told_in_one_line(changes: dict[str, Any], message: str) -> None:
    model = patched(qwen25())
    given = {**inputs_of(model, [row_a()]), **changes}
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        model(**given)
    assert "\n" not in str(caught.value)


def test_what_is_not_offered_is_told() -> None:
    with pytest.raises(InvalidArgumentError, match="expand is 'fill'"):
        patched(qwen25(), expand="fill")
    model = patched(qwen25())
    given = inputs_of(model, [row_a()])
    with pytest.raises(InvalidArgumentError, match="no static cache"):
        model.generate(**given, max_new_tokens=2, cache_implementation="static")
    packed = torch.arange(57).repeat(4, 1, 1)
    packed[0, 0, 30:] -= 30
    packs = {**given, "attention_mask": None, "position_ids": packed}
    with pytest.raises(InvalidArgumentError, match="starts anew within a row"):
        model(**packs, use_cache=False)
    cache = model(**given, use_cache=True)[CACHE]
    cache.crop(-1)
    with pytest.raises(InvalidArgumentError, match=r"the cache was cut to \d+ columns"):
        model(input_ids=torch.tensor([[5]]), **{CACHE: cache})


def test_a_cache_that_was_emptied_can_be_filled_again() -> None:
    model = patched(qwen25(), threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    first = model(**given, use_cache=True)
    first[CACHE].crop(-first[CACHE].get_seq_length())
    again = model(**given, **{CACHE: first[CACHE]})
    torch.testing.assert_close(again.logits, first.logits)
    cache = again[CACHE]
    cache.crop(-cache.get_seq_length())
    text, last = torch.arange(3, 60)[None], torch.full((3, 1, 1), 56)
    model(input_ids=text[:, :-1], **{CACHE: cache})
    found = model(input_ids=text[:, -1:], attention_mask=torch.ones_like(text), **{CACHE: cache}, position_ids=last)
    model.model.rope_deltas = None
    torch.testing.assert_close(found.logits[:, -1], model(input_ids=text).logits[:, -1])

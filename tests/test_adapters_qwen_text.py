"""`rlt.patch` on Qwen-VL models: logits, loss and gradients against unpatched models of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rlt
from qwen_inputs import (
    BARE,
    BATCHES,
    MERGE,
    PATCH,
    THRESHOLD,
    VIDEO,
    Row,
    clip,
    every_batch,
    every_family,
    inputs_of,
    naive_mask,
    patched,
    qwen25,
    real_part,
    row_a,
    row_c,
    std_of,
    twin_of,
    twins_of,
)
from rlt import Everything, Random

# Nothing dropped


@every_family
@every_batch
@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_dropped_is_the_unpatched_model(make: Callable[..., Any], batch: str, side: str) -> None:
    model = make()
    given = inputs_of(model, BATCHES[batch](), side=side)
    before = model(**given).logits
    patched(model, rule=Everything())
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
    patched(model, rule=Everything())

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
    masks = [naive_mask(one, std=std_of(model)) for row in rows for one in row.frames]
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
    model = patched(qwen25(), rule=Random())
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


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_labels_that_are_shifted_already_lose_the_same_columns(make: Callable[..., Any], side: str) -> None:
    """As trainers that cut sequences among devices shift them; wanted of a token is the next that stays."""
    model = patched(make(), threshold=THRESHOLD)
    given = inputs_of(model, BATCHES["mixed"](), side=side)
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)  # of placeholders, too
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    expected = model(**given, labels=labels).loss
    assert model.rlt.last.share_kept < 1
    torch.testing.assert_close(model(**given, labels=labels, shift_labels=shifted).loss, expected)

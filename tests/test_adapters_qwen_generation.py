"""`generate` of patched Qwen-VL models: caches, beams, second turns, against loops by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlt
from qwen_inputs import (
    BATCHES,
    CACHE,
    THRESHOLD,
    Row,
    Twin,
    clip,
    every_batch,
    every_family,
    inputs_of,
    patched,
    qwen25,
    row_a,
    row_b,
    twin_of,
    twins_of,
)
from rlt.errors import MissingDependencyError

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
@pytest.mark.parametrize("assistant", ["itself", "unpatched", "patched"])
@torch.no_grad()
def test_an_assistant_changes_nothing(make: Callable[..., Any], assistant: str) -> None:
    """The first call has the prompt and its candidates at once, and some of those are refused."""
    model, other = patched(make(), threshold=THRESHOLD), make()
    helper = {"itself": model, "unpatched": other, "patched": other}[assistant]
    if assistant == "patched":
        patched(other, threshold=THRESHOLD)
    given = inputs_of(model, [row_a()])
    expected = model.generate(**given, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**given, max_new_tokens=12, do_sample=False, assistant_model=helper), expected)


@every_family
@torch.no_grad()
def test_prompts_may_come_as_embeddings(make: Callable[..., Any]) -> None:
    model = make()
    given = inputs_of(model, [row_a()])
    embeds = {name: value for name, value in given.items() if name != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(given["input_ids"])
    text = {"inputs_embeds": embeds["inputs_embeds"][:, :3]}
    options = {"max_new_tokens": 6, "do_sample": False}
    before = [model.generate(**text, **options), model.generate(**embeds, **options)]
    patched(model, rule=rlt.Everything())
    assert torch.equal(model.generate(**text, **options), before[0])
    assert torch.equal(model.generate(**embeds, **options), before[1])
    patched(model, threshold=THRESHOLD)
    assert torch.equal(model.generate(**text, **options), before[0])
    found = model.generate(**embeds, **options)
    assert model.rlt.last.share_kept < 1
    assert torch.equal(found, model.generate(**embeds, **options, use_cache=False))
    ids = model.generate(**given, **options)
    assert torch.equal(model.generate(**given, inputs_embeds=embeds["inputs_embeds"], **options), ids)


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
    monkeypatch.setattr("rlt.adapters.interface.version", lambda _name: "5.9.1")
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

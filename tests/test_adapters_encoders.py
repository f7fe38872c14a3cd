"""`rlt.patch` on image encoders of transformers with random weights, against unpatched ones and a frame-by-frame twin.

The twin runs frames one after the other through the encoder's own layers. It keeps the input of every layer of each
place as it was when the place last changed, and takes over only rows of what changed. Which patches changed is decided
here, patch by patch.

Shape legend: F frames, L places of a frame, E tokens of the prefix, D width.
"""

from __future__ import annotations

import copy
import pickle
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import rlt
from adapted_models import spread
from rlt import Budget, Everything, Random, Threshold, UniformFrames
from rlt.adapters import tiny
from rlt.adapters.encoders import encoder_inputs
from rlt.errors import InvalidArgumentError

transformers = pytest.importorskip("transformers", minversion="5.24")

PATCH, SIDE, THRESHOLD = 8, 4, 0.1
SIZE = tiny.Size(width=32, depth=3, heads=4, mlp_width=64, image_size=PATCH * SIDE, patch_size=PATCH)
NORMS = ("post_layernorm", "layernorm", "norm")
every_kind = pytest.mark.parametrize("kind", tiny.ENCODERS)


def build(kind: str, **more: Any) -> Any:
    return spread(tiny.build(kind, SIZE, **more))


def stack(num_frames: int = 6, *, still: float = 0.6, seed: int = 0) -> Tensor:
    """Frames [F, 3, h, w] in which this share of the patches repeats the frame before."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_frames, 3, PATCH * SIDE, PATCH * SIDE, generator=generator)
    for number in range(1, num_frames):
        repeats = torch.rand(SIDE, SIDE, generator=generator) < still
        place = repeats.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
        frames[number] = torch.where(place, frames[number - 1], frames[number])
    return frames


def run(model: Any, frames: Tensor, **more: Any) -> Any:
    return model(**encoder_inputs(model, frames), **more)


def tensors(output: Any) -> list[Tensor]:
    return [value for value in output.values() if isinstance(value, Tensor)]


def assert_same(output: Any, expected: Any, atol: float = 1e-5) -> None:
    assert output.keys() == expected.keys()
    for found, wanted in zip(tensors(output), tensors(expected), strict=True):
        torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-5)


def changed_places(frames: Tensor) -> list[list[int]]:
    """By the definition of the rule, for tubelets of one frame."""
    found = [list(range(SIDE * SIDE))]
    for before, now in pairwise(frames):
        cells = (now - before).abs().unflatten(2, (SIDE, PATCH)).unflatten(1, (SIDE, PATCH)).mean((0, 2, 4))
        found.append([place for place, difference in enumerate(cells.flatten().tolist()) if difference > THRESHOLD])
    return found


@torch.no_grad()
def twin_states(model: Any, frames: Tensor, places_of: list[list[int]]) -> list[Tensor]:
    """Inputs of all layers and the output of the last, each [F, E + L, D], a frame at a time."""
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    memory: list[Tensor] = []
    found: list[list[Tensor]] = []
    for frame, places in zip(frames, places_of, strict=True):
        dense = run(model, frame[None], output_hidden_states=True)  # its first state is what the layers get
        x = dense.hidden_states[0][0]
        prefix = len(x) - SIDE * SIDE
        rows = torch.tensor([*range(prefix), *(prefix + place for place in places)], dtype=torch.long)
        positions = {}
        if hasattr(model, "rope_embeddings"):
            positions["position_embeddings"] = model.rope_embeddings(frame[None])
        if not memory:
            memory = [state[0] for state in dense.hidden_states]
        memory = [state.clone() for state in memory]
        memory[0][rows] = x[rows]
        for number, layer in enumerate(layers):
            arguments = positions if "internvl" in type(layer).__module__ else {"attention_mask": None, **positions}
            memory[number + 1][rows] = layer(memory[number][None], **arguments)[0][rows]
        found.append(memory)
    return [torch.stack(states) for states in zip(*found, strict=True)]


@every_kind
@torch.no_grad()
def test_nothing_dropped_gives_the_unpatched_encoder(kind: str) -> None:
    model, frames = build(kind), stack()
    expected = run(model, frames, output_hidden_states=True)
    rlt.patch(model, rule=Everything())
    output = run(model, frames, output_hidden_states=True)
    assert_same(output, expected)
    for found, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    rlt.patch(model, threshold=0)
    noise = torch.randn(4, 3, PATCH * SIDE, PATCH * SIDE, generator=torch.Generator().manual_seed(1))
    patched = run(model, noise)
    assert model.rlt.last.share_kept == 1
    assert_same(patched, run(rlt.unpatch(model), noise))


@every_kind
@torch.no_grad()
def test_equals_the_twin_frame_by_frame(kind: str) -> None:
    model, frames = build(kind), stack()
    places = changed_places(frames)
    expected = twin_states(model, frames, places)
    norm = next((getattr(model, name) for name in NORMS if hasattr(model, name)), None)
    features = expected[-1] if norm is None or kind == "clip" else norm(expected[-1])
    rlt.patch(model, threshold=THRESHOLD)
    output = run(model, frames, output_hidden_states=True)
    for found, wanted in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.last_hidden_state, features, atol=1e-5, rtol=1e-4)
    assert [mask.flatten().nonzero()[:, 0].tolist() for mask in model.rlt.last.mask[0]] == places
    assert 0 < model.rlt.last.share_kept < 0.8


@every_kind
@torch.no_grad()
def test_a_clip_that_stands_still_gives_the_outputs_of_the_unpatched_encoder(kind: str) -> None:
    model, frames = build(kind), stack(1).expand(4, -1, -1, -1)
    expected = run(model, frames)
    rlt.patch(model).rlt.check()
    assert_same(run(model, frames), expected)
    assert model.rlt.last.num_kept == (SIDE * SIDE,)


@every_kind
def test_gradients_are_those_of_the_unpatched_encoder(kind: str) -> None:
    """With nothing dropped, and for a clip that stands still, where each token is computed once and counted often."""
    model = build(kind).train()
    weights = torch.randn(4, 1, SIZE.width, generator=torch.Generator().manual_seed(5))
    for frames, rule in ((stack(4), Everything()), (stack(1).expand(4, -1, -1, -1), Threshold())):
        model.zero_grad()
        torch.manual_seed(3)  # DINOv3 draws how far positions are scaled
        (run(model, frames).last_hidden_state * weights).sum().backward()
        theirs = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        model.zero_grad()
        rlt.patch(model, rule=rule)
        torch.manual_seed(3)
        (run(model, frames).last_hidden_state * weights).sum().backward()
        rlt.unpatch(model)
        for name, parameter in model.named_parameters():
            if name in theirs:
                torch.testing.assert_close(parameter.grad, theirs[name], atol=1e-4, rtol=1e-3, msg=name)


def test_checkpointed_layers_find_their_own_call_again() -> None:
    model, first, second = rlt.patch(build("siglip"), threshold=THRESHOLD).train(), stack(4, seed=3), stack(5, seed=4)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        sum(run(model, frames).last_hidden_state.square().sum() for frames in (first, second)).backward()
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-4, rtol=1e-3, msg=name)


def test_training_drops_the_same_paths_for_the_same_seed() -> None:
    model, frames = build("dinov2", drop_path_rate=0.5).train(), stack()
    torch.manual_seed(7)
    expected = run(model, frames).last_hidden_state
    rlt.patch(model, rule=Everything())
    torch.manual_seed(7)
    torch.testing.assert_close(run(model, frames).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
    dropping = rlt.patch(build("clip", attention_dropout=0.1)).train()
    with pytest.raises(InvalidArgumentError, match=r"dropout=0\.1"):
        run(dropping, frames)


@torch.no_grad()
def test_clips_of_a_batch_do_not_touch_each_other() -> None:
    model = rlt.patch(build("clip"), threshold=THRESHOLD, frames_per_clip=3)
    one, other = stack(3, seed=1), stack(3, seed=2)
    together = run(model, torch.cat([one, other])).last_hidden_state
    alone = [run(model, frames).last_hidden_state for frames in (one, other)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_sizes_that_encoders_were_not_made_for() -> None:
    """Positions are interpolated, or turned, as in the unpatched encoder; what a patch does not divide is left out."""
    frames = torch.cat([stack(), stack(seed=1)[..., : PATCH + 3]], 3)
    for kind, more in (("siglip", {"interpolate_pos_encoding": True}), ("dinov2", {}), ("dinov3", {})):
        model = build(kind)
        expected = run(model, frames, **more).last_hidden_state
        rlt.patch(model, rule=Everything())
        torch.testing.assert_close(run(model, frames, **more).last_hidden_state, expected, atol=1e-5, rtol=1e-5)
        assert model.rlt.last.mask.shape == (1, 6, SIDE, SIDE + 1)


@torch.no_grad()
def test_uint8_frames_are_normalised_as_the_model_was_trained() -> None:
    frames = torch.randint(0, 256, (3, 3, PATCH * SIDE, PATCH * SIDE), dtype=torch.uint8)
    frames[2] = frames[1]
    for kind in ("siglip", "siglip2", "clip", "dinov3", "smolvlm"):
        model = build(kind)
        rlt.patch(model)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.rlt.spec.mean, model.rlt.spec.std))
        output = run(model, frames)
        assert model.rlt.last.num_kept == (2 * SIDE * SIDE,)
        assert_same(output, run(rlt.unpatch(model), (frames / 255 - mean) / std))


@torch.no_grad()
def test_patches_that_are_padding_are_left_out() -> None:
    """As SigLIP 2's processor gives pictures that are not square: 12 patches, and 4 that are none."""
    model, frames = build("siglip2"), stack()[..., : 3 * PATCH]
    given = encoder_inputs(model, frames)
    noise = torch.randn(6, 4, 3 * PATCH**2, generator=torch.Generator().manual_seed(2))
    given["pixel_values"] = torch.cat([given["pixel_values"], noise], 1)
    given["pixel_attention_mask"] = torch.nn.functional.pad(given["pixel_attention_mask"], (0, 4))
    expected = model(**given, output_hidden_states=True)
    rlt.patch(model, rule=Everything())
    for arguments, kwargs in (((), given), (tuple(given.values()), {})):
        output = model(*arguments, **kwargs, output_hidden_states=True)
        assert model.rlt.last.mask.shape == (1, 6, SIDE, 3)
        torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
        states = zip(
            (output.last_hidden_state, *output.hidden_states),
            (expected.last_hidden_state, *expected.hidden_states),
            strict=True,
        )
        for found, wanted in states:
            assert found.shape == wanted.shape
            torch.testing.assert_close(found[:, :12], wanted[:, :12], atol=1e-5, rtol=1e-5)
    still = {name: value[:1].expand(4, *[-1] * (value.ndim - 1)) for name, value in given.items()}
    rlt.patch(model)
    pooled = model(**still).pooler_output
    assert model.rlt.last.num_kept == (12,)
    torch.testing.assert_close(pooled, expected.pooler_output[:1].expand(4, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "dinov3"])
@torch.no_grad()
def test_autocast_and_half_precision(kind: str) -> None:
    model, frames = build(kind), stack()
    expected = run(model, frames).last_hidden_state
    rlt.patch(model, rule=Everything())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(model, frames).last_hidden_state.float(), expected, atol=0.3, rtol=0.1)
    half = copy.deepcopy(model).bfloat16()
    rounded = run(half, frames.bfloat16()).last_hidden_state
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, atol=0.3, rtol=0.1)


@torch.no_grad()
def test_unpatched_copied_and_pickled() -> None:
    model, frames = build("dinov2"), stack()
    before, state = run(model, frames), {name: value.clone() for name, value in model.state_dict().items()}
    rlt.patch(model, threshold=THRESHOLD)
    patched = run(model, frames).last_hidden_state
    assert not torch.equal(patched, before.last_hidden_state)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, frames).last_hidden_state, patched)
        assert other.rlt.model is other
    rlt.unpatch(model)
    assert torch.equal(run(model, frames).last_hidden_state, before.last_hidden_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_a_call_that_another_thread_interrupts_raises() -> None:
    model, frames, started = rlt.patch(build("siglip"), threshold=THRESHOLD), stack(), threading.Event()

    def interrupt(*_: object) -> None:
        if not started.is_set():
            started.set()
            other = threading.Thread(target=lambda: run(model, frames.flip(0)))
            other.start()
            other.join()

    model.encoder.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(InvalidArgumentError, match="another thread called the patched model"):
        run(model, frames)


@torch.no_grad()
def test_options_hold() -> None:
    model, frames = build("siglip"), stack(still=0.9)
    rlt.patch(model, keep_ratio=0.5)
    run(model, frames)
    assert model.rlt.last.num_kept == (6 * SIDE * SIDE // 2,)
    with model.rlt.override(rule=UniformFrames(like=Budget(keep_ratio=0.5))):
        run(model, frames)
        assert model.rlt.last.mask[0].flatten(1).all(1).sum() == 3


@torch.no_grad()
def test_bad_calls_are_told() -> None:
    model, frames = rlt.patch(build("clip")), stack()
    with pytest.raises(InvalidArgumentError, match=r"shape \[1, 6, 3, 32, 32\]"):
        run(model, frames[None])
    with pytest.raises(InvalidArgumentError, match=r"\[frames, 3, height, width\] is needed"):
        run(model, frames[:, :1])
    with model.rlt.override(frames_per_clip=4), pytest.raises(InvalidArgumentError, match="frames_per_clip=4"):
        run(model, frames)
    with pytest.raises(InvalidArgumentError, match="bool_masked_pos is set"):
        run(rlt.patch(build("dinov2")), frames, bool_masked_pos=torch.ones(6, 16, dtype=torch.bool))
    with pytest.raises(InvalidArgumentError, match=r"tokens of Random.* stand for no others"):
        rlt.patch(build("clip"), rule=Random())
    model = rlt.patch(build("siglip2"))
    given = encoder_inputs(model, frames)
    for shapes in ([[4, 3], *[[4, 4]] * 5], [[4, 5]] * 6):
        with pytest.raises(InvalidArgumentError, match=r"spatial_shapes are \[\(4, "):
            model(**{**given, "spatial_shapes": torch.tensor(shapes)})
    with pytest.raises(InvalidArgumentError, match="pixel_attention_mask has more patches than spatial_shapes say, 12"):
        model(**{**given, "spatial_shapes": torch.tensor([[4, 3]] * 6)})
    given["pixel_attention_mask"][2, -1] = 0
    with pytest.raises(InvalidArgumentError, match="pixel_attention_mask is set"):
        model(**given)
    model = rlt.patch(build("dinov2"))
    model.set_attn_implementation("eager")
    with pytest.raises(InvalidArgumentError, match="attention of the patched model was set to 'eager'"):
        run(model, frames)
    model = rlt.patch(build("siglip"))
    model.encoder.layers[1] = build("siglip").encoder.layers[1]  # frames would see each other
    with pytest.raises(InvalidArgumentError, match="2 of 3 layers used packed attention; transformers"):
        run(model, frames)


WORDS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**WORDS, "vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PICTURE = {**WORDS, "num_hidden_layers": 2, "image_size": PATCH * SIDE, "patch_size": PATCH}
IMAGE, FRAMES = 60, 4


def text(tokens: int) -> Tensor:
    return torch.tensor([[3, 4, *[IMAGE] * tokens, 5, 6]])


def siglip() -> tuple[Any, dict[str, Any]]:
    config = transformers.SiglipConfig(text_config={**TEXT, "max_position_embeddings": 8}, vision_config=PICTURE)
    return transformers.SiglipModel(config), {"input_ids": torch.tensor([[3, 4, 5]])}


def clip() -> tuple[Any, dict[str, Any]]:
    config = transformers.CLIPConfig(
        text_config={**TEXT, "max_position_embeddings": 8}, vision_config=PICTURE, projection_dim=16
    )
    return transformers.CLIPModel(config), {"input_ids": torch.tensor([[3, 4, 2]])}


def clip_projection() -> tuple[Any, dict[str, Any]]:
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**PICTURE, projection_dim=16)), {}


def dinov2_classifier() -> tuple[Any, dict[str, Any]]:
    fields = {name: value for name, value in PICTURE.items() if name != "intermediate_size"}
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**fields, num_labels=5)), {}


def llava_onevision() -> tuple[Any, dict[str, Any]]:
    config = transformers.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**PICTURE, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=61,
        video_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64]],
    )
    pooled = 4 * FRAMES + 1  # of each frame a quarter of its patches, and one token that ends the video
    return transformers.LlavaOnevisionForConditionalGeneration(config), {"input_ids": text(pooled)}


def internvl() -> tuple[Any, dict[str, Any]]:
    picture = {**PICTURE, "image_size": [32, 32], "patch_size": [8, 8], "model_type": "internvl_vision"}
    config = transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2"}, vision_config=picture, image_token_id=IMAGE
    )
    return transformers.InternVLForConditionalGeneration(config), {"input_ids": text(4 * FRAMES)}


def smolvlm() -> tuple[Any, dict[str, Any]]:
    config = transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config=PICTURE, image_token_id=IMAGE, scale_factor=2
    )
    return transformers.SmolVLMForConditionalGeneration(config), {"input_ids": text(4 * FRAMES)}


def gemma3() -> tuple[Any, dict[str, Any]]:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 8},
        vision_config={**PICTURE, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )
    return transformers.Gemma3ForConditionalGeneration(config), {"input_ids": text(4 * FRAMES)}


AROUND = [siglip, clip, clip_projection, dinov2_classifier, llava_onevision, internvl, smolvlm, gemma3]


@pytest.mark.parametrize("make", AROUND)
@torch.no_grad()
def test_within_a_bigger_model(make: Any) -> None:
    """Everything behind the encoder runs unchanged: nothing dropped, and a video that stands still."""
    torch.manual_seed(0)
    model, given = make()
    model.eval()
    for frames in (stack(FRAMES, seed=2), stack(1).expand(FRAMES, -1, -1, -1)):
        videos = {"pixel_values": frames}
        if make is llava_onevision:
            videos = {"pixel_values_videos": frames[None]}
        elif make is smolvlm:
            videos = {"pixel_values": frames[None]}
        before = model(**given, **videos)
        rlt.patch(model, rule=Everything())
        outputs = [model(**given, **videos)]
        rlt.patch(model, threshold=THRESHOLD)
        if torch.equal(frames[0], frames[1]):
            outputs.append(model(**given, **videos))
            assert model.rlt.last.num_kept == (SIDE * SIDE,)
        rlt.unpatch(model)
        for output in outputs:
            for found, expected in zip(tensors(output), tensors(before), strict=True):
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [llava_onevision, internvl, smolvlm, gemma3])
@torch.no_grad()
def test_what_a_bigger_model_generates(make: Any) -> None:
    """A video that stands still, of which one frame goes through the tower, is answered as by the unpatched model."""
    torch.manual_seed(0)
    model, given = make()
    frames = stack(1).expand(FRAMES, -1, -1, -1)
    name = "pixel_values_videos" if make is llava_onevision else "pixel_values"
    given[name] = frames if make in (internvl, gemma3) else frames[None]
    told = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.eval().generate(**given, **told)
    rlt.patch(model, threshold=THRESHOLD)
    assert torch.equal(model.generate(**given, **told), expected)
    assert model.rlt.last.num_kept == (SIDE * SIDE,)


@torch.no_grad()
def test_videos_of_a_bigger_model_do_not_touch_each_other_and_its_images_go_through_whole() -> None:
    model, _ = llava_onevision()
    rlt.patch(model.eval(), threshold=THRESHOLD)
    videos = torch.stack([stack(FRAMES, seed=1), stack(FRAMES, seed=2)])
    features = model.model.get_video_features(videos).pooler_output
    assert model.rlt.last.mask.shape == (2, FRAMES, SIDE, SIDE)
    assert model.rlt.last.mask[:, 0].all()
    for video, found in zip(videos, features, strict=True):
        alone = model.model.get_video_features(video[None]).pooler_output[0]
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)
    tiles = stack(1).expand(3, -1, -1, -1)[None]
    model.model.get_image_features(tiles, image_sizes=torch.tensor([[32, 64]]))
    assert model.rlt.last.share_kept == 1
    out = model(input_ids=torch.tensor([[3, 4, 5]]))  # text alone asks no encoder
    assert torch.isfinite(out.logits).all()


def test_models_without_one_known_encoder_are_refused() -> None:
    class LlavaModel(transformers.LlavaModel):  # type: ignore[misc]
        pass

    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**PICTURE, "model_type": "pixtral"}
    )
    with pytest.raises(InvalidArgumentError, match=r"has 0 encoders that rlt\.patch knows, and needs one: Siglip"):
        rlt.patch(LlavaModel(config))

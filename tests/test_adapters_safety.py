"""What could go wrong silently with a patched model: settings changed under it, copies elsewhere, odd input."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlt
from adapted_models import CLASSIFIERS, IDS, PATCH, SIZE, build, clips, output_of, videomae, vivit, vjepa2
from rlt import Everything, UniformFrames, assets
from rlt.errors import InvalidArgumentError

transformers = pytest.importorskip("transformers")


def test_a_pickle_works_in_a_process_that_has_patched_nothing(tmp_path: Path) -> None:
    model, frames = rlt.patch(videomae()), clips()
    logits = output_of(model, frames)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    torch.save((frames, logits.detach()), tmp_path / "call.pt")
    script = (
        "import pickle, sys, torch\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[1])\n"
        "model = pickle.loads((folder / 'model.pkl').read_bytes())\n"
        "frames, logits = torch.load(folder / 'call.pt')\n"
        "torch.testing.assert_close(model(frames).logits, logits)\n"
        "assert model.rlt.last.num_kept == (52, 40, 28)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
def test_choosing_another_attention_is_an_error_until_patched_again(make: Any) -> None:
    model, frames = rlt.patch(make()), clips()
    logits = output_of(model, frames)
    model.set_attn_implementation("eager")
    with pytest.raises(InvalidArgumentError, match="attention of the patched model was set to 'eager'"):
        output_of(model, frames)
    torch.testing.assert_close(output_of(rlt.patch(model), frames), logits)
    assert rlt.unpatch(model).config._attn_implementation == "eager"  # the user's choice outlives the patch


def test_models_that_share_a_configuration_are_not_patched_at_once() -> None:
    first = videomae()
    second = build(type(first), first.config)
    frames = clips()
    before = output_of(second, frames)
    rlt.patch(first)
    torch.testing.assert_close(output_of(second, frames), before)  # unpatched beside a patched one
    with pytest.raises(InvalidArgumentError, match="shares its configuration with a patched model"):
        rlt.patch(second)
    rlt.unpatch(first)
    assert output_of(rlt.patch(second), frames).shape == before.shape


def test_a_refused_patch_of_the_whole_leaves_its_patched_part_alone() -> None:
    model, frames = videomae(), clips()
    rlt.patch(model.videomae)
    logits = output_of(model, frames)
    with pytest.raises(InvalidArgumentError, match=r"VideoMAEEmbeddings\.forward is overridden"):
        rlt.patch(model)
    assert torch.equal(output_of(model, frames), logits)
    rlt.unpatch(model.videomae)
    assert not torch.equal(output_of(model, frames), logits)


def test_subclasses_are_known_and_namesakes_are_not() -> None:
    class Own(transformers.VideoMAEForVideoClassification):  # type: ignore[misc]
        pass

    class VideoMAEModel(nn.Module):
        pass

    model = rlt.patch(build(Own, videomae().config))
    assert output_of(model, clips()).shape == (3, 5)
    with pytest.raises(
        InvalidArgumentError, match=r"model is a VideoMAEModel of test_adapters_safety; rlt\.patch knows"
    ):
        rlt.patch(VideoMAEModel())
    with pytest.raises(
        InvalidArgumentError, match=r"model is a VideoMAEForPreTraining of transformers; rlt\.patch knows"
    ):
        rlt.patch(build(transformers.VideoMAEForPreTraining, videomae().config))


def test_what_wraps_a_known_model_is_told_by_name() -> None:
    with pytest.raises(InvalidArgumentError, match=r"patch it before torch.compile: rlt.patch\(model._orig_mod\)"):
        rlt.patch(torch.compile(videomae()))
    with pytest.raises(InvalidArgumentError, match=r"patch what it wraps: rlt.patch\(model.model\)"):
        rlt.patch(SimpleNamespace(model=videomae()))  # as a pipeline has it


def test_pictures_that_are_not_square() -> None:
    frames = torch.randn(2, 8, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    frames[:, :, :, :16] = frames[:, :1, :, :16]
    for make in (videomae, vivit):
        try:
            model = make(image_size=[32, 48])
        except TypeError:  # ViViT of transformers 5.0 takes one number only
            continue
        before = output_of(model, frames)
        rlt.patch(model, rule=Everything())
        torch.testing.assert_close(output_of(model, frames), before, atol=2e-5, rtol=1e-5)
        rlt.patch(model).rlt.check()
        output_of(model, frames)
        assert model.rlt.last.mask.shape == (2, 4, 4, 6)
        assert not model.rlt.last.mask[:, 1:, :2].any()
        assert model.rlt.last.mask[:, 1:, 2:].all()
    oblong = vivit(tubelet_size=[2, 8, 16])
    with pytest.raises(InvalidArgumentError, match=r"patches of 8x16 pixels; rlt\.patch needs square ones"):
        output_of(rlt.patch(oblong), clips())


@pytest.mark.parametrize("make", [videomae, vivit, vjepa2], ids=["videomae", "vivit", "vjepa2"])
def test_sizes_that_the_patch_does_not_divide(make: Any) -> None:
    """Raw errors of torch, where the unpatched model leaves out the rest."""
    odd = replace(SIZE, image_size=38, num_frames=8 if make is vjepa2 else 9)
    frames = torch.randn(2, odd.num_frames, 3, 38, 38, generator=torch.Generator().manual_seed(3))
    frames[:, :, :, :16] = frames[:, :1, :, :16]
    model = make(size=odd)
    before = output_of(model, frames)
    rlt.patch(model, rule=Everything())
    torch.testing.assert_close(output_of(model, frames), before, atol=2e-5, rtol=1e-5)
    rlt.patch(model).rlt.check()
    output_of(model, frames)
    assert model.rlt.last.mask.shape == (2, 4, 4, 4)
    assert not model.rlt.last.mask[:, 1:, :2].any()


@pytest.mark.parametrize(
    ("make", "mean", "std"),
    [
        (videomae, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (vjepa2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (vivit, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
    ids=["videomae", "vjepa2", "vivit"],
)
def test_bytes_are_normalised_as_the_family_does(make: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """The values are those of transformers' own processors of these models."""
    clip = rlt.read_clip(assets.path("traffic.mp4"), num_frames=8, frame_stride=4, size=32)
    frames = clip.frames.permute(0, 3, 1, 2)[None]
    floats = (frames.float() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    model = rlt.patch(make())
    from_bytes = output_of(model, frames)
    mask = rlt.keep_mask(clip.frames[None], patch_size=PATCH)  # in one unit, whatever the model divides by
    assert torch.equal(model.rlt.last.mask, mask)
    assert 0 < model.rlt.last.share_kept < 1
    with model.rlt.override(rule=Everything()):
        torch.testing.assert_close(output_of(model, frames), output_of(model, floats), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output_of(model, floats), from_bytes, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.rlt.last.mask, mask)


@pytest.mark.parametrize("name", ["traffic.mp4", "animation.mp4"])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_the_rule_on_bytes_is_that_of_keep_mask_on_every_entry(name: str, threshold: float) -> None:
    clip = rlt.read_clip(assets.path(name), num_frames=8, size=32)
    for make in (videomae, vivit):
        model = rlt.patch(make(), threshold=threshold)
        output_of(model, clip.frames.permute(0, 3, 1, 2)[None])
        expected = rlt.keep_mask(clip.frames[None], threshold=threshold, patch_size=PATCH)
        assert torch.equal(model.rlt.last.mask, expected)


def test_uniform_frames_keeps_whole_time_steps() -> None:
    model, frames = rlt.patch(videomae(), rule=UniformFrames(), expand="fill"), clips()
    assert output_of(model, frames).shape == (3, 5)
    per_step = model.rlt.last.mask.flatten(2).sum(2)  # "rlt" keeps 52, 40 and 28 of 4 steps with 16 tokens
    assert per_step.tolist() == [[16, 16, 16, 0], [16, 0, 16, 0], [16, 0, 16, 0]]


def test_frames_that_are_no_numbers_show_in_the_outputs() -> None:
    for options in ({}, {"keep_ratio": 0.5}, {"max_tokens": 20}):
        model, frames = rlt.patch(videomae(), **options), clips()
        frames[1, 5, 0, 20, 9] = torch.nan
        logits = output_of(model, frames)
        assert torch.isnan(logits[1]).all()
        assert torch.isfinite(logits[::2]).all()
        assert model.rlt.last.mask[:, 0].all()


def test_attention_weights_are_refused_and_tuples_are_filled() -> None:
    model, frames = videomae(), clips()
    model.set_attn_implementation("eager")
    assert len(model(frames, output_attentions=True).attentions) == 2
    rlt.patch(model, expand="fill")
    # transformers 5.0 gives None here, which nobody can take for weights.
    for return_dict in () if transformers.__version__.startswith("5.0.") else (True, False):
        with pytest.raises(InvalidArgumentError, match="output_attentions is set"):
            model(frames, output_attentions=True, return_dict=return_dict)
    as_object = model(frames, output_hidden_states=True)
    logits, states = model(frames, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, as_object.logits)
    assert [state.shape for state in states] == [(3, 64, 32)] * 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, as_object.hidden_states, strict=True))


def test_vjepa2_repeats_a_single_frame_as_the_model_does() -> None:
    model, frames = vjepa2(), clips()[:, :1]
    before = output_of(model, frames)
    torch.testing.assert_close(output_of(rlt.patch(model), frames), before, atol=2e-5, rtol=1e-5)
    assert model.rlt.last.num_kept == (16, 16, 16)


def test_a_patched_model_saves_what_an_unpatched_one_saves(tmp_path: Path) -> None:
    model = vjepa2()
    model.save_pretrained(tmp_path / "before")
    output_of(rlt.patch(model), clips())
    model.save_pretrained(tmp_path / "patched")  # what a training run leaves behind
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes(), file.name
    loaded = type(model).from_pretrained(tmp_path / "patched")
    assert loaded.config._attn_implementation != "rlt_packed"
    assert not hasattr(loaded, "rlt")


def test_filling_and_pooling_weighs_each_token_by_its_run() -> None:
    """Against the definition: the mean over the grid is the mean over kept tokens weighted by `rlt.run_lengths`."""
    model, frames = videomae("VideoMAEModel"), clips()
    rlt.patch(model, expand="fill")
    filled: Tensor = output_of(model, frames)
    mask = model.rlt.last.mask
    weights = rlt.run_lengths(mask).split(model.rlt.last.num_kept)
    for clip, kept, weight in zip(filled, mask.flatten(1), weights, strict=True):
        weighted = (clip[kept] * weight[:, None]).sum(0) / weight.sum()
        torch.testing.assert_close(clip.mean(0), weighted, atol=1e-5, rtol=1e-5)


def test_a_copy_of_a_patched_model_can_be_patched_and_unpatched_by_itself() -> None:
    model, frames = rlt.patch(vjepa2()), clips()
    logits = output_of(model, frames)
    twin = copy.deepcopy(model)
    rlt.patch(twin, rule=Everything())
    assert torch.equal(output_of(model, frames), logits)
    rlt.unpatch(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(output_of(model, frames), logits)


@pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("options", [{}, {"keep_ratio": 0.5}], ids=["other lengths", "other places"])
def test_layers_that_run_anew_in_the_backward_pass_find_their_own_clips(
    make: Any, reentrant: bool, options: dict[str, Any]
) -> None:
    """Two calls before one backward pass, as in training on two views: same token totals, other clip boundaries."""
    first = clips()
    second = first.flip(0) if not options else torch.randn(first.shape, generator=torch.Generator().manual_seed(5))
    found = []
    for checkpointing in (False, True):
        model = rlt.patch(make(), **options).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = output_of(model, first).square().sum() + output_of(model, second).square().sum()
        kept = model.rlt.last.num_kept
        loss.backward()
        assert model.rlt.last.num_kept == kept
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("make", CLASSIFIERS, ids=IDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_call_that_another_thread_interrupts_raises(make: Any, compiled: bool) -> None:
    """Of 800 calls from 4 threads 52 were silently wrong: as many tokens in all, split otherwise among the clips."""
    patched, frames = rlt.patch(make()), clips()
    if compiled:
        torch.compiler.reset()
    model = torch.compile(patched, backend="eager") if compiled else patched
    with torch.no_grad():
        reversed_logits = output_of(model, frames.flip(0))
    layer = patched.rlt.attention_modules()[1]
    found: list[Tensor] = []

    @torch.compiler.disable
    @torch.no_grad()
    def interrupt(_module: nn.Module, _inputs: object) -> None:
        if done:
            return
        done.append(True)
        other = threading.Thread(target=lambda: found.append(output_of(model, frames.flip(0))))
        other.start()
        other.join()

    done: list[bool] = []
    layer.register_forward_pre_hook(interrupt)
    with torch.no_grad(), pytest.raises(InvalidArgumentError, match="another thread called the patched model"):
        output_of(model, frames)
    torch.testing.assert_close(found[0], reversed_logits)  # the one that came between is right
    with torch.no_grad():
        torch.testing.assert_close(output_of(model, frames).flip(0), reversed_logits)


def test_threads_may_take_turns() -> None:
    model, frames = rlt.patch(videomae()), clips()
    logits = output_of(model, frames)
    found: list[Tensor] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(output_of(model, frames)))
        thread.start()
        thread.join()
        found.append(output_of(model, frames))
    assert all(torch.equal(other, logits) for other in found)
    with model.rlt.aside():
        output_of(model, frames)

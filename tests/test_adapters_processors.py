"""Patched models behind transformers' own processors, which need torchvision, and in its pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlt
from optional_packages import import_or_skip
from rlt import Everything, assets
from rlt.tokens import PatchView

import_or_skip("torchvision")
transformers = import_or_skip("transformers")
if not hasattr(transformers, "Qwen3VLVideoProcessor") or not hasattr(transformers, "VideoMAEVideoProcessor"):
    pytest.skip("transformers is too old for video processors of these models", allow_module_level=True)

import adapted_models as classifiers  # noqa: E402
import qwen_inputs as qwen  # noqa: E402

SIDE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
THRESHOLD = 0.1
Statistics = tuple[float, float, float]
HALVES: Statistics = (0.5, 0.5, 0.5)
IMAGENET: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def real_frames(name: str = "traffic.mp4", num_frames: int = 8) -> Tensor:
    """uint8 [frames, 3, 32, 32]."""
    frames = rlt.read_clip(assets.path(name), num_frames=num_frames, frame_stride=2, size=32).frames
    return frames.permute(0, 3, 1, 2).contiguous()


def processed(processor: Any, frames: Tensor) -> dict[str, Tensor]:
    clip = [list(frames.numpy())] if "Image" in type(processor).__name__ else [frames]
    return dict(processor(clip, return_tensors="pt"))


# VivitImageProcessor() centres, and then normalises what is centred: 0..255 becomes -3..1.
PROCESSORS = {
    "VideoMAEVideoProcessor": (classifiers.videomae, HALVES, HALVES),
    "VideoMAEImageProcessor": (classifiers.videomae, HALVES, HALVES),
    "VivitImageProcessor": (classifiers.vivit, (0.75, 0.75, 0.75), (0.25, 0.25, 0.25)),
    "VJEPA2VideoProcessor": (classifiers.vjepa2, *IMAGENET),
}


@pytest.mark.parametrize("name", PROCESSORS)
@torch.no_grad()
def test_the_rule_behind_a_processor_is_that_on_bytes(name: str) -> None:
    make, mean, std = PROCESSORS[name]
    frames, processor = real_frames(), getattr(transformers, name)(**SIDE, do_resize=False)
    given = processed(processor, frames)
    model = rlt.patch(make(), threshold=THRESHOLD, pixel_mean=mean, pixel_std=std)
    logits = model(**given).logits
    mask = model.rlt.last.mask
    assert 0 < model.rlt.last.share_kept < 0.9
    from_bytes = model(frames[None]).logits
    pixels = next(iter(given.values()))
    differences = PatchView(pixels, model.rlt.spec).differences
    clear = torch.ones_like(mask)
    clear[:, 1:] = (differences - THRESHOLD).abs() > 1e-5
    assert clear.float().mean() > 0.95
    assert torch.equal(mask[clear], model.rlt.last.mask[clear])
    if bool(clear.all()):
        torch.testing.assert_close(logits, from_bytes, atol=1e-4, rtol=1e-4)


def test_a_processor_found_by_the_automatic_class(tmp_path: Path) -> None:
    transformers.VideoMAEVideoProcessor(**SIDE).save_pretrained(tmp_path)
    processor = transformers.AutoVideoProcessor.from_pretrained(tmp_path)
    model = rlt.patch(classifiers.videomae())
    still = real_frames()[:1].expand(8, -1, -1, -1)
    model(**processed(processor, still.repeat_interleave(2, 2).repeat_interleave(3, 3)))  # scaled and cropped
    assert model.rlt.last.num_kept == (16,)


@torch.no_grad()
def test_the_pipeline_says_what_the_model_says() -> None:
    processor = transformers.VideoMAEImageProcessor(**SIDE)
    model = rlt.patch(classifiers.videomae())
    classify = transformers.pipeline("video-classification", model=model, image_processor=processor)
    said = classify(str(assets.path("traffic.mp4")), num_frames=8, frame_sampling_rate=2, top_k=5)
    assert 0 < model.rlt.last.share_kept < 1
    rlt.unpatch(model)
    dense = classify(str(assets.path("traffic.mp4")), num_frames=8, frame_sampling_rate=2, top_k=5)
    assert [entry["score"] for entry in said] != [entry["score"] for entry in dense]
    rlt.patch(model, rule=Everything())
    same = classify(str(assets.path("traffic.mp4")), num_frames=8, frame_sampling_rate=2, top_k=5)
    assert [entry["label"] for entry in same] == [entry["label"] for entry in dense]
    torch.testing.assert_close([entry["score"] for entry in same], [entry["score"] for entry in dense])


# Qwen-VL: rows, placeholders and timestamps as the real processors make them


def tokenizer() -> Any:
    """Of a dozen words, with the ids that the small models know."""
    words = import_or_skip("tokenizers")
    special = {
        "<|vision_start|>": qwen.START,
        "<|image_pad|>": qwen.IMAGE,
        "<|video_pad|>": qwen.VIDEO,
        "<|vision_end|>": qwen.END,
    }
    known = {"<pad>": 0, "what": 5, "happens": 6, "<": 7, ">": 8, "seconds": 9, "[UNK]": 10}
    found = words.Tokenizer(words.models.WordLevel(known | special, unk_token="[UNK]"))
    found.pre_tokenizer = words.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>")
    fast.add_tokens(list(special), special_tokens=True)
    return fast


FAMILIES = {
    "Qwen2VLProcessor": (qwen.qwen2, "Qwen2VLVideoProcessor"),
    "Qwen2_5_VLProcessor": (qwen.qwen25, "Qwen2VLVideoProcessor"),
    "Qwen3VLProcessor": (qwen.qwen3, "Qwen3VLVideoProcessor"),
}


def asked(name: str, frames: Tensor) -> dict[str, Tensor]:
    """What the processor gives for a question about these frames."""
    sizes = {"patch_size": qwen.PATCH, "temporal_patch_size": qwen.TUBELET, "merge_size": qwen.MERGE}
    as_they_are = {"do_sample_frames": False, "do_resize": False, "cap_pixels_per_frame": True}
    processor = getattr(transformers, name)(
        image_processor=transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer=tokenizer(),
        video_processor=getattr(transformers, FAMILIES[name][1])(**sizes, **as_they_are),
    )
    count = len(frames)
    times = {"total_num_frames": count, "fps": 4.0, "frames_indices": list(range(count)), "duration": count / 4}
    metadata = [transformers.video_utils.VideoMetadata(**times)]
    text = "what <|vision_start|><|video_pad|><|vision_end|> happens"
    return dict(processor(text=[text], videos=[frames], video_metadata=metadata, return_tensors="pt"))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_qwen_model_takes_what_its_processor_gives(name: str) -> None:
    frames, model = real_frames("animation.mp4"), FAMILIES[name][0]()
    given = asked(name, frames)
    statistics = getattr(transformers, FAMILIES[name][1])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (statistics.image_mean, statistics.image_std))
    pixels = (frames / 255 - mean) / std
    rows, grid = qwen.patchify(pixels)
    torch.testing.assert_close(given["pixel_values_videos"], rows, atol=1e-5, rtol=1e-5)
    assert given["video_grid_thw"].tolist() == [grid]
    dense = model(**given).logits
    answer = model.generate(**given, max_new_tokens=4, do_sample=False)
    rlt.patch(model, rule=Everything())
    torch.testing.assert_close(model(**given).logits, dense, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), answer)
    rlt.patch(model, threshold=THRESHOLD)
    fewer = model(**given).logits
    mask = model.rlt.last.masks[0]
    assert torch.equal(mask, qwen.naive_mask(pixels, std=qwen.std_of(model)))
    dropped = int((~mask).sum())
    assert 0 < dropped < mask.numel()
    assert fewer.shape[1] == dense.shape[1] - dropped
    longer = model.generate(**given, max_new_tokens=4, do_sample=False)
    assert int(longer[0, -4]) == int(fewer[0, -1].argmax())
    assert torch.equal(longer[:, :-4], given["input_ids"])

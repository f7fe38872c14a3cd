"""Suite of the models that `rlt.patch` knows: the unpatched model beside the patched one, on the same real clips.

Shape legend: B clips, L columns of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rlt.adapters import patch
from rlt.adapters.interface import import_transformers
from rlt.benchmark.harness import BenchmarkResult, BenchmarkSettings, Rounds, Work, read_frames, threshold_of
from rlt.benchmark.peers.padded import naive_attention
from rlt.errors import MissingDependencyError
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD

WIDTH, DEPTH, HEADS = 384, 12, 6
"""Of all models, that of ViT-S, and of the language model behind a tower too; weights are random."""
VIDEO, START, END, VOCABULARY = 1000, 1001, 1002, 1024
"""Of the language models: what stands for a token of a video, what stands around it, and how many words there are."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALVES = (0.5, 0.5, 0.5)


class Case(NamedTuple):
    """One family of models."""

    build: Callable[[Any, BenchmarkSettings], nn.Module]
    """From its library and the settings. AttributeError if that version of it has no such model."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """What the family's processor takes, on the scale 0..1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """As above."""
    inputs: Callable[[nn.Module, Tensor], dict[str, Tensor]] = lambda _, pixels: {"pixel_values": pixels}
    """(model, normalised float [B, frames, 3, height, width]) -> arguments of a call."""
    library: Callable[[], Any] = import_transformers
    """What `build` is given."""
    images: bool = False
    """Whether the model takes images and gives logits per frame."""


def adapters_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Clips -> logits: "dense" the model as it comes, "rlt" patched, for each model that can be patched.

    Beside the times, the largest difference of logits where nothing is dropped ("identity"), from the same packed
    tokens with attention written out by its formula ("naive_twin"), and between clips that go through the patched model
    together and one by one ("one_by_one"). Models that the installed libraries do not have, or have too old for the
    adapter, are named in "left_out".
    """
    frames = read_frames(settings)
    works: list[Work] = []
    differences: dict[str, dict[str, float]] = {}
    left_out: list[str] = []
    for name, case in CASES.items():
        try:
            model, patched = (_build(case, settings) for _ in range(2))
            per_clip = settings.clip.num_frames if case.images else None
            patch(patched, threshold=threshold_of(settings.rule), frames_per_clip=per_clip)
        except (AttributeError, MissingDependencyError):
            left_out.append(name)
            continue
        pixels = _normalise(frames, case).to(settings.device, settings.dtype)
        differences[name] = _differences(case, model, patched, pixels)
        given, kept = case.inputs(model, pixels), patched.rlt.last.share_kept
        for arm, network, share in (("dense", model, 1.0), ("rlt", patched, kept)):
            flops = _count_flops(patched, given, "none" if arm == "dense" else "rlt")
            works.append(Work(arm, partial(network, **given), share, flops, {"model": name}))
    arms = rounds.measure(works, settings.rounds or 3, settings.device)
    extra = {"largest_differences": differences, "left_out": left_out}
    return BenchmarkResult("adapters", settings, arms, "dense", extra)


def _build(case: Case, settings: BenchmarkSettings) -> Any:
    """The same weights every time."""
    torch.manual_seed(0)
    return case.build(case.library(), settings).to(settings.device, settings.dtype).eval()


def _normalise(frames: Tensor, case: Case) -> Tensor:
    mean_311, std_311 = (torch.tensor(channel).view(3, 1, 1) for channel in (case.mean, case.std))
    return (frames.permute(0, 1, 4, 2, 3) / 255 - mean_311) / std_311


@torch.no_grad()
def _differences(case: Case, model: Any, patched: Any, pixels: Tensor) -> dict[str, float]:
    given, batch = case.inputs(model, pixels), len(pixels)
    with patched.rlt.override(policy="none"):
        whole = _logits(patched(**given), batch)
    with _naive_attention(patched):
        naive = _logits(patched(**given), batch)
    alone = [_logits(patched(**case.inputs(model, clip[None])), 1)[0] for clip in pixels]
    together = _logits(patched(**given), batch)  # the last call, whose record is kept

    def largest(others: Tensor | list[Tensor]) -> float:
        # Language models pad rows in which more was dropped, on the left; what stands there means nothing.
        rows = zip(together, others, alone, strict=True)
        return max(float((row[-len(one) :] - other[-len(one) :]).abs().max()) for row, other, one in rows)

    identity = float((whole - _logits(model(**given), batch)).abs().max())
    return {"identity": identity, "naive_twin": largest(naive), "one_by_one": largest(alone)}


@contextmanager
def _naive_attention(patched: Any) -> Iterator[None]:
    """Attention by its formula: ours, or for models whose own attention runs that of transformers' plainest kind."""
    adapter = patched.rlt
    if hasattr(adapter, "attention"):
        adapter.attention = naive_attention
        try:
            yield
        finally:
            del adapter.attention
    else:
        before = patched.config._attn_implementation
        patched.set_attn_implementation("eager")
        try:
            yield
        finally:
            patched.set_attn_implementation(before)


def _logits(output: Any, batch: int) -> Tensor:
    """[B, ..., classes]; image models give rows of all frames."""
    logits: Tensor = output.unflatten(0, (batch, -1)) if isinstance(output, Tensor) else output.logits
    return logits


def _import_timm() -> Any:
    """The package; no other module imports it.

    Raises:
        MissingDependencyError: if it cannot be imported. It needs torchvision, which fails with a RuntimeError beside a
            torch that it was not built for.
    """
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(f"timm cannot be imported ({error}); install it with: pip install timm") from error
    return timm


def _count_flops(patched: Any, given: dict[str, Tensor], policy: str) -> int:
    """Of the patched model, whose attention is counted on every device; torch counts that of others on some only."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={kernel: _attention_flops})
    with patched.rlt.override(policy=policy), counter, torch.no_grad():
        patched(**given)
    return int(counter.get_total_flops())


def _attention_flops(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


# Small random networks of each family

_MLP = {"intermediate_size": 4 * WIDTH}


def _shape() -> dict[str, int]:
    return {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}


def _videomae(transformers: Any, settings: BenchmarkSettings) -> Any:
    clip = {"num_frames": settings.clip.num_frames, "image_size": settings.clip.size}
    return transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**_shape(), **clip, **_MLP))


def _vivit(transformers: Any, settings: BenchmarkSettings) -> Any:
    clip = {"num_frames": settings.clip.num_frames, "image_size": settings.clip.size}
    return transformers.VivitForVideoClassification(transformers.VivitConfig(**_shape(), **clip, **_MLP))


def _vjepa2(transformers: Any, settings: BenchmarkSettings) -> Any:
    small = {"pred_hidden_size": 192, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 6}
    clip = {"frames_per_clip": settings.clip.num_frames, "crop_size": settings.clip.size, "num_pooler_layers": 1}
    return transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**_shape(), **clip, **small))


def _timm_vit(timm: Any, settings: BenchmarkSettings) -> Any:
    shape = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return timm.models.vision_transformer.VisionTransformer(img_size=settings.clip.size, **shape)


def _qwen25(transformers: Any, _: BenchmarkSettings) -> Any:
    whole = [layer for layer in range(DEPTH) if layer % 3 == 2]  # the others attend within windows
    vision = {**_tower(), "fullatt_block_indexes": whole}
    config = transformers.Qwen2_5_VLConfig(text_config=_text([8, 12, 12]), vision_config=vision, **_WORDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3(transformers: Any, _: BenchmarkSettings) -> Any:
    vision = {**_tower(), "deepstack_visual_indexes": [layer for layer in range(DEPTH - 1) if layer % 3 == 2]}
    config = transformers.Qwen3VLConfig(text_config=_text([12, 10, 10]), vision_config=vision, **_WORDS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def _tower() -> dict[str, int]:
    return {"num_heads": HEADS, "depth": DEPTH, "hidden_size": WIDTH, "out_hidden_size": WIDTH, **_MLP}


_WORDS = {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END, "image_token_id": 1003}


def _text(sections: list[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    heads = {"num_key_value_heads": HEADS, "head_dim": WIDTH // HEADS}
    words = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {**_shape(), **_MLP, **heads, **words, "rope_parameters": rope}


def _question(model: Any, pixels: Tensor, *, by_step: bool = False) -> dict[str, Tensor]:
    """What the processor of a Qwen-VL model gives for a question after each clip.

    Args:
        model: whose patch and merge sizes count.
        pixels: normalised float [B, frames, 3, height, width]; what is beyond whole merge groups is cut off.
        by_step: whether each time step has its own start and end in the text.
    """
    vision = model.config.vision_config
    patch_size, tubelet, merge = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
    batch, frames, channels, *sides = pixels.shape
    time, height, width = frames // tubelet, *(side // (patch_size * merge) for side in sides)
    pixels = pixels[..., : height * patch_size * merge, : width * patch_size * merge]
    cut = pixels.reshape(batch, time, tubelet, channels, height, merge, patch_size, width, merge, patch_size)
    rows = cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(batch * time * height * width * merge**2, -1)
    parts = time if by_step else 1
    video = [START, *[VIDEO] * (time // parts * height * width), END] * parts
    ids_BL = torch.tensor([1, 2, *video, 3, 4, 5], device=pixels.device).expand(batch, -1)
    return {
        "input_ids": ids_BL,
        "mm_token_type_ids": 2 * (ids_BL == VIDEO).long(),
        "pixel_values_videos": rows,
        "video_grid_thw": torch.tensor([[time, height * merge, width * merge]] * batch, device=pixels.device),
    }


CASES: dict[str, Case] = {
    "VideoMAE": Case(_videomae),
    "ViViT": Case(_vivit, HALVES, HALVES),
    "V-JEPA 2": Case(_vjepa2, inputs=lambda _, pixels: {"pixel_values_videos": pixels}),
    "Qwen2.5-VL": Case(_qwen25, CLIP_MEAN, CLIP_STD, _question),
    "Qwen3-VL": Case(_qwen3, HALVES, HALVES, partial(_question, by_step=True)),
    "timm ViT, per frame": Case(
        _timm_vit, HALVES, HALVES, lambda _, pixels: {"x": pixels.flatten(0, 1)}, _import_timm, images=True
    ),
}
"""By the name that tables show."""

"""Suite of models as large as the published ones, patched and unpatched, with random weights on real clips.

Shape legend: as `rlt.benchmark.adapted`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from rlt.adapters import patch, tiny
from rlt.benchmark.adapted import count_flops
from rlt.benchmark.harness import Arm, BenchmarkResult, BenchmarkSettings, Rounds, Work, normalised_pixels, read_frames
from rlt.checks import one_of
from rlt.tokens import Everything


class Tower(NamedTuple):
    """A family of `rlt.adapters.tiny` and how large it is."""

    family: str
    width: int
    depth: int
    heads: int
    mlp_width: int
    fields: Mapping[str, Any] = MappingProxyType({})
    """What else its published configuration says."""


_QWEN25_7B = {
    "text_config": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "head_dim": 128,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"intermediate_size": 3420, "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]},
}
_QWEN3_8B = {
    "text_config": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 12288,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]},
    },
    "vision_config": {"intermediate_size": 4304, "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
}
TOWERS = {
    "videomae_base": Tower("videomae", 768, 12, 12, 3072),
    "videomae_large": Tower("videomae", 1024, 24, 16, 4096),
    "vjepa2_large": Tower("vjepa2", 1024, 24, 16, 4096),
    "vjepa2_giant": Tower("vjepa2", 1408, 40, 22, 6144),
    "qwen2.5_vl_7b": Tower("qwen2.5", 1280, 32, 16, 3420, _QWEN25_7B),
    "qwen3_vl_8b": Tower("qwen3", 1152, 27, 16, 4304, _QWEN3_8B),
    **{f"{family}_tiny": Tower(family, 96, 3, 4, 192) for family in ("videomae", "vjepa2", "qwen2.5", "qwen3")},
}
"""Values of `model` in this suite; the tiny ones rehearse it."""


def towers_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Clips -> logits of one model of `TOWERS`: "dense" as it comes, "rlt" patched, which share their weights.

    Of language models the call is a prefill (logits of the last column) of video and five words, and their towers are
    timed alone, too ("part" in the arms). "largest_difference" is of the logits where nothing is dropped.
    """
    one_of(TOWERS, model=settings.model)
    model = build_tower(settings)
    patched = _sharing_weights(model)
    patch(patched, rule=settings.rule)
    pixels = normalised_pixels(read_frames(settings), patched.rlt.spec).to(settings.device, settings.dtype)
    given = tiny.inputs(model, pixels)
    language = "input_ids" in given
    if language:
        given |= {"use_cache": True, "logits_to_keep": 1}  # type: ignore[dict-item]
    everything = Everything()
    with torch.no_grad():
        with patched.rlt.override(rule=everything):
            whole = patched(**given).logits
        difference = float((whole - model(**given).logits).abs().max())
        patched(**given)  # the last call, whose record is kept
    kept = patched.rlt.last.share_kept
    works: list[Work] = []
    for name, network, rule in (("dense", model, everything), ("rlt", patched, settings.rule)):
        with patched.rlt.override(rule=rule):
            flops = count_flops(partial(patched, **given))
        share = 1.0 if name == "dense" else kept
        works.append((Arm(name, share, flops, {"part": "prefill" if language else "model"}), partial(network, **given)))
    if language:
        rows, grids = given["pixel_values_videos"], given["video_grid_thw"]
        towers: dict[str, Callable[[], object]] = {
            "dense": lambda: model.model.visual(rows, grid_thw=grids),
            "rlt": lambda: patched.rlt.encode(rows, grids, patched.rlt.choose(rows, grids)),
        }
        for name, run in towers.items():
            works.append((Arm(name, 1.0 if name == "dense" else kept, count_flops(run), {"part": "tower"}), run))
    arms = rounds.measure(works, settings.rounds or 5, settings.device)
    return BenchmarkResult("towers", settings, arms, "dense", {"largest_difference": difference})


def build_tower(settings: BenchmarkSettings) -> Any:
    """The model, made where and in the precision in which it runs: eight billion weights of float32 are 32 GB."""
    tower, clip = TOWERS[settings.model], settings.clip
    size = tiny.Size(*tower[1:5], clip.num_frames, clip.frame_size[0])
    with torch.device(settings.device), _default_dtype(settings.dtype):
        return tiny.build(tower.family, size, **tower.fields)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _sharing_weights(model: Any) -> Any:
    """A copy whose parameters and buffers are those of the model."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})

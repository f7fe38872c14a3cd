"""What only a GPU can show: precisions, compiling, CUDA graphs, waits and memory. No video is decoded."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adapted_models import CLASSIFIERS, IDS, clips, output_of
from models import random_pack, tiny, video
from rlt.adapters import patch
from rlt.benchmark import SUITES, BenchmarkSettings, networks, run_suite
from rlt.measure import device_waits, peak_memory_bytes
from rlt.tokens import Everything, Threshold
from rlt.video import ClipSpec

pytestmark = pytest.mark.gpu
HALVES = {torch.float16: 0.005, torch.bfloat16: 0.03}
"""Largest distance from the same in float64, over its length."""


def distance(found: Tensor, expected: Tensor) -> float:
    found = found.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("run_lengths", ["aware", "ignored"])
def test_half_precision_is_near_float64_with_gradients(run_lengths: str, dtype: torch.dtype, autocast: bool) -> None:
    model = tiny(run_lengths=run_lengths)
    packed = random_pack(0, 5)
    expected = copy.deepcopy(model).double()
    logits = expected(packed)
    logits.square().sum().backward()
    model.to("cuda", torch.float32 if autocast else dtype)
    with torch.autocast("cuda", dtype, enabled=autocast):
        found = model(packed.to("cuda"))
    found.float().square().sum().backward()
    assert distance(found, logits.detach()) < HALVES[dtype]
    for name in ("patch_embed.weight", "blocks.0.attn.qkv.weight", "head.weight"):
        ours, theirs = model.get_parameter(name).grad, expected.get_parameter(name).grad
        assert ours is not None
        assert theirs is not None
        assert distance(ours, theirs) < 3 * HALVES[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_compiled_network_gives_the_same_for_any_number_of_tokens(dtype: torch.dtype) -> None:
    model = tiny().to("cuda", dtype)
    compiled = copy.deepcopy(model)
    compiled.compile_network()
    for seed in range(4):
        packed = random_pack(seed, 3 + seed).to("cuda")
        torch.testing.assert_close(compiled(packed).float(), model(packed).float(), atol=0.05, rtol=0.05)


def test_a_cuda_graph_gives_the_same() -> None:
    model, packed = tiny().to("cuda", torch.bfloat16), random_pack(0, 5).to("cuda")
    replay = networks._captured(model, packed)
    with torch.inference_mode():
        assert torch.equal(replay(packed), model(packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_waits_for_the_device(dtype: torch.dtype) -> None:
    model = tiny().train().to("cuda")
    packed = random_pack(0, 5).to("cuda")
    assert packed.has_runs
    optimizer = torch.optim.AdamW(model.parameters())
    settings = BenchmarkSettings(device="cuda", dtype=dtype)

    def step() -> None:
        networks.train_step(model, [packed], optimizer, settings)

    step()
    if dtype == torch.bfloat16:  # without flash kernels clips are split by lengths that the host knows, too
        assert device_waits(step, "cuda") == 0
    model.eval().to(dtype)
    with torch.inference_mode():
        model(packed)
        assert device_waits(lambda: model(packed), "cuda") == 0


def test_waits_are_seen() -> None:
    values = torch.ones(4, device="cuda")
    assert device_waits(lambda: values.sum().item(), "cuda") == 1


def test_a_pinned_pack_keeps_what_the_host_knows() -> None:
    packed = random_pack(0, 5)
    pinned = packed.changed(Tensor.pin_memory)
    assert pinned.patches.is_pinned()
    there = pinned.to("cuda", non_blocking=True)
    assert device_waits(lambda: there.has_runs, "cuda") == 0
    assert torch.equal(there.patches.cpu(), packed.patches)


def test_fewer_tokens_take_less_memory() -> None:
    model = tiny(width=192, num_heads=3, mlp_width=768).to("cuda", torch.bfloat16)
    frames = torch.stack([video(seed, frames=8, height=64, width=64) for seed in range(4)])
    peaks = []
    with torch.inference_mode():
        for rule in (Everything(), Threshold()):
            packed = model.tokenize(frames, rule=rule)
            model(packed)
            peaks.append(peak_memory_bytes(lambda packed=packed: model(packed), "cuda"))  # type: ignore[misc]
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("build", CLASSIFIERS, ids=IDS)
@torch.no_grad()
def test_patched_models_are_what_they_are_on_the_cpu(build: object) -> None:
    model = build()  # type: ignore[operator]
    patch(model, threshold=0.3)
    expected = output_of(model, clips())
    found = output_of(model.to("cuda"), clips().to("cuda"))
    assert model.rlt.last.share_kept < 1
    torch.testing.assert_close(found.cpu(), expected, atol=2e-3, rtol=2e-3)


def test_training_learns_on_the_gpu() -> None:
    model = tiny(num_classes=2).to("cuda")
    packed = random_pack(0, 2).to("cuda")
    labels = torch.tensor([0, 1], device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(packed).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert float(losses[-1]) < 0.5 * float(losses[0])


@pytest.mark.parametrize("suite", sorted(set(SUITES) - {"decode", "end-to-end", "loader"}))
def test_suites_run_on_frames_without_a_decoder(suite: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for name in ("a", "b"):
        frames = torch.cat([video(seed, frames=8, height=64, width=64) for seed in range(9)])
        np.save(tmp_path / f"{name}.npy", frames.numpy())
    settings = BenchmarkSettings(
        model="qwen3_tiny" if suite == "towers" else "vit_micro",
        clip=ClipSpec(8, 1, size=64),
        videos=(tmp_path / "a.npy", tmp_path / "b.npy"),
        clips=2,
        rounds=1,
        device="cuda",
        dtype=torch.bfloat16,
        compiled=suite == "forward",
        transformers=suite in ("forward", "train-step"),
    )
    numbers = run_suite(suite, settings).to_json()
    assert numbers["machine"]["driver"]  # type: ignore[index]
    arms = {arm["name"]: arm for arm in numbers["arms"]}  # type: ignore[union-attr]
    if suite in ("forward", "train-step"):
        assert arms["rlt"]["device_waits"] == 0
        assert "transformers" in arms
    assert numbers.get("values_that_differ", 0) == numbers.get("mask_entries_that_differ", 0) == 0

"""The fused kernels against the torch code on the CPU, bit for bit: in triton's interpreter, and on a GPU.

triton decides at its import whether kernels are interpreted. The tests on the CPU therefore run in a process of their
own, started by `test_in_the_interpreter`, and skip elsewhere; set TRITON_INTERPRET=1 to run them directly.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import rlt
from rlt import tokens
from rlt.errors import InvalidArgumentError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
MEMORY_MARK = 77


@pytest.fixture(params=["cpu", ON_GPU])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        pytest.importorskip("triton")
        if not INTERPRETED:
            pytest.skip("runs inside of test_in_the_interpreter")
    return request.param


@pytest.fixture
def kernels(device: str) -> ModuleType:
    from rlt.tokens import _cuda as _token_kernels

    return _token_kernels


def video(batch: int, num_frames: int, height: int, width: int, patch: int = 16, seed: int = 0) -> torch.Tensor:
    """uint8 [B, T, H, W, 3] in which patches repeat, change a little, or change a lot, each clip at its own rate."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (batch, num_frames, height, width, 3), dtype=np.uint8)
    for b in range(batch):
        for t in range(1, num_frames):
            still = rng.random((height // patch, width // patch)).repeat(patch, 0).repeat(patch, 1)[..., None]
            drift = np.clip(frames[b, t - 1].astype(int) + rng.integers(-9, 10), 0, 255).astype(np.uint8)
            again = 0.8 - 0.3 * b
            changed = np.where(still < again + 0.1, drift, frames[b, t])
            frames[b, t] = np.where(still < again, frames[b, t - 1], changed)
    return torch.from_numpy(frames)


def assert_equal_to_the_torch_code(found: Any, frames: torch.Tensor, rows: int | None = None, **sizes: Any) -> None:
    """Compare the first `rows` tokens (None: all, and no more rows than that)."""
    expected = rlt.tokens.tokenize_batch(frames.cpu(), **sizes)
    assert torch.equal(found.mask.cpu(), rlt.keep_mask(frames.cpu(), **sizes))
    assert found.counts.tolist() == [len(clip) for clip in expected]
    for name in ("patches", "coords", "lengths"):
        ours, theirs = getattr(found, name).cpu(), torch.cat([getattr(clip, name) for clip in expected])
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours[:rows], theirs[:rows])


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        command,
        env=environment | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("threshold", [0.0, 0.1])
@pytest.mark.parametrize(
    ("shape", "tubelet", "patch"),
    [
        ((1, 4, 32, 48), 1, 16),
        ((1, 8, 32, 48), 2, 16),
        ((2, 8, 32, 48), 4, 16),
        ((1, 4, 28, 42), 2, 14),
        ((1, 4, 28, 42), 1, 14),
        ((2, 3, 3, 5), 1, 1),
        ((2, 4, 8, 12), 2, 4),
        ((1, 2, 32, 48), 2, 16),
        ((1, 2, 40, 80), 1, 40),
    ],
)
def test_tokens_equal_the_torch_code(
    kernels: ModuleType, device: str, shape: tuple[int, int, int, int], tubelet: int, patch: int, threshold: float
) -> None:
    frames = video(*shape, patch=patch)
    found = kernels.tokenize_on_device(frames.to(device), threshold, tubelet, patch)
    assert found.sizes == tuple(found.counts.tolist())
    assert_equal_to_the_torch_code(found, frames, threshold=threshold, tubelet_size=tubelet, patch_size=patch)


def test_clips_with_different_counts(kernels: ModuleType, device: str) -> None:
    frames = video(3, 8, 32, 48)
    found = kernels.tokenize_on_device(frames.to(device))
    assert len(set(found.sizes)) == 3
    assert_equal_to_the_torch_code(found, frames)


def test_a_still_clip_and_noise(kernels: ModuleType, device: str) -> None:
    still = torch.full((1, 8, 32, 48, 3), 90, dtype=torch.uint8)
    found = kernels.tokenize_on_device(still.to(device), 0.0)
    assert found.sizes == (6,)
    assert found.lengths.tolist() == [4] * 6
    noise = torch.randint(0, 256, still.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = kernels.tokenize_on_device(noise.to(device))
    assert found.sizes == (24,)
    assert_equal_to_the_torch_code(found, noise)


def test_threshold_exactly_at_a_difference(kernels: ModuleType, device: str) -> None:
    frames = video(1, 4, 32, 48, seed=3)
    differences = tokens.token_differences(frames)
    values = [value for value in differences.unique().tolist() if value > 0]
    assert values
    for value in values:
        at = kernels.tokenize_on_device(frames.to(device), value)
        below = kernels.tokenize_on_device(frames.to(device), float(np.nextafter(value, 0.0)))
        assert int(at.counts) < int(below.counts)
        assert_equal_to_the_torch_code(at, frames, threshold=value)


def test_run_length_of_every_place(kernels: ModuleType, device: str) -> None:
    frames = video(2, 8, 32, 48)
    mask, lengths = kernels._mark(
        frames.to(device), 0.1, tokens.token_grid(frames.shape, tubelet_size=1), 1, 16, tokens.IMAGENET_STD
    )
    expected = torch.zeros(mask.shape, dtype=torch.int32)
    kept = rlt.keep_mask(frames, tubelet_size=1)
    expected[kept] = rlt.run_lengths(kept).int()
    assert torch.equal(lengths.cpu(), expected)


def test_another_std(kernels: ModuleType, device: str) -> None:
    frames, std = video(1, 4, 32, 48), (0.5, 0.25, 0.125)
    found = kernels.tokenize_on_device(frames.to(device), 0.05, std=std)
    assert torch.equal(found.mask.cpu(), rlt.keep_mask(frames, threshold=0.05, std=std))


def test_frames_with_any_strides(kernels: ModuleType, device: str) -> None:
    frames = video(2, 4, 32, 48).to(device)
    channels_first = frames.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    odd_offset = torch.cat([frames.new_zeros(1), frames.flatten()])[1:].view(frames.shape)
    wide = video(2, 8, 48, 64).to(device)
    views = [channels_first, odd_offset, wide[:, ::2, 8:40, 8:56], wide[:, :4, 1:33, 3:51], frames.flip(0), frames[:1]]
    for same in (*views, frames[:1].expand(3, -1, -1, -1, -1)):
        assert_equal_to_the_torch_code(kernels.tokenize_on_device(same), same)
    # Lines of a patch travel as words where the layout allows it, and as bytes where not.
    assert [kernels._widest(same, 16).element_size() for same in views[:4]] == [1, 1, 8, 1]


@pytest.mark.parametrize("capacity", [1, 7, 40, 48])
def test_capacity(kernels: ModuleType, device: str, capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = video(2, 8, 32, 48).to(device)
    needed = sum(kernels.tokenize_on_device(frames).sizes)
    assert 7 < needed < 40
    outputs, empty = [], torch.empty

    def marked(*shape: int, **options: Any) -> torch.Tensor:
        """Memory with marked rows behind the end of it."""
        if shape[0] != capacity:
            return empty(*shape, **options)
        outputs.append(torch.full((capacity + 4, *shape[1:]), MEMORY_MARK, **options))
        return outputs[-1][:capacity]

    monkeypatch.setattr(torch, "empty", marked)
    found = kernels.tokenize_on_device(frames, capacity=capacity)
    monkeypatch.undo()
    assert found.sizes == ()
    assert len(found.patches) == len(found.coords) == len(found.lengths) == capacity
    assert_equal_to_the_torch_code(found, frames, rows=min(capacity, needed))
    assert len(outputs) == 3
    assert all(bool((output[min(capacity, needed) :] == MEMORY_MARK).all()) for output in outputs)


def test_bad_arguments(kernels: ModuleType, device: str) -> None:
    frames = torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8, device=device)
    with pytest.raises(InvalidArgumentError, match="capacity is 0"):
        kernels.tokenize_on_device(frames, capacity=0)
    with pytest.raises(InvalidArgumentError, match="threshold is -1"):
        kernels.tokenize_on_device(frames, -1)
    with pytest.raises(InvalidArgumentError, match="patch_size=15"):
        kernels.tokenize_on_device(frames, patch_size=15)
    with pytest.raises(InvalidArgumentError, match=r"uint8 \[B, T, H, W, 3\]"):
        kernels.tokenize_on_device(frames.float())


def test_tokenize_uses_the_kernels(kernels: ModuleType, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = video(3, 8, 32, 48)
    expected = tokens.tokenize_batch(frames)
    calls = []

    def fused(*arguments: Any) -> Any:
        calls.append(arguments)
        return kernels.tokenize_on_device(*arguments)

    if device == "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    assert tokens._fused_tokenizer(frames.to(device).device) is kernels.tokenize_on_device
    monkeypatch.setattr(tokens, "_fused_tokenizer", lambda _: fused)
    found = tokens.tokenize_batch(frames.to(device))
    assert len(calls) == 1
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.grid == theirs.grid
        assert ours.patches.device.type == device
        for name in ("patches", "coords", "lengths"):
            assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name))
    assert len(tokens.tokenize_batch(frames.to(device), policy="none")) == 3
    assert len(calls) == 1


@pytest.mark.gpu
def test_host_waits_once_or_never() -> None:
    from rlt.tokens import _cuda as _token_kernels

    frames = video(3, 8, 32, 48).cuda()
    _token_kernels.tokenize_on_device(frames)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        _token_kernels.tokenize_on_device(frames, 0.2, capacity=100)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            _token_kernels.tokenize_on_device(frames, 0.3)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) == 1


@pytest.mark.gpu
def test_large_frames_on_the_gpu() -> None:
    from rlt.tokens import _cuda as _token_kernels

    frames = video(2, 16, 224, 224, seed=5)
    for tubelet, patch in ((1, 14), (2, 16), (2, 224)):
        found = _token_kernels.tokenize_on_device(frames.cuda(), 0.1, tubelet, patch)
        assert_equal_to_the_torch_code(found, frames, tubelet_size=tubelet, patch_size=patch)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(("patch", "number"), [(16, "i32"), (14, "i64")])
def test_kernels_compile_without_a_gpu(
    patch: int, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton", minversion="3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlt.tokens import _cuda as _token_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    strides = dict.fromkeys([f"stride_{axis}" for axis in "bthwc"], number)
    sizes = dict.fromkeys(["time", "height", "width"], "i32")
    constants = {"TUBELET": 2, "PATCH": patch, "BLOCK": 1024}
    marking = {"frames": "*u8", "threshold": "*fp64", "mask": "*u8", "lengths": "*i32"}
    scales = {"SCALE_0": 58.395, "SCALE_1": 57.12, "SCALE_2": 57.375}
    gathering = {"pixels": "*i16", "run_lengths": "*i32", "ranks": "*i64", "patches": "*i16", "coords": "*i64"}
    gathering |= {"lengths": "*i64", "capacity": "i32"}
    for kernel, arguments, fixed in (
        (_token_kernels._mark_kernel, marking, constants | scales),
        (_token_kernels._gather_kernel, gathering, constants | {"UNITS": patch * 3 // 2, "CHANNELS": 1}),
    ):
        types = arguments | sizes | strides | dict.fromkeys(fixed, "constexpr")
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, fixed)
        ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]
        assert ptx.count("div.rn.f64") == (4 if kernel is _token_kernels._mark_kernel else 0)
        assert "fma.rn.f64" not in ptx  # the order and rounding of the sums is that of torch


@pytest.mark.skipif(INTERPRETED, reason="kernels run anywhere in the interpreter")
def test_kernels_that_cannot_run_are_told() -> None:
    pytest.importorskip("triton")
    from rlt.tokens import _cuda as _token_kernels

    with pytest.raises(InvalidArgumentError, match="frames are on cpu; a CUDA device is needed"):
        _token_kernels.tokenize_on_device(torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8))
    with pytest.warns(RuntimeWarning, match="triton kernels do not run on cpu"):
        assert tokens._fused_tokenizer.__wrapped__(torch.device("cpu")) is None


def test_without_triton_the_torch_code_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(rlt, "_token_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "rlt.tokens._cuda", None)
    assert tokens._fused_tokenizer.__wrapped__(torch.device("cuda", 0)) is None


def test_tokens_on_the_cpu_import_no_kernels() -> None:
    code = (
        "import sys, torch, rlt; rlt.tokenize(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)); "
        "assert 'rlt.tokens._cuda' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert find_spec("rlt.tokens._cuda") is not None

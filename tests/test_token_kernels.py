"""The fused kernels against the torch code on the CPU, bit for bit: in triton's interpreter, and on a GPU.

triton decides at its import whether kernels are interpreted. The tests on the CPU therefore run in a process of their
own, started by `test_in_the_interpreter`, and skip elsewhere; set TRITON_INTERPRET=1 to run them directly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import rlt
from rlt import Budget, Everything, PatchSpec, Random, Rule, RunLengthTokens, Threshold, UniformFrames
from rlt.measure import device_waits
from rlt.tokens import differences

tokenize = import_module("rlt.tokens.tokenize")  # the package has a function of this name
Fused = Callable[..., list[RunLengthTokens]]
PAPER, SPEC = Threshold(), PatchSpec()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", ON_GPU])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        pytest.importorskip("triton")
        if not INTERPRETED:
            pytest.skip("runs inside of test_in_the_interpreter")
    return request.param


@pytest.fixture
def kernels(device: str) -> ModuleType:
    from rlt.tokens import _cuda

    return _cuda


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


@pytest.fixture
def fused(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[RunLengthTokens]]:
    """`tokenize_batch` by the kernels, wherever the frames are."""
    for module in (differences, tokenize):
        monkeypatch.setattr(module, "cuda_kernels", lambda _device: kernels)

    def run(frames: torch.Tensor, rule: Rule = PAPER, spec: PatchSpec = SPEC) -> list[RunLengthTokens]:
        return rlt.tokens.tokenize_batch(frames, rule, spec)

    return run


def by_torch(frames: torch.Tensor, rule: Rule = PAPER, spec: PatchSpec = SPEC) -> list[RunLengthTokens]:
    """The same by the torch code on the CPU."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (differences, tokenize):
            patched.setattr(module, "cuda_kernels", lambda _device: None)
        return rlt.tokens.tokenize_batch(frames.cpu(), rule, spec)


def assert_equal(found: list[RunLengthTokens], expected: list[RunLengthTokens]) -> None:
    assert [len(clip) for clip in found] == [len(clip) for clip in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.grid == theirs.grid
        for name in ("patches", "coords", "lengths"):
            one, other = getattr(ours, name).cpu(), getattr(theirs, name)
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


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
    fused: Fused, device: str, shape: tuple[int, int, int, int], tubelet: int, patch: int, threshold: float
) -> None:
    frames, spec = video(*shape, patch=patch), PatchSpec(tubelet, patch)
    assert_equal(fused(frames.to(device), Threshold(threshold), spec), by_torch(frames, Threshold(threshold), spec))


def test_clips_with_different_counts(fused: Fused, device: str) -> None:
    frames = video(3, 8, 32, 48)
    found = fused(frames.to(device))
    assert len({len(clip) for clip in found}) == 3
    assert_equal(found, by_torch(frames))


@pytest.mark.parametrize("rule", [Everything(), Random(), UniformFrames(), Budget(keep_ratio=0.5)], ids=repr)
def test_every_rule_gathers_by_the_kernels(fused: Fused, device: str, rule: Rule) -> None:
    frames = video(3, 8, 32, 48)
    assert_equal(fused(frames.to(device), rule), by_torch(frames, rule))


def test_a_still_clip_and_noise(fused: Fused, device: str) -> None:
    still = torch.full((1, 8, 32, 48, 3), 90, dtype=torch.uint8)
    found = fused(still.to(device), Threshold(0.0))[0]
    assert found.lengths.tolist() == [4] * 6
    noise = torch.randint(0, 256, still.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(fused(noise.to(device))[0]) == 24
    assert_equal(fused(noise.to(device)), by_torch(noise))


def test_threshold_exactly_at_a_difference(kernels: ModuleType, device: str) -> None:
    frames = video(1, 4, 32, 48, seed=3)
    values = [value for value in rlt.tokens.token_differences(frames).unique().tolist() if value > 0]
    assert values
    for value in values:
        at, below = (kernels.mark(frames.to(device), limit, SPEC) for limit in (value, float(np.nextafter(value, 0.0))))
        assert int(at.sum()) < int(below.sum())
        assert torch.equal(at.cpu(), rlt.keep_mask(frames, threshold=value))


def test_frames_with_any_strides(kernels: ModuleType, fused: Fused, device: str) -> None:
    frames = video(2, 4, 32, 48).to(device)
    channels_first = frames.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    odd_offset = torch.cat([frames.new_zeros(1), frames.flatten()])[1:].view(frames.shape)
    wide = video(2, 8, 48, 64).to(device)
    views = [channels_first, odd_offset, wide[:, ::2, 8:40, 8:56], wide[:, :4, 1:33, 3:51], frames.flip(0), frames[:1]]
    for same in (*views, frames[:1].expand(3, -1, -1, -1, -1)):
        assert_equal(fused(same), by_torch(same))
    # Lines of a patch travel as words where the layout allows it, and as bytes where not.
    assert [kernels._widest(same, 16).element_size() for same in views[:4]] == [1, 1, 8, 1]


@pytest.mark.gpu
def test_host_waits_once() -> None:
    frames = video(3, 8, 32, 48).cuda()
    rlt.tokens.tokenize_batch(frames, PAPER, SPEC)  # compiles
    assert device_waits(lambda: rlt.tokens.tokenize_batch(frames, Threshold(0.3), SPEC), "cuda") == 1


@pytest.mark.gpu
def test_large_frames_on_the_gpu() -> None:
    frames = video(2, 16, 224, 224, seed=5)
    for spec in (PatchSpec(1, 14), PatchSpec(2, 16), PatchSpec(2, 224)):
        assert_equal(rlt.tokens.tokenize_batch(frames.cuda(), PAPER, spec), by_torch(frames, PAPER, spec))


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize(("patch", "number"), [(16, "i32"), (14, "i64")])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_without_a_gpu(
    capability: int, patch: int, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton", minversion="3.3")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlt.tokens import _cuda

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    strides = dict.fromkeys([f"stride_{axis}" for axis in "bthwc"], number)
    sizes = dict.fromkeys(["time", "height", "width"], "i32")
    constants = {"TUBELET": 2, "PATCH": patch, "BLOCK": 1024}
    marking = {"frames": "*u8", "threshold": "*fp64", "mask": "*u8"}
    scales = {"SCALE_0": 58.395, "SCALE_1": 57.12, "SCALE_2": 57.375}
    gathering = {"pixels": "*i16", "mask": "*u8", "run_lengths": "*i64", "ranks": "*i64", "patches": "*i16"}
    gathering |= {"coords": "*i64", "lengths": "*i64"}
    for kernel, arguments, fixed in (
        (_cuda._mark_kernel, marking, constants | scales),
        (_cuda._gather_kernel, gathering, constants | {"UNITS": patch * 3 // 2, "CHANNELS": 1}),
    ):
        types = arguments | sizes | strides | dict.fromkeys(fixed, "constexpr")
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, fixed)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert compiled.asm["cubin"][:4] == b"\x7fELF"  # code of the GPU itself
        ptx = compiled.asm["ptx"]
        assert f".target sm_{capability}" in ptx
        assert ptx.count("div.rn.f64") == (4 if kernel is _cuda._mark_kernel else 0)
        assert "fma.rn.f64" not in ptx  # the order and rounding of the sums is that of torch


@pytest.mark.skipif(INTERPRETED, reason="kernels run anywhere in the interpreter")
def test_kernels_that_cannot_run_are_told() -> None:
    pytest.importorskip("triton")
    from rlt.tokens import _cuda

    with pytest.warns(RuntimeWarning, match="triton kernels do not run on cpu"):
        assert not _cuda.can_run(torch.device("cpu"))


def test_without_triton_the_torch_code_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(rlt.tokens, "_cuda", raising=False)
    monkeypatch.setitem(sys.modules, "rlt.tokens._cuda", None)
    assert differences.cuda_kernels.__wrapped__(torch.device("cuda", 0)) is None


def test_tokens_on_the_cpu_import_no_kernels() -> None:
    code = (
        "import sys, torch, rlt; rlt.tokenize(torch.zeros(2, 16, 16, 3, dtype=torch.uint8)); "
        "assert 'rlt.tokens._cuda' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert find_spec("rlt.tokens._cuda") is not None

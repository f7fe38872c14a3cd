"""Every attention back end against one big masked softmax; those that need a GPU in tests that skip without one."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

import oracles
from models import random_pack, tiny
from rlt.errors import InvalidArgumentError
from rlt.network import backends
from rlt.network.attention import packed_attention
from rlt.network.backends import FLEX_BLOCK, Backend, available_backends
from rlt.structures import Segments

MIXED = [(5,), (1, 7, 3), (1, 1, 30, 2), (127, 1, 128, 129), (1,)]
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}
OF_TORCH: tuple[Backend, ...] = ("sdpa", "varlen", "nested", "flex")


def random_qkv(lengths: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (sum(lengths), 3, 16)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def check_parity(backend: Backend, lengths: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    ours = random_qkv(lengths, dtype, device)
    theirs = [x.detach().double().cpu().requires_grad_() for x in ours]
    fast = packed_attention(*ours, Segments.from_lengths(lengths, device=device), backend=backend)
    naive = oracles.padded_attention(*theirs, lengths)
    assert (fast.dtype, fast.device.type, fast.shape) == (dtype, device, naive.shape)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(fast.double().cpu(), naive, atol=tolerance, rtol=tolerance)
    weight = torch.randn(naive.shape, generator=torch.Generator().manual_seed(9))
    (fast.float() * weight.to(device)).sum().backward()
    (naive * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double().cpu(), y.grad, atol=2 * tolerance, rtol=2 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", MIXED)
@pytest.mark.parametrize("backend", available_backends("cpu", torch.float32))
def test_parity_with_gradients_on_the_cpu(backend: Backend, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    check_parity(backend, lengths, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", MIXED)
@pytest.mark.parametrize("backend", get_args(Backend))
def test_parity_with_gradients_on_a_gpu(backend: Backend, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    if backend not in available_backends("cuda", dtype):
        assert backend not in OF_TORCH or (backend == "varlen" and dtype == torch.float32)
        pytest.skip(f"{backend} is not there for {dtype}")
    check_parity(backend, lengths, dtype, "cuda")


def test_what_is_available_on_the_cpu() -> None:
    assert available_backends("cpu", torch.float32) == ("sdpa", "nested")
    assert available_backends("cpu", torch.bfloat16) == ("sdpa", "nested")


@pytest.mark.parametrize(
    ("backend", "remedy"),
    [
        ("varlen", "float16 or bfloat16 on CUDA"),
        ("flash_attn", "float16 or bfloat16 on CUDA"),
        ("xformers", "float16 or bfloat16 on CUDA"),
        ("flex", "it needs CUDA"),
    ],
)
def test_a_request_that_cannot_be_met_names_the_remedy(backend: Backend, remedy: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"'{backend}' cannot run torch.float32 on cpu; .*{remedy}.*'sdpa'"):
        packed_attention(*random_qkv((4,), torch.float32), Segments.from_lengths((4,)), backend=backend)


def test_a_package_that_is_missing_or_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install flash-attn" in str(backends._package_hindrance("no_such_module", "flash-attn"))

    def broken(_name: str) -> ModuleType:
        raise OSError("libcudart.so is missing\nand more")

    monkeypatch.setattr(backends, "import_module", broken)
    found = backends._package_hindrance("package_built_for_another_torch", "xformers")
    assert found == "`pip install xformers` is needed (libcudart.so is missing)"


def test_gpus_before_ampere_run_no_flash_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert available_backends("cuda", torch.float16) == ("sdpa", "nested", "flex")


def test_the_choice_can_be_traced() -> None:
    def scale(x: Tensor) -> Tensor:
        return x * 2 if backends._runs_flash(torch.device("cpu")) else x

    traced = torch.compile(scale, backend="eager", fullgraph=True)
    assert torch.equal(traced(torch.ones(2)), scale(torch.ones(2)))


# Flex attention, whose mask can be seen without a GPU


@pytest.mark.parametrize("lengths", [*MIXED, (300, 2, 90), (FLEX_BLOCK, FLEX_BLOCK, 1)])
def test_flex_equals_the_naive_twin_without_its_compiler(lengths: tuple[int, ...]) -> None:
    q, k, v = (x.detach() for x in random_qkv(lengths, torch.float32))  # on the CPU there are no gradients
    found = backends._flex(q, k, v, Segments.from_lengths(lengths))
    torch.testing.assert_close(found, oracles.padded_attention(q, k, v, lengths), atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_blocks_are_computed_where_clips_meet_and_nowhere_else(lengths: list[int]) -> None:
    segments = Segments.from_lengths(lengths)
    mask = backends._block_mask(segments, segments.num_tokens)
    clip = [number for number, length in enumerate(lengths) for _ in range(length)]
    blocks = [set(clip[first : first + FLEX_BLOCK]) for first in range(0, len(clip), FLEX_BLOCK)]
    expected = [[int(bool(queries & keys)) for keys in blocks] for queries in blocks]
    assert mask.to_dense()[0, 0].tolist() == expected
    assert backends._block_mask(segments, segments.num_tokens) is mask


@torch.no_grad()
def test_flex_is_not_compiled_anew_for_every_length() -> None:
    graphs = CompileCounter()
    compiled = torch.compile(flex_attention, backend=graphs, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        lengths = torch.randint(1, 300, (int(torch.randint(1, 6, (1,), generator=generator)),), generator=generator)
        segments = Segments.from_lengths(lengths.tolist())
        x = torch.randn(1, 2, segments.num_tokens, 64)
        compiled(x, x, x, block_mask=backends._block_mask(segments, segments.num_tokens))
    assert graphs.frame_count <= 2  # one for packs of a single block


# Packages that run on a GPU alone: what they are given, seen by stand-ins with their signatures


def test_what_flash_attn_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest_q: int,
        longest_k: int,
        softmax_scale: float | None,
    ) -> Tensor:
        assert softmax_scale is None
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert torch.equal(cu_q, cu_k)
        lengths = cu_q.diff().tolist()
        assert longest_q == longest_k == max(lengths)
        return oracles.padded_attention(q, k, v, lengths)

    package = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(backends, "_import_optional", {"flash_attn": package}.__getitem__)
    check_stand_in(backends._flash_package)


def test_what_xformers_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(lengths: list[int], *, device: torch.device) -> list[int]:
            assert isinstance(lengths, list)
            assert device == torch.device("cpu")
            return lengths

    def memory_efficient_attention(
        q: Tensor, k: Tensor, v: Tensor, attn_bias: list[int], scale: float | None
    ) -> Tensor:
        assert q.shape[0] == 1
        assert scale is None
        return oracles.padded_attention(q[0], k[0], v[0], attn_bias)[None]

    operators = SimpleNamespace(
        fmha=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask), memory_efficient_attention=memory_efficient_attention
    )
    monkeypatch.setattr(backends, "_import_optional", {"xformers.ops": operators}.__getitem__)
    check_stand_in(backends._xformers)

    def without_kernels(*_: object, **__: object) -> Tensor:
        raise NotImplementedError("No operator found")

    operators.memory_efficient_attention = without_kernels
    with pytest.raises(InvalidArgumentError, match=r"xformers has no kernel for torch\.float32 on cpu; install one"):
        check_stand_in(backends._xformers)


@pytest.mark.parametrize("takes_scale", [False, True], ids=["torch 2.10", "torch 2.11"])
def test_what_varlen_attn_is_given(takes_scale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_of_2_10(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int
    ) -> Tensor:
        lengths = cu_q.diff().tolist()
        assert torch.equal(cu_q, cu_k)
        assert longest_q == longest_k == max(lengths)
        return oracles.padded_attention(q, k, v, lengths)

    def as_of_2_11(q: Tensor, *rest: Any, scale: float | None = None) -> Tensor:
        return as_of_2_10(q if scale is None else q * scale * q.shape[-1] ** 0.5, *rest)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_of_2_11 if takes_scale else as_of_2_10)
    check_stand_in(backends._varlen)
    q, k, v = random_qkv((4, 1, 6), torch.float32)
    bias_T = torch.arange(11.0)
    segments = Segments.from_lengths((4, 1, 6))
    expected = packed_attention(q, k, v, segments, backend="sdpa", key_bias_T=bias_T)
    torch.testing.assert_close(backends._varlen(q, k, v, segments, key_bias_T=bias_T), expected)


def check_stand_in(run: Any) -> None:
    q, k, v = random_qkv((4, 1, 6), torch.float32)
    found = run(q, k, v, Segments.from_lengths((4, 1, 6)))
    torch.testing.assert_close(found, oracles.padded_attention(q, k, v, (4, 1, 6)))


@torch.no_grad()
def test_a_network_runs_with_the_back_end_that_it_is_told() -> None:
    model, packed = tiny().eval(), random_pack(0, 5)
    expected = model(packed)
    model.attention_backend = "nested"
    torch.testing.assert_close(model(packed), expected, atol=1e-5, rtol=1e-5)

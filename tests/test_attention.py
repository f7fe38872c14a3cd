"""Packed attention against one big masked softmax, forward and backward, at mixed lengths."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import oracles
from rlt.errors import InvalidArgumentError
from rlt.network._clip_kernel import attention_per_clip
from rlt.network.attention import choose_backend, packed_attention, packed_cross_attention
from rlt.network.blocks import Block, mean_per_clip
from rlt.structures import Segments

MIXED = [(5,), (1, 7, 3), (4, 4, 4), (1, 1, 30, 2)]


def random_qkv(lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (sum(lengths), 3, 8)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("lengths", MIXED)
def test_equals_the_naive_twin_with_gradients(lengths: tuple[int, ...]) -> None:
    ours, theirs = random_qkv(lengths), random_qkv(lengths)
    fast = packed_attention(*ours, Segments.from_lengths(lengths))
    naive = oracles.padded_attention(*theirs, lengths)
    torch.testing.assert_close(fast, naive)
    weight = torch.randn(naive.shape, generator=torch.Generator().manual_seed(9), dtype=naive.dtype)
    (fast * weight).sum().backward()
    (naive * weight).sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_clips_do_not_see_each_other() -> None:
    q, k, v = (x.detach() for x in random_qkv((6, 4)))
    segments = Segments.from_lengths((6, 4))
    before = packed_attention(q, k, v, segments)
    k[6:], v[6:] = 100.0, -100.0
    after = packed_attention(q, k, v, segments)
    assert torch.equal(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])


def test_the_choice_of_back_end_can_be_asked_for() -> None:
    assert choose_backend("cpu", torch.bfloat16) == "sdpa"
    assert choose_backend("cuda", torch.float32) == "sdpa"
    assert choose_backend("cuda", torch.bfloat16) == "varlen"


def test_lengths_may_be_on_the_device_alone() -> None:
    q, k, v = (x.detach() for x in random_qkv((6, 4)))
    known = Segments.from_lengths((6, 4))
    assert (known.bound, known.host, len(known), known.num_tokens) == (6, (6, 4), 2, 10)
    for backend in ("sdpa", "nested"):
        unknown = Segments(known.cu_seqlens, bound=10)
        assert len(unknown) == 2
        found = packed_attention(q, k, v, unknown, backend=backend)
        torch.testing.assert_close(found, packed_attention(q, k, v, known))
    x = q.flatten(1).float()
    torch.testing.assert_close(mean_per_clip(x, unknown), mean_per_clip(x, known))
    with pytest.raises(InvalidArgumentError, match=r"on the device only; use Segments\.from_lengths"):
        _ = unknown.lengths


def test_bad_requests_name_the_remedy() -> None:
    q, k, v = random_qkv((4,))
    with pytest.raises(InvalidArgumentError, match="4 tokens, but the segments hold 5"):
        packed_attention(q, k, v, Segments.from_lengths((5,)))
    with pytest.raises(InvalidArgumentError, match=r"'varlen' cannot run torch.float64 on cpu.*use 'sdpa'"):
        packed_attention(q, k, v, Segments.from_lengths((4,)), backend="varlen")
    with pytest.raises(InvalidArgumentError, match="back end is 'flash'; allowed are sdpa, varlen"):
        packed_attention(q, k, v, Segments.from_lengths((4,)), backend="flash")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", MIXED)
def test_varlen_equals_the_naive_twin_with_gradients(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    ours = [x.detach().to("cuda", dtype).requires_grad_() for x in random_qkv(lengths)]
    theirs = [x.detach().to("cuda", dtype).double().cpu().requires_grad_() for x in ours]
    fast = packed_attention(*ours, Segments.from_lengths(lengths, device="cuda"), backend="varlen")
    naive = oracles.padded_attention(*theirs, lengths)
    torch.testing.assert_close(fast.double().cpu(), naive, atol=2e-2, rtol=2e-2)
    fast.float().square().sum().backward()
    naive.square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double().cpu(), y.grad, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("lengths", MIXED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_every_precision_equals_the_naive_twin(lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    ours = [x.detach().to(dtype).requires_grad_() for x in random_qkv(lengths)]
    theirs = [x.detach().double().requires_grad_() for x in ours]
    fast = packed_attention(*ours, Segments.from_lengths(lengths))
    naive = oracles.padded_attention(*theirs, lengths)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast.double(), naive, atol=tolerance, rtol=tolerance)
    fast.double().square().sum().backward()
    naive.square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double(), y.grad, atol=tolerance, rtol=tolerance)


def test_views_of_one_projection_need_no_copies_to_be_right() -> None:
    lengths = (3, 1, 6)
    qkv = torch.randn(10, 3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    fast = packed_attention(*qkv.unbind(1), Segments.from_lengths(lengths))
    naive = oracles.padded_attention(*qkv.unbind(1), lengths)
    torch.testing.assert_close(fast, naive)
    ours, theirs = (torch.autograd.grad(x.square().sum(), qkv)[0] for x in (fast, naive))
    torch.testing.assert_close(ours, theirs)


def check_cross_attention(device: str, dtype: torch.dtype, tolerance: float) -> None:
    tokens, keys = (1, 4, 2), (5, 3, 1)
    generator = torch.Generator().manual_seed(0)
    ours = [
        torch.randn(sum(n), 2, 8, generator=generator).to(device, dtype).requires_grad_() for n in (tokens, keys, keys)
    ]
    theirs = [x.detach().double().cpu().requires_grad_() for x in ours]
    segments = [Segments.from_lengths(lengths, device=device) for lengths in (tokens, keys)]
    fast = packed_cross_attention(*ours, *segments)
    parts = zip(theirs[0].split(tokens), theirs[1].split(keys), theirs[2].split(keys), strict=True)
    naive = torch.cat(
        [
            torch.einsum("hqk,khd->qhd", (torch.einsum("qhd,khd->hqk", q, k) / 8**0.5).softmax(-1), v)
            for q, k, v in parts
        ]
    )
    torch.testing.assert_close(fast.double().cpu(), naive, atol=tolerance, rtol=tolerance)
    fast.float().square().sum().backward()
    naive.square().sum().backward()
    for x, y in zip(ours, theirs, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad.double().cpu(), y.grad, atol=2 * tolerance, rtol=2 * tolerance)


def test_keys_may_be_others_than_the_tokens() -> None:
    check_cross_attention("cpu", torch.float32, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_keys_may_be_others_than_the_tokens_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    check_cross_attention("cuda", dtype, tolerance)


def test_keys_that_do_not_fit_their_segments_are_told() -> None:
    q, k, v = random_qkv((4,))
    with pytest.raises(
        InvalidArgumentError, match="4 queries and 4 keys, but the segments hold 4 in 1 clips and 5 in 1"
    ):
        packed_cross_attention(q, k, v, Segments.from_lengths((4,)), Segments.from_lengths((5,)))


def test_gradients_of_some_inputs_alone() -> None:
    q, k, v = (x.detach() for x in random_qkv((4, 2)))
    v.requires_grad_()
    packed_attention(q, k, v, Segments.from_lengths((4, 2))).sum().backward()
    twin = v.detach().clone().requires_grad_()
    oracles.padded_attention(q, k, twin, (4, 2)).sum().backward()
    torch.testing.assert_close(v.grad, twin.grad)
    assert q.grad is None


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_operator_keeps_the_rules_of_custom_operators(requires_grad: bool) -> None:
    inputs = [x.detach().float().requires_grad_(requires_grad) for x in random_qkv((5, 1, 3))]
    torch.library.opcheck(attention_per_clip, (*inputs, Segments.from_lengths((5, 1, 3)).cu_seqlens))


def test_autocast_and_checkpointing() -> None:
    block = Block(24, 3, 48)
    segments = Segments.from_lengths((4, 7))
    x = torch.randn(11, 24, generator=torch.Generator().manual_seed(2))
    plain = block(x, segments)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x, segments), plain, atol=5e-2, rtol=5e-2)
    again = checkpoint(block, x, segments, None, use_reentrant=False)
    torch.testing.assert_close(again, plain)


def test_flops_are_those_of_the_formula() -> None:
    lengths = (5, 1, 3)
    qkv = [x.float().detach().requires_grad_() for x in random_qkv(lengths)]
    with FlopCounterMode(display=False) as counter:
        output = packed_attention(*qkv, Segments.from_lengths(lengths))
    assert counter.get_total_flops() == sum(4 * length**2 * 24 for length in lengths)
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == sum(10 * length**2 * 24 for length in lengths)

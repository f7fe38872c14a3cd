"""Packed attention against one big masked softmax, forward and backward, at mixed lengths."""

from __future__ import annotations

import pytest
import torch

import oracles
from rlt.errors import InvalidArgumentError
from rlt.nn.attention import choose_backend, packed_attention
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

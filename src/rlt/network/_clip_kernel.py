"""Attention clip by clip on the CPU as one operator, forward and backward.

One operator instead of a loop of them, so that autograd records one node, nothing is split or concatenated in the
backward pass, and `torch.compile` sees a single call whose graph does not depend on where clips begin and end.

Shape legend: T tokens of all clips, n tokens of one clip, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@torch.library.custom_op("rlt::attention_per_clip", mutates_args=(), device_types="cpu")
def attention_per_clip(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, key_bias_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention within each clip, by torch's flash kernel for the CPU.

    Queries, keys and values are float [tokens, heads, head width] of any strides, but contiguous in the last dimension;
    `cu_seqlens` is int32 [clips + 1] on the CPU; `key_bias_T`, float [tokens], is added to the logits of each key.
    Gives [tokens, heads, head width], and the logarithm of the softmax's denominators, [heads, tokens], which the
    backward pass needs. Second derivatives are not there, nor a gradient for the bias.
    """
    output_THK = torch.empty(q_THK.shape, dtype=q_THK.dtype)
    logsumexp_HT = torch.empty(q_THK.shape[1], len(q_THK), dtype=_accumulation_type(q_THK))
    for rows in _clips(cu_seqlens):
        inputs = (_heads_first(x[rows]) for x in (q_THK, k_THK, v_THK))
        x_1HnK, logsumexp_1Hn = _forward_kernel(*inputs, attn_mask=_mask(key_bias_T, rows, q_THK))
        output_THK[rows] = x_1HnK[0].transpose(0, 1)
        logsumexp_HT[:, rows] = logsumexp_1Hn[0]
    return output_THK, logsumexp_HT


@attention_per_clip.register_fake
def _(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, key_bias_T: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    del k_THK, v_THK, cu_seqlens, key_bias_T
    num_tokens, num_heads, _ = q_THK.shape
    logsumexp_HT = q_THK.new_empty(num_heads, num_tokens, dtype=_accumulation_type(q_THK))
    return torch.empty(q_THK.shape, dtype=q_THK.dtype, device=q_THK.device), logsumexp_HT


@torch.library.custom_op("rlt::attention_per_clip_backward", mutates_args=(), device_types="cpu")
def attention_per_clip_backward(
    gradient_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    output_THK: Tensor,
    logsumexp_HT: Tensor,
    cu_seqlens: Tensor,
    key_bias_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_per_clip` for queries, keys and values, each [tokens, heads, head width]."""
    gradients = tuple(torch.empty(q_THK.shape, dtype=q_THK.dtype) for _ in range(3))
    for rows in _clips(cu_seqlens):
        inputs = (_heads_first(x[rows]) for x in (gradient_THK, q_THK, k_THK, v_THK, output_THK))
        mask = _mask(key_bias_T, rows, q_THK)
        parts = _backward_kernel(*inputs, logsumexp_HT[None, :, rows], 0.0, False, attn_mask=mask)
        for gradient, part_1HnK in zip(gradients, parts, strict=True):
            gradient[rows] = part_1HnK[0].transpose(0, 1)
    return gradients[0], gradients[1], gradients[2]


@attention_per_clip_backward.register_fake
def _(
    gradient_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    output_THK: Tensor,
    logsumexp_HT: Tensor,
    cu_seqlens: Tensor,
    key_bias_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    del gradient_THK, k_THK, v_THK, output_THK, logsumexp_HT, cu_seqlens, key_bias_T
    q, k, v = (torch.empty(q_THK.shape, dtype=q_THK.dtype, device=q_THK.device) for _ in range(3))
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_THK, k_THK, v_THK, cu_seqlens, key_bias_T = inputs
    ctx.save_for_backward(q_THK, k_THK, v_THK, *output, cu_seqlens, key_bias_T)


def _differentiate(ctx: Any, gradient_THK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*attention_per_clip_backward(gradient_THK, *ctx.saved_tensors), None, None)


attention_per_clip.register_autograd(_differentiate, setup_context=_save)


def _clips(cu_seqlens: Tensor) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in pairwise(cu_seqlens.tolist()))


def _heads_first(x_nHK: Tensor) -> Tensor:
    return x_nHK.transpose(0, 1)[None]


def _mask(key_bias_T: Tensor | None, rows: slice, q_THK: Tensor) -> Tensor | None:
    """The bias of a clip's keys as the kernel wants it, [1, 1, n, n] without a copy: it takes float32 beside halves."""
    if key_bias_T is None:
        return None
    bias_n = key_bias_T[rows].to(_accumulation_type(q_THK))
    return bias_n.expand(1, 1, len(bias_n), -1)


def _accumulation_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@register_flop_formula(torch.ops.rlt.attention_per_clip, get_raw=True)
def _count_forward(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, *_: object, **__: object) -> int:
    del k_THK, v_THK
    return sum(sdpa_flop_count(*shapes) for shapes in _shapes(q_THK, cu_seqlens, 3))


@register_flop_formula(torch.ops.rlt.attention_per_clip_backward, get_raw=True)
def _count_backward(*inputs: Tensor, **_: object) -> int:
    return sum(sdpa_backward_flop_count(*shapes) for shapes in _shapes(inputs[0], inputs[6], 4))


def _shapes(q_THK: Tensor, cu_seqlens: Tensor, count: int) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of `count` inputs of one clip's kernel, clip by clip."""
    _, num_heads, width = q_THK.shape
    for rows in _clips(cu_seqlens):
        yield [(1, num_heads, rows.stop - rows.start, width)] * count

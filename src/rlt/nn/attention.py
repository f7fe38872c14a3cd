"""Attention over packed clips. The only module that chooses an attention back end.

Shape legend: T tokens of all clips, n tokens of one clip, H heads, K width of a head.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from rlt.errors import InvalidArgumentError
from rlt.nn._clip_kernel import attention_per_clip
from rlt.structures import Segments

Backend = Literal["sdpa", "varlen"]
"""How packed attention is computed: "sdpa" runs `scaled_dot_product_attention` clip by clip and works everywhere,
"varlen" runs one variable-length flash kernel and needs CUDA and half precision."""


def choose_backend(device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The back end for tensors of this kind: "varlen" for half precision on CUDA, else "sdpa"."""
    return "varlen" if _varlen_can_run(torch.device(device), dtype) else "sdpa"


def packed_attention(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, *, backend: Backend | None = None
) -> Tensor:
    """Softmax attention in which every token sees the tokens of its own clip and no other.

    Args:
        q_THK: float [tokens, heads, head width], queries of all clips one after the other.
        k_THK: keys, like the queries.
        v_THK: values, like the queries.
        segments: where each clip begins and ends. Required: there is no attention without clip boundaries.
        backend: None chooses by device and dtype (`choose_backend`).

    Returns:
        float [tokens, heads, head width].

    Raises:
        InvalidArgumentError: for an unknown back end, one that cannot run these tensors, or segments that hold
            another number of tokens.
    """
    # While a graph is traced there are no lengths to check; eager code has checked them before.
    if segments.lengths and len(q_THK) != segments.num_tokens:
        raise InvalidArgumentError(f"{len(q_THK)} tokens, but the segments hold {segments.num_tokens}")
    chosen = backend or choose_backend(q_THK.device, q_THK.dtype)
    if chosen == "sdpa":
        if q_THK.device.type == "cpu":
            output_THK: Tensor = attention_per_clip(q_THK, k_THK, v_THK, segments.cu_seqlens)[0]
            return output_THK
        return _sdpa_per_clip(q_THK, k_THK, v_THK, segments)
    if chosen != "varlen":
        raise InvalidArgumentError(f"attention back end is {chosen!r}; allowed are {', '.join(get_args(Backend))}")
    if not _varlen_can_run(q_THK.device, q_THK.dtype):
        raise InvalidArgumentError(
            f"attention back end 'varlen' cannot run {q_THK.dtype} on {q_THK.device.type}; "
            "it needs float16 or bfloat16 on CUDA, use 'sdpa' here"
        )
    return _varlen(q_THK, k_THK, v_THK, segments)


def _varlen_can_run(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _sdpa_per_clip(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments) -> Tensor:
    # Splitting once is cheaper under autograd than slicing clip by clip.
    clips = zip(*(x_THK.split(segments.lengths) for x_THK in (q_THK, k_THK, v_THK)), strict=True)
    outputs = []
    for q_nHK, k_nHK, v_nHK in clips:
        q_1HnK, k_1HnK, v_1HnK = (x_nHK.transpose(0, 1)[None] for x_nHK in (q_nHK, k_nHK, v_nHK))
        outputs.append(F.scaled_dot_product_attention(q_1HnK, k_1HnK, v_1HnK)[0].transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments) -> Tensor:
    # The longest clip only bounds the kernel's grid, so that the number of tokens serves where no lengths are known.
    longest = segments.max_length if segments.lengths else len(q_THK)
    output = varlen_attn(q_THK, k_THK, v_THK, segments.cu_seqlens, segments.cu_seqlens, longest, longest)
    assert isinstance(output, Tensor)  # a tuple comes back only where auxiliary outputs are asked for
    return output

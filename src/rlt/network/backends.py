"""Ways to compute attention over packed clips: what each needs, and how it runs. None of them pads.

Who chooses is `rlt.network.attention`. Optional packages (flash_attn, xformers) are imported here and nowhere else, and
torch's own kernels only where they run, because they bring torch's compiler with them, which takes seconds to load.

Shape legend: T tokens of all clips, S keys of all clips where they are others than the tokens, n tokens and m keys of
one clip, H heads, K width of a head, N blocks of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from rlt.errors import InvalidArgumentError
from rlt.network._clip_kernel import attention_per_clip
from rlt.structures import Segments

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Backend = Literal["sdpa", "varlen", "nested", "flex", "flash_attn", "xformers"]
"""How packed attention is computed.

"sdpa": `scaled_dot_product_attention` clip by clip, on every device and in every precision.
"varlen": torch's variable-length flash kernel; CUDA from compute capability 8.0, half precision.
"nested": `scaled_dot_product_attention` of torch's jagged nested tensors; CPU and CUDA.
"flex": torch's flex attention, compiled, with a block-diagonal mask whose empty blocks are skipped; CUDA.
"flash_attn", "xformers": the packages of these names, where installed; they need what "varlen" needs.
"""

FLEX_BLOCK = 128
"""Tokens along a side of the blocks that flex attention computes or skips as a whole."""


class _Way(NamedTuple):
    """One back end."""

    hindrance: Callable[[torch.device, torch.dtype], str | None]
    """See the function of this name."""
    run: Callable[..., Tensor]
    """Queries, keys, values and segments -> what comes out of attention."""
    takes_bias: bool = False
    """Whether `run` has `key_bias_T`; else it has `scale`, and two more channels carry the bias."""


def available_backends(device: torch.device | str, dtype: torch.dtype) -> tuple[Backend, ...]:
    """The back ends that can run tensors of this kind here."""
    return tuple(name for name in get_args(Backend) if hindrance(name, device, dtype) is None)


def hindrance(backend: Backend, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """What a back end lacks to run tensors of this kind, with the remedy; None if nothing is missing."""
    return _WAYS[backend].hindrance(torch.device(device), dtype)


def run_backend(
    backend: Backend, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, key_bias_T: Tensor | None
) -> Tensor:
    """Packed attention as `rlt.network.attention.packed_attention` describes it, by the named back end."""
    if backend not in _WAYS:
        raise InvalidArgumentError(f"attention back end is {backend!r}; allowed are {', '.join(get_args(Backend))}")
    missing = hindrance(backend, q_THK.device, q_THK.dtype)
    if missing is not None:
        raise InvalidArgumentError(
            f"attention back end {backend!r} cannot run {q_THK.dtype} on {q_THK.device.type}; {missing}, or use 'sdpa'"
        )
    way = _WAYS[backend]
    if key_bias_T is None:
        return way.run(q_THK, k_THK, v_THK, segments)
    if way.takes_bias:
        return way.run(q_THK, k_THK, v_THK, segments, key_bias_T=key_bias_T)
    *biased, scale = with_bias_channels(q_THK, k_THK, v_THK, key_bias_T)
    return way.run(*biased, segments, scale=scale)[..., : v_THK.shape[-1]]


def with_bias_channels(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, key_bias_S: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Queries, keys, values and their scale, so that any kernel adds a bias of each key to its logits.

    A bias of keys alone has rank 1: a channel that is constant in the queries carries it. There are two, the second for
    what half precision rounds off the first, and zeros up to a multiple of 8, which kernels want. Values are as wide,
    with zeros that come out as zeros.
    """
    width = q_THK.shape[-1]
    extra = 2 + -(width + 2) % 8
    scale, constant = width**-0.5, 2.0 ** round(math.log2(width) / 2)  # a power of two is exact in any precision
    value_S = key_bias_S.float() / (scale * constant)
    high_S = value_S.to(k_SHK.dtype)
    low_S = (value_S - high_S).to(k_SHK.dtype)
    k_extra = F.pad(torch.stack([high_S, low_S], -1), (0, extra - 2))[:, None].expand(-1, k_SHK.shape[1], -1)
    q_extra = F.pad(q_THK.new_full((2,), constant), (0, extra - 2)).expand(*q_THK.shape[:2], -1)
    return torch.cat([q_THK, q_extra], -1), torch.cat([k_SHK, k_extra], -1), F.pad(v_SHK, (0, extra)), scale


# What each back end needs


def _nothing(_device: torch.device, _dtype: torch.dtype) -> str | None:
    return None


def _flash_hindrance(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return "it needs float16 or bfloat16 on CUDA"
    if not _runs_flash(device):
        return "it needs a GPU of compute capability 8.0 (Ampere) or newer"
    return None


def _flash_package_hindrance(device: torch.device, dtype: torch.dtype) -> str | None:
    return _flash_hindrance(device, dtype) or _package_hindrance("flash_attn", "flash-attn")


def _xformers_hindrance(device: torch.device, dtype: torch.dtype) -> str | None:
    return _flash_hindrance(device, dtype) or _package_hindrance("xformers.ops", "xformers")


def _flex_hindrance(device: torch.device, _dtype: torch.dtype) -> str | None:
    # On the CPU it has no backward pass, and torch 2.13 compiles no kernel for changing numbers of tokens.
    return None if device.type == "cuda" else "it needs CUDA"


def _package_hindrance(module: str, distribution: str) -> str | None:
    found = _import_optional(module)
    return None if isinstance(found, ModuleType) else f"`pip install {distribution}` is needed ({found})"


def _runs_flash(device: torch.device) -> bool:
    """Whether flash kernels exist for the GPU; where there is none to ask, for the usual one."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def _takes_scale() -> bool:
    """Whether torch's variable-length kernel can be given another scale, which that of torch 2.10 cannot."""
    from torch.nn.attention.varlen import varlen_attn

    return "scale" in signature(varlen_attn).parameters


# Asked once where a graph is traced. `torch.compiler.assume_constant_result` does this, and imports torch's compiler.
_runs_flash._dynamo_marked_constant = True  # type: ignore[attr-defined]
_takes_scale._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _import_optional(module: str) -> ModuleType | str:
    """The module, or why it cannot be had; packages built for another torch fail with more than ImportError."""
    try:
        return import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).splitlines()[0]


# How each back end runs


def _sdpa(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, *, key_bias_T: Tensor | None = None
) -> Tensor:
    if q_THK.device.type == "cpu":
        return attention_per_clip(q_THK, k_THK, v_THK, segments.cu_seqlens, key_bias_T)[0]
    return clip_by_clip(q_THK, k_THK, v_THK, segments, segments, key_bias_T)


def clip_by_clip(
    q_THK: Tensor, k_SHK: Tensor, v_SHK: Tensor, queries: Segments, keys: Segments, key_bias_S: Tensor | None = None
) -> Tensor:
    """Attention on any device, with keys that may be others than the tokens."""
    # Splitting once is cheaper under autograd than slicing clip by clip.
    parts = q_THK.split(queries.lengths), k_SHK.split(keys.lengths), v_SHK.split(keys.lengths)
    biases = [None] * len(keys) if key_bias_S is None else key_bias_S.to(q_THK.dtype).split(keys.lengths)
    outputs = [_attend_once(*clip) for clip in zip(*parts, biases, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def varlen(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHK: Tensor,
    queries: Segments,
    keys: Segments,
    key_bias_S: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention by torch's variable-length flash kernel, with keys that may be others than the tokens."""
    from torch.nn.attention.varlen import varlen_attn

    if key_bias_S is not None:
        q_THK, k_SHK, wide_SHK, scale = with_bias_channels(q_THK, k_SHK, v_SHK, key_bias_S)
        return varlen(q_THK, k_SHK, wide_SHK, queries, keys, scale=scale)[..., : v_SHK.shape[-1]]
    bounds = queries.cu_seqlens, keys.cu_seqlens, queries.bound, keys.bound
    scaled: dict[str, Any] = {}
    if scale is not None and _takes_scale():
        scaled["scale"] = scale
    elif scale is not None:  # the kernel scales by its own, so that the rest is the queries'
        q_THK = q_THK * (scale * q_THK.shape[-1] ** 0.5)
    output = varlen_attn(q_THK, k_SHK, v_SHK, *bounds, **scaled)
    assert isinstance(output, Tensor)  # a tuple comes back only where auxiliary outputs are asked for
    return output


def _varlen(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, *, key_bias_T: Tensor | None = None
) -> Tensor:
    return varlen(q_THK, k_THK, v_THK, segments, segments, key_bias_T)


def _attend_once(q_nHK: Tensor, k_mHK: Tensor, v_mHK: Tensor, key_bias_m: Tensor | None) -> Tensor:
    """Attention of one clip."""
    q_1HnK, k_1HmK, v_1HmK = (x_nHK.transpose(0, 1)[None] for x_nHK in (q_nHK, k_mHK, v_mHK))
    mask = None if key_bias_m is None else key_bias_m.expand(1, 1, len(q_nHK), -1)
    return F.scaled_dot_product_attention(q_1HnK, k_1HmK, v_1HmK, attn_mask=mask)[0].transpose(0, 1)


def _nested(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, *, scale: float | None = None) -> Tensor:
    # With both bounds given nothing has to be read back from the device.
    shortest, longest = min(segments.host or (1,)), segments.bound
    gradients, offsets = torch.is_grad_enabled(), segments.cu_seqlens.long()
    # Nested tensors can view values of the current mode only, so that inference mode is that of the values here.
    with torch.inference_mode(q_THK.is_inference()), torch.set_grad_enabled(gradients):
        q, k, v = (
            # Its path without flash kernels takes no strides of one projection to three.
            torch.nested.nested_tensor_from_jagged(x_THK.contiguous(), offsets, min_seqlen=shortest, max_seqlen=longest)
            for x_THK in (q_THK, k_THK, v_THK)
        )
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return mixed.transpose(1, 2).values()


def _flex(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, *, key_bias_T: Tensor | None = None
) -> Tensor:
    def biased(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, key: Tensor) -> Tensor:
        assert key_bias_T is not None
        return score + key_bias_T[key]

    attend = _flex_attention(compiled=q_THK.device.type == "cuda")
    q_1HTK, k_1HTK, v_1HTK = (x_THK.transpose(0, 1)[None] for x_THK in (q_THK, k_THK, v_THK))
    score = None if key_bias_T is None else biased
    mixed_1HTK = attend(q_1HTK, k_1HTK, v_1HTK, score_mod=score, block_mask=_block_mask(segments, len(q_THK)))
    return mixed_1HTK[0].transpose(0, 1)


def _flash_package(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, *, scale: float | None = None
) -> Tensor:
    package: Any = _import_optional("flash_attn")
    longest, offsets = segments.bound, segments.cu_seqlens
    bounds = offsets, offsets, longest, longest
    return package.flash_attn_varlen_func(q_THK, k_THK, v_THK, *bounds, softmax_scale=scale)


def _xformers(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, *, scale: float | None = None) -> Tensor:
    operators: Any = _import_optional("xformers.ops")
    mask = operators.fmha.BlockDiagonalMask.from_seqlens(list(segments.lengths), device=q_THK.device)
    try:
        output_1THK = operators.memory_efficient_attention(
            q_THK[None], k_THK[None], v_THK[None], attn_bias=mask, scale=scale
        )
    except NotImplementedError as error:  # it imports without its kernels where it was built for another torch
        raise InvalidArgumentError(
            f"xformers has no kernel for {q_THK.dtype} on {q_THK.device}; install one built for torch "
            f"{torch.__version__} or use 'sdpa'"
        ) from error
    return output_1THK[0]


@cache
def _flex_attention(*, compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


_block_masks: WeakKeyDictionary[Segments, BlockMask] = WeakKeyDictionary()


def _block_mask(segments: Segments, num_tokens: int) -> BlockMask:
    """Block-diagonal mask of the clips, made once for all layers and without a [tokens, tokens] matrix."""
    from torch.nn.attention.flex_attention import BlockMask

    if (found := _block_masks.get(segments)) is not None:
        return found
    ends = segments.cu_seqlens[1:]
    clip_T = torch.searchsorted(ends, torch.arange(num_tokens, device=ends.device, dtype=ends.dtype), right=True)
    first_N = torch.arange(0, num_tokens, FLEX_BLOCK, device=ends.device)
    last_N = (first_N + FLEX_BLOCK - 1).clamp(max=num_tokens - 1)
    # The clips of a block of queries reach from the beginning of its first to the end of its last.
    begin_N = segments.cu_seqlens[clip_T[first_N]] // FLEX_BLOCK
    end_N = (ends[clip_T[last_N]] - 1) // FLEX_BLOCK + 1
    blocks_N = torch.arange(len(first_N), device=ends.device, dtype=torch.int32)
    keys_NN = (begin_N[:, None] + blocks_N).clamp(max=len(first_N) - 1)  # those behind the counted ones are not read

    def same_clip(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return clip_T[query] == clip_T[key]

    mask = BlockMask.from_kv_blocks(
        (end_N - begin_N).to(torch.int32)[None, None],
        keys_NN.to(torch.int32)[None, None],
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=same_clip,
        seq_lengths=(num_tokens, num_tokens),
    )
    _block_masks[segments] = mask
    return mask


_WAYS: dict[str, _Way] = {
    "sdpa": _Way(_nothing, _sdpa, takes_bias=True),
    "varlen": _Way(_flash_hindrance, _varlen, takes_bias=True),
    "nested": _Way(_nothing, _nested),
    "flex": _Way(_flex_hindrance, _flex, takes_bias=True),
    "flash_attn": _Way(_flash_package_hindrance, _flash_package),
    "xformers": _Way(_xformers_hindrance, _xformers),
}

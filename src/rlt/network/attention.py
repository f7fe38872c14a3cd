"""Attention over packed clips. The only module that chooses a back end; `rlt.network.backends` has them.

Shape legend: T tokens of all clips, S keys of all clips, H heads, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlt.errors import InvalidArgumentError
from rlt.network.backends import Backend, clip_by_clip, hindrance, run_backend, varlen
from rlt.structures import Segments


def choose_backend(device: torch.device | str, dtype: torch.dtype) -> Backend:
    """The back end for tensors of this kind: "varlen" where it runs, else "sdpa".

    `docs/performance.md` has the measurements. Packages that happen to be installed do not change the choice.
    """
    return "varlen" if hindrance("varlen", device, dtype) is None else "sdpa"


def packed_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    segments: Segments,
    *,
    backend: Backend | None = None,
    key_bias_T: Tensor | None = None,
) -> Tensor:
    """Softmax attention in which every token sees the tokens of its own clip and no other.

    Queries, keys and values of all clips lie one after the other, float [tokens, heads, head width], as the result
    does. There is no attention without clip boundaries. Without `backend`, `choose_backend` chooses. `key_bias_T`,
    float [tokens], is added to the logits of each key; no gradient flows into it.
    """
    if segments.host is not None and len(q_THK) != segments.num_tokens:
        raise InvalidArgumentError(f"{len(q_THK)} tokens, but the segments hold {segments.num_tokens}")
    return run_backend(backend or choose_backend(q_THK.device, q_THK.dtype), q_THK, k_THK, v_THK, segments, key_bias_T)


def packed_cross_attention(
    q_THK: Tensor,
    k_SHK: Tensor,
    v_SHK: Tensor,
    queries: Segments,
    keys: Segments,
    *,
    key_bias_S: Tensor | None = None,
) -> Tensor:
    """Softmax attention in which every token sees the keys of its own clip, which may be others than its tokens.

    Queries and the result are float [tokens, heads, head width], keys and values [keys, heads, head width]; `queries`
    and `keys` say where those of each clip begin and end. `key_bias_S`, float [keys], is added to the logits of each.
    """
    if (len(queries), queries.num_tokens, keys.num_tokens) != (len(keys), len(q_THK), len(k_SHK)):
        raise InvalidArgumentError(
            f"{len(q_THK)} queries and {len(k_SHK)} keys, but the segments hold {queries.num_tokens} in {len(queries)} "
            f"clips and {keys.num_tokens} in {len(keys)}"
        )
    if choose_backend(q_THK.device, q_THK.dtype) == "varlen":
        return varlen(q_THK, k_SHK, v_SHK, queries, keys, key_bias_S)
    return clip_by_clip(q_THK, k_SHK, v_SHK, queries, keys, key_bias_S)

"""Transformer blocks over packed tokens.

Shape legend: T tokens of all clips, D model width, H heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlt.network.attention import packed_attention
from rlt.network.backends import Backend
from rlt.structures import Segments


class Attention(nn.Module):
    """Multi-head self-attention within each clip. Queries and values have a bias, keys have none, as in VideoMAE."""

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to three tensors [T, H, K]."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q_THK, k_THK, v_THK = F.linear(x_TD, self.qkv.weight, bias).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        return q_THK, k_THK, v_THK

    def forward(
        self, x_TD: Tensor, segments: Segments, backend: Backend | None = None, key_bias_T: Tensor | None = None
    ) -> Tensor:
        """Mix tokens of the same clip: [T, D] -> [T, D]."""
        q_THK, k_THK, v_THK = self.queries_keys_values(x_TD)
        x_THK = packed_attention(q_THK, k_THK, v_THK, segments, backend=backend, key_bias_T=key_bias_T)
        return self.proj(x_THK.flatten(1))


class Mlp(nn.Module):
    """Two linear layers with GELU between, token by token."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        return self.fc2(F.gelu(self.fc1(x_TD)))


def drop_path(x_TD: Tensor, segments: Segments, rate: float) -> Tensor:
    """Stochastic depth: drop a residual branch [T, D] for some clips, and scale that of the others by 1 / (1 - rate).

    All tokens of a clip share its fate, which is drawn from torch's global generator. `rate` is 0 or more and below 1.
    """
    keep_B = (torch.rand(len(segments), device=x_TD.device) >= rate).to(x_TD.dtype) / (1 - rate)
    lengths_B = segments.cu_seqlens.diff()
    return x_TD * keep_B.repeat_interleave(lengths_B, output_size=len(x_TD))[:, None]


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, width: int, num_heads: int, mlp_width: int, qkv_bias: bool = True, layer_norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.attn = Attention(width, num_heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.mlp = Mlp(width, mlp_width)
        self.drop_path = 0.0

    def forward(
        self, x_TD: Tensor, segments: Segments, backend: Backend | None = None, key_bias_T: Tensor | None = None
    ) -> Tensor:
        """[T, D] -> [T, D]; `key_bias_T` as in `packed_attention`."""
        x_TD = x_TD + self.branch(self.attn(self.norm1(x_TD), segments, backend, key_bias_T), segments)
        return x_TD + self.branch(self.mlp(self.norm2(x_TD)), segments)

    def branch(self, x_TD: Tensor, segments: Segments) -> Tensor:
        """What a residual branch adds: its output, under stochastic depth in training."""
        return drop_path(x_TD, segments, self.drop_path) if self.training and self.drop_path else x_TD


def mean_per_clip(x_TD: Tensor, segments: Segments) -> Tensor:
    """Mean of the tokens of each clip: [T, D] -> [clips, D]."""
    # Two ways: a graph must not depend on the lengths, and sums by index round otherwise, on CUDA anew in each run.
    if segments.host is not None:
        return torch.stack([x_nD.mean(0) for x_nD in x_TD.split(segments.host)])
    lengths_B = segments.cu_seqlens.diff()
    clip_T = torch.arange(len(segments), device=x_TD.device).repeat_interleave(lengths_B, output_size=len(x_TD))
    sums_BD = x_TD.new_zeros(len(segments), x_TD.shape[1], dtype=torch.float32).index_add(0, clip_T, x_TD.float())
    return (sums_BD / lengths_B[:, None]).to(x_TD.dtype)

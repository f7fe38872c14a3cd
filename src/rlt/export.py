"""`VisionTransformer` and patched classifiers as `torch.export` programs: one graph for any number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rlt.adapters import Adapter
from rlt.errors import InvalidArgumentError
from rlt.nn.attention import choose_backend
from rlt.nn.backends import Backend
from rlt.structures import PackedTokens, Segments
from rlt.vit import VisionTransformer, trace_logits


def export_network(model: VisionTransformer, example: PackedTokens) -> ExportedProgram:
    """Export `model.forward` for any number of tokens and any number of clips, one or more.

    `program.module()(*network_inputs(packed))` gives float [clips, classes], what `model(packed)` gives. The program
    holds a copy of the weights. `torch.export.save` and `load` work on it; who loads it imports `rlt` before, which
    knows the operator `rlt::attention_per_clip`.

    Args:
        model: in evaluation mode.
        example: any pack. Others run on the same device, with the same dtype and size of patches, and with grids of at
            most as many places as the largest of these or of `model.config`.

    Returns:
        The program; `torch.compile` and further passes of torch take it.

    Raises:
        InvalidArgumentError: if the model is in training mode, merges tokens, or was made for another tubelet or patch
            size; or for float32 on a GPU, where attention goes clip by clip and no graph holds for all lengths.
    """
    if type(model) is not VisionTransformer:
        raise InvalidArgumentError(f"model is a {type(model).__name__}; export_network takes a VisionTransformer")
    if model.training:
        raise InvalidArgumentError("the model is in training mode; call model.eval() before it is exported")
    _check_attention(example.device, model.patch_embed.weight.dtype, model.attention_backend)
    model.prepare_trace(example)
    tokens, offsets = Dim("tokens", min=1), Dim("offsets", min=2)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, {0: offsets})
    with _sizes_alike():
        return torch.export.export(_Network(model), network_inputs(example), dynamic_shapes=shapes, strict=True)


def network_inputs(packed: PackedTokens) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an exported program takes.

    Returns:
        `patches` [tokens, values], `place` int64 [tokens], which is `coords` counted in each clip's own grid, run
        `lengths` int64 [tokens], and `cu_seqlens` int32 [clips + 1].
    """
    return packed.patches, packed.place, packed.lengths, packed.cu_seqlens


def export_patched(model: nn.Module, pixel_values: Tensor) -> ExportedProgram:
    """Export a classifier after `rlt.patch`: it chooses tokens by the pixels of each call, as the model does.

    `program.module()(pixel_values)` gives the logits, float [clips, classes]. The number of tokens is free, that of
    clips is the example's: every clip's tokens are counted one by one in the graph. Options are those of this moment.
    Saving and loading are as for `export_network`.

    Args:
        model: a patched VideoMAE or ViViT classifier in evaluation mode, with policy "rlt" and expand=None.
        pixel_values: example, float [clips, frames, 3, height, width]; others have the same shape, dtype and device.

    Raises:
        InvalidArgumentError: for any other model, options or mode. What puts tokens back on the grid (encoders,
            V-JEPA 2, expand="fill") looks at values to decide how to go on, which no graph can.
    """
    adapter = getattr(model, "rlt", None)
    if not isinstance(adapter, Adapter) or type(model).__name__ not in _EXTRA_TOKENS:
        raise InvalidArgumentError(
            f"model is a {type(model).__name__}; export_patched takes a patched {' or '.join(_EXTRA_TOKENS)}"
        )
    if model.training:
        raise InvalidArgumentError("the model is in training mode; call model.eval() before it is exported")
    if adapter.options.expand is not None or adapter.options.policy != "rlt":
        raise InvalidArgumentError(f"{adapter.options} cannot be exported; policy='rlt' and expand=None are needed")
    _check_attention(pixel_values.device, next(model.parameters()).dtype, None)
    with _segments_of_tensors(adapter, _EXTRA_TOKENS[type(model).__name__]), _sizes_alike():
        return torch.export.export(_Classifier(model), (pixel_values,), strict=True)


_EXTRA_TOKENS = {"VideoMAEForVideoClassification": 0, "VivitForVideoClassification": 1}
"""Classifiers that can be exported, and how many tokens each clip has beside those of patches."""


def _check_attention(device: torch.device, dtype: torch.dtype, backend: Backend | None) -> None:
    if device.type != "cpu" and (backend or choose_backend(device, dtype)) != "varlen":
        raise InvalidArgumentError(f"{dtype} on {device} cannot be exported; use the CPU, or half precision")


@contextmanager
def _sizes_alike() -> Iterator[None]:
    """Otherwise one is told apart from larger sizes, and a program for many clips would refuse a single one."""
    alike = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), alike:
        yield


@contextmanager
def _segments_of_tensors(adapter: Adapter, extra: int) -> Iterator[None]:
    """Let the adapter tell attention where clips end by a tensor alone, since a graph has no lengths."""

    def begin(_lengths: tuple[int, ...], _device: torch.device) -> None:
        assert adapter.last is not None
        counts = adapter.last.mask.flatten(1).sum(1) + extra
        adapter.packed_calls = 0
        adapter._call = Segments((), F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)), adapter.last

    before = adapter.last, adapter._call, adapter.packed_calls
    adapter.__dict__["begin"] = begin
    try:
        yield
    finally:
        del adapter.__dict__["begin"]
        adapter.last, adapter._call, adapter.packed_calls = before


class _Classifier(nn.Module):
    """Pixels in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values).logits
        return logits


class _Network(nn.Module):
    """Tensors in, tensor out, as `torch.export` wants it."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, place: Tensor, lengths: Tensor, cu_seqlens: Tensor) -> Tensor:
        return trace_logits(self.model, patches, place, lengths, cu_seqlens)

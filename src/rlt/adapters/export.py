"""Patched classifiers as `torch.export` programs: one graph for any number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from rlt.adapters.base import Adapter
from rlt.errors import InvalidArgumentError
from rlt.network.export import check_attention, sizes_alike
from rlt.structures import Segments


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
    check_attention(pixel_values.device, next(model.parameters()).dtype, None)
    with _segments_of_tensors(adapter, _EXTRA_TOKENS[type(model).__name__]), sizes_alike():
        return torch.export.export(_Classifier(model), (pixel_values,), strict=True)


_EXTRA_TOKENS = {"VideoMAEForVideoClassification": 0, "VivitForVideoClassification": 1}
"""Classifiers that can be exported, and how many tokens each clip has beside those of patches."""


@contextmanager
def _segments_of_tensors(adapter: Adapter, extra: int) -> Iterator[None]:
    """Let the adapter tell attention where clips end by a tensor alone, since a graph has no lengths."""

    def begin(_lengths: tuple[int, ...], _device: torch.device) -> None:
        assert adapter.last is not None
        mask = adapter.last.mask.flatten(1)
        offsets = F.pad((mask.sum(1) + extra).cumsum(0), (1, 0)).to(torch.int32)
        adapter.packed_calls = 0
        adapter._call = Segments(offsets, bound=mask.shape[1] + extra), adapter.last

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

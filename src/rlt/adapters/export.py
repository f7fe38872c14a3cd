"""Patched classifiers as `torch.export` programs: one graph for any number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rlt.adapters.packed import PackedPatch
from rlt.errors import InvalidArgumentError
from rlt.network.export import check_attention, sizes_alike
from rlt.tokens import Threshold

EXPORTABLE = ("VideoMAEForVideoClassification", "VivitForVideoClassification")
"""Classes of models that do not look at values to decide how to go on, apart from how many tokens `Call` counts."""


def export_patched(model: nn.Module, pixel_values: Tensor) -> ExportedProgram:
    """Export a classifier after `rlt.patch`: it chooses tokens by the pixels of each call, as the model does.

    `program.module()(pixel_values)` gives the logits, float [clips, classes]. The number of tokens is free, that of
    clips is the example's: every clip's tokens are counted one by one in the graph. Options are those of this moment.
    Saving and loading are as for `export_network`.

    Args:
        model: a patched VideoMAE or ViViT classifier in evaluation mode, with a threshold and expand=None.
        pixel_values: example, float [clips, frames, 3, height, width]; others have the same shape, dtype and device.

    Raises:
        InvalidArgumentError: for any other model, options or mode. What puts tokens back on the grid (encoders,
            V-JEPA 2, expand="fill") looks at values to decide how to go on, which no graph can.
    """
    adapter = getattr(model, "rlt", None)
    if not isinstance(adapter, PackedPatch) or type(model).__name__ not in EXPORTABLE:
        raise InvalidArgumentError(
            f"model is a {type(model).__name__}; export_patched takes a patched {' or '.join(EXPORTABLE)}"
        )
    if model.training:
        raise InvalidArgumentError("the model is in training mode; call model.eval() before it is exported")
    if adapter.options.expand is not None or not isinstance(adapter.options.rule, Threshold):
        raise InvalidArgumentError(f"{adapter.options} cannot be exported; a threshold and expand=None are needed")
    check_attention(pixel_values.device, next(model.parameters()).dtype, None)
    with adapter.aside(), sizes_alike():
        return torch.export.export(_Classifier(model), (pixel_values,), strict=True)


class _Classifier(nn.Module):
    """Pixels in, logits out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits

"""`VisionTransformer` as a `torch.export` program: one graph for any number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rlt.errors import InvalidArgumentError
from rlt.network.attention import choose_backend
from rlt.network.backends import Backend
from rlt.network.run_lengths import RunLengthParts
from rlt.network.vit import VisionTransformer, trace_features
from rlt.structures import PackedTokens


def export_network(model: VisionTransformer, example: PackedTokens) -> ExportedProgram:
    """Export `model.forward` for any number of tokens and any number of clips, one or more.

    `program.module()(*network_inputs(packed))` gives float [clips, classes], what `model(packed)` gives. The program
    holds a copy of the weights. `torch.export.save` and `load` work on it; who loads it imports `rlt.export` before,
    which knows the operator `rlt::attention_per_clip`.

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
    if model.merge_per_block:
        raise InvalidArgumentError(f"merge_per_block is {model.merge_per_block}, which no graph holds; set it to 0")
    if model.training:
        raise InvalidArgumentError("the model is in training mode; call model.eval() before it is exported")
    check_attention(example.device, model.patch_embed.weight.dtype, model.attention_backend)
    model.prepare(example)
    tokens, offsets = Dim("tokens", min=1), Dim("offsets", min=2)
    shapes = ({0: tokens}, {0: tokens}, {0: tokens}, {0: offsets}, {0: tokens})
    with sizes_alike():
        return torch.export.export(_Network(model), network_inputs(example), dynamic_shapes=shapes, strict=True)


def network_inputs(packed: PackedTokens) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What an exported program takes.

    Returns:
        `patches` [tokens, values], `place` int64 [tokens], which is `coords` counted in each clip's own grid, run
        `lengths` int64 [tokens], `cu_seqlens` int32 [clips + 1], and `step` int64 [tokens], the places of one time step
        of each token's clip.
    """
    return packed.patches, packed.place, packed.lengths, packed.cu_seqlens, packed.step


def check_attention(device: torch.device, dtype: torch.dtype, backend: Backend | None) -> None:
    """Hold that attention is one operator that takes any lengths."""
    if device.type != "cpu" and (backend or choose_backend(device, dtype)) != "varlen":
        raise InvalidArgumentError(f"{dtype} on {device} cannot be exported; use the CPU, or half precision")


@contextmanager
def sizes_alike() -> Iterator[None]:
    """Otherwise one is told apart from larger sizes, and a program for many clips would refuse a single one."""
    alike = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), alike:
        yield


class _Network(nn.Module):
    """Tensors in, tensor out, as `torch.export` wants it."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, patches: Tensor, place: Tensor, lengths: Tensor, cu_seqlens: Tensor, step: Tensor) -> Tensor:
        inputs = patches, place, lengths, cu_seqlens, step
        return self.model.head(trace_features(self.model, *inputs, RunLengthParts.of(self.model.run_lengths)))

"""Make models of other libraries faster: fewer tokens behind the same call. Knows no algorithm of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from rlt.adapters.base import Adapter
from rlt.adapters.options import LastForward, PatchOptions
from rlt.adapters.qwen import QwenVLAdapter
from rlt.adapters.timm_vit import TimmViTAdapter
from rlt.adapters.videomae import VideoMAEAdapter
from rlt.adapters.vivit import ViViTAdapter
from rlt.adapters.vjepa2 import VJEPA2Adapter
from rlt.errors import InvalidArgumentError

__all__ = ["ADAPTERS", "Adapter", "LastForward", "PatchOptions", "patch", "supported_models", "unpatch"]

ADAPTERS: tuple[type[Adapter], ...] = (VideoMAEAdapter, VJEPA2Adapter, ViViTAdapter, QwenVLAdapter, TimmViTAdapter)


def supported_models() -> list[str]:
    """Class names of the models that `patch` knows."""
    return [name for adapter in ADAPTERS for name in adapter.model_classes]


def patch(model: nn.Module, *, threshold: float = 0.1, **options: Any) -> nn.Module:
    """Make a trained model drop repeated tokens, in place.

    The call, its output object and the weights stay the same. With no token dropped the outputs equal the unpatched
    model's within float tolerance. `model.rlt` is the `Adapter`: `model.rlt.last` tells what the last call kept, and
    `with model.rlt.override(threshold=0.2):` changes options for some calls. A patched model is patched anew.

    Args:
        model: one of `supported_models()`, with trained or random weights, on any device.
        threshold: see `rlt.keep_mask`.
        options: further fields of `PatchOptions`.

    Returns:
        The same model.

    Raises:
        InvalidArgumentError: for a model of another class, listing the supported ones, or options out of range.
        MissingDependencyError: if the installed transformers is too old.
    """
    kind = _adapter_of(model)
    chosen = PatchOptions(threshold=threshold, **options)
    unpatch(model)
    adapter = kind(model, chosen)
    adapter.attach()
    return model


def _adapter_of(model: nn.Module) -> type[Adapter]:
    """By the names of its class and those that it inherits from, so that their libraries need not be imported."""
    known = {name: adapter for adapter in ADAPTERS for name in adapter.model_classes}
    for base in type(model).__mro__:
        adapter = known.get(base.__name__)
        if adapter is not None and base.__module__.partition(".")[0] == adapter.library:
            return adapter
    names = " and ".join(
        f"{', '.join(name for name in known if known[name].library == library)} of {library}"
        for library in dict.fromkeys(adapter.library for adapter in ADAPTERS)
    )
    raise InvalidArgumentError(
        f"model is a {type(model).__name__} of {type(model).__module__.partition('.')[0]}; rlt.patch knows {names}"
    )


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: the model computes what it did before, bit for bit. Nothing happens to a model that is not patched.

    Returns:
        The same model.
    """
    adapter = getattr(model, "rlt", None)
    if isinstance(adapter, Adapter):
        adapter.detach()
    return model

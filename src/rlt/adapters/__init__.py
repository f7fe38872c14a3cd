"""Make models of other libraries faster: fewer tokens behind the same call."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from rlt.adapters.encoders import ImageEncoderAdapter
from rlt.adapters.options import MOVED, Expand, LastForward, PatchOptions
from rlt.adapters.packed import Call, PackedPatch
from rlt.adapters.patching import Hook, Override, Patch
from rlt.adapters.qwen import QwenVLAdapter
from rlt.adapters.streams import Stream
from rlt.adapters.timesformer import TimesformerAdapter
from rlt.adapters.timm_vit import TimmViTAdapter
from rlt.adapters.videomae import VideoMAEAdapter
from rlt.adapters.vivit import ViViTAdapter
from rlt.adapters.vjepa2 import VJEPA2Adapter
from rlt.checks import named_options
from rlt.errors import InvalidArgumentError
from rlt.structures import RGB
from rlt.tokens import Rule, choose_rule

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Call",
    "Hook",
    "LastForward",
    "Override",
    "PackedPatch",
    "Patch",
    "PatchOptions",
    "Stream",
    "patch",
    "register_adapter",
    "supported_models",
    "unpatch",
]

Adapter = Patch
"""What `model.rlt` is."""
ADAPTERS: list[type[Patch]] = [
    VideoMAEAdapter,
    VJEPA2Adapter,
    ViViTAdapter,
    TimesformerAdapter,
    QwenVLAdapter,
    ImageEncoderAdapter,
    TimmViTAdapter,
]
"""What `patch` knows; `register_adapter` adds to it."""
AnyPatch = TypeVar("AnyPatch", bound=Patch)


def register_adapter(adapter: type[AnyPatch]) -> type[AnyPatch]:
    """Teach `patch` models of your own, with a subclass of `Patch` or `PackedPatch`; a decorator, which gives it back.

    Args:
        adapter: its `model_classes` names the classes of the models, its `library` the top-level package or module that
            they come from. A class of the same name and module as one before takes its place.

    Raises:
        InvalidArgumentError: if it says no models, or names some that another adapter patches.
    """
    if not (isinstance(adapter, type) and issubclass(adapter, Patch)):
        raise InvalidArgumentError(f"adapter is {adapter!r}; a subclass of rlt.adapters.Patch is needed")
    if not getattr(adapter, "model_classes", ()) or not getattr(adapter, "library", ""):
        raise InvalidArgumentError(f"{adapter.__name__} names no models; set model_classes and library")
    own = (adapter.__module__, adapter.__qualname__)
    others = [known for known in ADAPTERS if (known.__module__, known.__qualname__) != own]
    for known in others:
        taken = set(known.model_classes) & set(adapter.model_classes)
        if known.library == adapter.library and taken:
            raise InvalidArgumentError(f"{', '.join(sorted(taken))} of {known.library} is {known.__name__}'s already")
    ADAPTERS[:] = [*others, adapter]
    return adapter


def supported_models() -> list[str]:
    """Class names of the models that `patch` knows."""
    return [name for adapter in ADAPTERS for name in adapter.model_classes]


@named_options(**MOVED)
def patch(
    model: nn.Module,
    *,
    threshold: float | None = None,
    keep_ratio: float | None = None,
    max_tokens: int | None = None,
    reference: str | None = None,
    exposure: str | None = None,
    motion: str | None = None,
    rule: Rule | str | None = None,
    run_lengths: str | None = None,
    expand: Expand | None = None,
    frames_per_clip: int | None = None,
    refresh_every: int | None = None,
    refresh_share: float | None = None,
    refresh_around: int | None = None,
    pixel_mean: RGB | None = None,
    pixel_std: RGB | None = None,
) -> nn.Module:
    """Make a trained model drop repeated tokens, in place.

    The call, its output object and the weights stay the same. With no token dropped the outputs equal the unpatched
    model's within float tolerance. `model.rlt` is the adapter: `model.rlt.last` tells what the last call kept, and
    `with model.rlt.override(threshold=0.2):` changes options for some calls. A patched model is patched anew.

    Args:
        model: one of `supported_models()`, with trained or random weights, on any device.
        threshold: keep what differs by more from the token before it, see `rlt.keep_mask`; 0.1 where nothing else is
            given.
        keep_ratio: keep this share of each clip's tokens instead, those that differ most, see `rlt.Budget`.
        max_tokens: keep at most so many of each clip's tokens instead.
        reference: "previous" (paper) or "anchor", what a token is compared with, see `rlt.Threshold`.
        exposure: "none" (paper) or "gain", whether a change of exposure is undone first, see `rlt.Threshold`.
        motion: "none" (paper) or "global", whether a shift of the whole picture is undone first, see `rlt.Threshold`.
        rule: any rule instead, or the name of one, see `rlt.tokens.rules`.
        run_lengths: "aware" lets a kept token count as often as it stood, "ignored" once (paper); see `PatchOptions`,
            as for what follows.
        expand: whether outputs per token go back on the full grid.
        frames_per_clip: for image models, as are the next three: how many frames of a call are one clip.
        refresh_every: keep every so many frames whole.
        refresh_share: keep a frame whole if the rule keeps more than this share of it.
        refresh_around: keep also patches up to so many places beside one that the rule keeps.
        pixel_mean: where the processor beside the checkpoint is not the one that `pixel_values` come from.
        pixel_std: as above.

    Returns:
        The same model.

    Raises:
        InvalidArgumentError: for a model of another class, listing the supported ones, or options out of range.
        MissingDependencyError: if the installed transformers is too old.
    """
    kind = _adapter_of(model)
    chosen = choose_rule(
        rule,
        threshold=threshold,
        keep_ratio=keep_ratio,
        max_tokens=max_tokens,
        reference=reference,
        exposure=exposure,
        motion=motion,
    )
    refresh = refresh_every, refresh_share, refresh_around
    options = PatchOptions(chosen, expand, frames_per_clip, pixel_mean, pixel_std, run_lengths, *refresh)
    adapter = kind(model, options)  # which may refuse, and leaves a patch from before as it was
    unpatch(model)
    adapter.attach()
    return model


def _adapter_of(model: nn.Module) -> type[Patch]:
    """By the names of its class and those that it inherits from, so that their libraries need not be imported."""
    known = {(adapter.library, name): adapter for adapter in ADAPTERS for name in adapter.model_classes}
    for base in type(model).__mro__:
        adapter = known.get((base.__module__.partition(".")[0], base.__name__))
        if adapter is not None:
            return adapter
    names = " and ".join(
        f"{', '.join(name for of, name in known if of == library)} of {library}"
        for library in dict.fromkeys(library for library, _ in known)
    )
    within = {"_orig_mod": "patch it before torch.compile", "model": "patch what it wraps"}
    for attribute, remedy in within.items():
        inner = getattr(model, attribute, None)
        if inner is not None and any(
            (base.__module__.partition(".")[0], base.__name__) in known for base in type(inner).__mro__
        ):
            raise InvalidArgumentError(f"model is a {type(model).__name__}; {remedy}: rlt.patch(model.{attribute})")
    raise InvalidArgumentError(
        f"model is a {type(model).__name__} of {type(model).__module__.partition('.')[0]}; rlt.patch knows {names}"
    )


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch` and give back the model, which computes what it did before, bit for bit.

    Nothing happens to a model that is not patched.
    """
    adapter = getattr(model, "rlt", None)
    if isinstance(adapter, Patch):
        adapter.detach()
    return model

"""Faster video transformers without looking twice: run-length tokenization, packed ViTs, and tools around them.

clip = rlt.read_clip("video.mp4")           # uint8 frames
tokens = rlt.tokenize(clip, threshold=0.1)  # only the patches that changed, and how long each one stood
logits = rlt.create_model("vit_base")(rlt.pack([tokens]))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlt.adapters import patch, register_adapter, unpatch
    from rlt.checkpoints import create_model, list_models
    from rlt.encoding import Encoder
    from rlt.network.vit import VisionTransformer, ViTConfig
    from rlt.streaming import stream
    from rlt.structures import Clip, PackedTokens, PatchSpec, RunLengthTokens, Segments, TokenGrid, pack
    from rlt.tokens import (
        Budget,
        Drawn,
        Everything,
        Random,
        Rule,
        Threshold,
        TokenStream,
        UniformFrames,
        keep_mask,
        register_rule,
        run_lengths,
        select_tokens,
        tokenize,
    )
    from rlt.video import read_clip

    __version__: str

__all__ = [
    "Budget",
    "Clip",
    "Drawn",
    "Encoder",
    "Everything",
    "PackedTokens",
    "PatchSpec",
    "Random",
    "Rule",
    "RunLengthTokens",
    "Segments",
    "Threshold",
    "TokenGrid",
    "TokenStream",
    "UniformFrames",
    "ViTConfig",
    "VisionTransformer",
    "create_model",
    "keep_mask",
    "list_models",
    "pack",
    "patch",
    "read_clip",
    "register_adapter",
    "register_rule",
    "run_lengths",
    "select_tokens",
    "stream",
    "tokenize",
    "unpatch",
]

if not TYPE_CHECKING:
    _ROOMS = ("structures", "tokens", "video", "network.vit", "checkpoints", "adapters", "encoding", "streaming")

    def __getattr__(name: str) -> object:
        """Load a public name, or a room such as `rlt.video`, when it is first asked for: torch takes a second."""
        if name == "__version__":
            value = import_module("importlib.metadata").version("rlt")
        elif name in __all__:
            rooms = (import_module(f"rlt.{room}") for room in _ROOMS)
            value = next(getattr(room, name) for room in rooms if hasattr(room, name))
        else:
            try:
                return import_module(f"rlt.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"rlt.{name}":
                    raise
                raise AttributeError(f"module 'rlt' has no attribute {name!r}") from None
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, "__version__"})

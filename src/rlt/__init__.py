"""Faster video transformers without looking twice: run-length tokenization, packed ViTs, and tools around them.

clip = rlt.read_clip("video.mp4")           # uint8 frames
tokens = rlt.tokenize(clip, threshold=0.1)  # only the patches that changed, and how long each one stood
logits = rlt.create_model("vit_base")(rlt.pack([tokens]))
"""

from importlib.metadata import version

from rlt.adapters import patch, unpatch
from rlt.checkpoints.models import create_model, list_models
from rlt.network.vit import VisionTransformer, ViTConfig
from rlt.structures import Clip, PackedTokens, PatchSpec, RunLengthTokens, Segments, TokenGrid, pack
from rlt.tokens import (
    Budget,
    Everything,
    Random,
    Rule,
    Threshold,
    UniformFrames,
    keep_mask,
    register_rule,
    run_lengths,
    select_tokens,
    tokenize,
)
from rlt.video import read_clip

__version__ = version("rlt")

__all__ = [
    "Budget",
    "Clip",
    "Everything",
    "PackedTokens",
    "PatchSpec",
    "Random",
    "Rule",
    "RunLengthTokens",
    "Segments",
    "Threshold",
    "TokenGrid",
    "UniformFrames",
    "ViTConfig",
    "VisionTransformer",
    "create_model",
    "keep_mask",
    "list_models",
    "pack",
    "patch",
    "read_clip",
    "register_rule",
    "run_lengths",
    "select_tokens",
    "tokenize",
    "unpatch",
]

"""Faster video transformers without looking twice: run-length tokenization, packed ViTs, and tools around them.

    clip = rlt.read_clip("video.mp4")           # uint8 frames
    tokens = rlt.tokenize(clip, threshold=0.1)  # only the patches that changed, and how long each one stood
    logits = rlt.create_model("vit_base")(rlt.pack([tokens]))
"""

from rlt.packing import pack
from rlt.structures import Clip, PackedTokens, RunLengthTokens, Segments, TokenGrid
from rlt.tokens import keep_mask, run_lengths, select_tokens, tokenize

__version__ = "0.1.0"

__all__ = [
    "Clip",
    "PackedTokens",
    "RunLengthTokens",
    "Segments",
    "TokenGrid",
    "keep_mask",
    "pack",
    "run_lengths",
    "select_tokens",
    "tokenize",
]

"""What a token stands for counts: run lengths in pooling, attention and positions, without training.

A network that was trained on all tokens gives the same answer for exact repeats, whatever is dropped, if a kept token
counts as often as it stood. Softmax over keys of which one is repeated n times is softmax over one of them with log(n)
added to its logit; the mean over all tokens is the mean over kept ones weighted by their run lengths. Positions differ
along a run, so that a token gets the mean of those that it stands for. The paper ("Don't Look Twice", section 3.3)
counts none of it, and offers a learned length embedding instead.

Shape legend: T tokens of all clips.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlt.checks import nearest
from rlt.errors import InvalidArgumentError
from rlt.structures import Segments

AWARE, IGNORED = "aware", "ignored"


class RunLengthParts(NamedTuple):
    """Where run lengths count. As text it is "aware" for everywhere, "ignored" for nowhere, or some parts' names."""

    pooling: bool
    """The mean over a clip weighs a token by its run length."""
    attention: bool
    """The logarithm of a key's run length is added to its logit."""
    position: bool
    """A token has the mean of the positions over its run."""

    @classmethod
    def of(cls, text: str) -> RunLengthParts:
        """From "aware", "ignored", or parts joined by "+", such as "pooling+attention".

        Raises:
            InvalidArgumentError: for any other word.
        """
        words = {AWARE: cls._fields, IGNORED: ()}.get(text, text.split("+") if isinstance(text, str) else [text])
        for word in words:
            if word not in cls._fields:
                listed = f"{AWARE}, {IGNORED}, or some of {', '.join(cls._fields)} joined by '+'"
                hint = nearest(word, (AWARE, IGNORED, *cls._fields))
                raise InvalidArgumentError(f"run_lengths is {text!r}; allowed are {listed}{hint}")
        return cls(*(name in words for name in cls._fields))

    @property
    def names(self) -> tuple[str, ...]:
        """Those in which they count."""
        return tuple(name for name, counts in zip(self._fields, self, strict=True) if counts)

    def __str__(self) -> str:
        if all(self) or not any(self):
            return AWARE if all(self) else IGNORED
        return "+".join(self.names)


NOWHERE = RunLengthParts(False, False, False)


def key_bias(lengths_T: Tensor) -> Tensor:
    """What attention adds to the logits of keys that stand for so many tokens: float32 [tokens]."""
    return lengths_T.to(torch.float32).log()


def pooling_weights(lengths_T: Tensor, segments: Segments) -> Tensor:
    """Weights whose mean over each clip is 1: float32 [tokens]. They are exactly 1 where all tokens of a clip count
    alike, so that nothing changes there."""
    counts_B = segments.cu_seqlens.diff()
    ends_B = lengths_T.cumsum(0)[segments.cu_seqlens[1:].long() - 1]
    mean_B = torch.diff(ends_B, prepend=ends_B.new_zeros(1)) / counts_B
    return lengths_T / mean_B.repeat_interleave(counts_B, output_size=len(lengths_T))

"""The rows that `rlt predict` and `rlt features` write: one per window, and the kinds of their columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from rlt.data import token_files
from rlt.structures import Clip

_BEFORE = {
    "source": "string",
    "window": "int64",
    "start": "float64",
    "end": "float64",
    "tokens_kept": "float64",
    "num_tokens": "int64",
}
OUTPUTS: dict[str, dict[str, str]] = {
    "classes": {"top_ids": "list<int64>", "top_names": "list<string>", "top_probabilities": "list<float64>"},
    "embedding": {"embedding": "list<float32>"},
    "tokens": {
        "features": "list<list<float32>>",
        "coords": "list<list<int64>>",
        "run_lengths": "list<int64>",
        "grid": "list<int64>",
    },
}
"""What can be asked of a network, and the columns that it comes in."""
STORED = "patches"
"""What `rlt tokens` writes instead: the tokens themselves, and the labels of their videos."""
_AFTER = {"error": "string", "last": "bool"}
MAX_TOP = 5


def kinds_of(outputs: Sequence[str]) -> dict[str, str]:
    """Columns in their order, and the kind of each as `rlt.data.tables` names it."""
    known = {**OUTPUTS, STORED: {**token_files.COLUMNS, **token_files.LABELS}}
    asked = {name: kind for output in outputs for name, kind in known[output].items()}
    return {**_BEFORE, **asked, **_AFTER}


def columns_of(rows: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> dict[str, list[Any]]:
    """Rows as columns of one length; what a row does not have is None."""
    names = dict.fromkeys([*kinds_of(outputs), *(name for row in rows for name in row)])
    return {name: [row.get(name) for row in rows] for name in names}


def window_row(source: str, number: int, clip: Clip) -> dict[str, Any]:
    """What is known of a window before a network has seen it."""
    last = len(clip.times) - 1 - clip.num_repeated
    return {
        "source": source,
        "window": number,
        "start": float(clip.times[0]),
        "end": float(clip.times[max(last, 0)]),
        "error": None,
        "last": False,
    }


def failed_row(source: str, number: int, error: str) -> dict[str, Any]:
    """The row of a video that cannot be read, or not any further."""
    return {"source": source, "window": number, "error": error, "last": True}


def predicted(probabilities: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The most probable classes of each window, from probabilities [windows, classes]."""
    best = probabilities.topk(min(MAX_TOP, probabilities.shape[1]), dim=1)
    return [
        {
            "top_ids": ids,
            "top_names": [labels[number] if labels else None for number in ids],
            "top_probabilities": values,
        }
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
